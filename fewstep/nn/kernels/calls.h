/* What one kernel file uses of another. */
#ifndef FEWSTEP_CALLS_H
#define FEWSTEP_CALLS_H
#include <stdint.h>

enum form { FLOAT, NARROW, ROUNDED }; /* how a number is stored: fp32; bf16; fp32 rounded to what bf16 holds */

typedef struct {
    const float *weight; /* NULL: no norm */
    float eps;
} norm;

typedef struct {
    const void *weight; /* panels of skinny.c */
    const float *bias;
    long in, out;
} layer;

/* norm.c */
void rms_norm(const void *x, const float *weight, void *y, long rows, long width, float eps, int bf16);

/* skinny.c. Words are rows of activations as the panels read them: `skinny_form` numbers, `skinny_pitch` floats apart, two
 * floats of zeros behind the last input. */
int skinny_linear(const void *weight, const float *bias, const void *x, void *y, long rows, long in, long out, int w_bf16, int x_bf16,
                  int threads);
enum form skinny_form(int bf16);
long skinny_pitch(long in);
long skinny_panel_count(long out);
void skinny_panels(const void *weight, const float *bias, const float *words, void *y, long rows, long in, long out, int bf16,
                   long first, long last);

/* attention.c */
typedef struct {
    long batch, heads, kv_heads, queries, keys, width;
    long q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row; /* strides in elements */
    long visible_batch, visible_row;
} layout;

typedef struct { /* the slots that the queries of one sequence see */
    const int32_t *slots; /* those that any of them sees, in order */
    long count, open;     /* how many; the first of them, seen by all the queries */
    const uint8_t *visible; /* bytes [queries, count - open], `row` apart, for the slots behind the open ones */
    long row;
} view;

typedef struct {
    const layout *at;
    const view *views; /* one per sequence */
    const char *q, *k, *v;
    void (*prepare)(const void *owner, long row, long head, float *wide); /* NULL, or makes a query ready before its only use */
    const void *owner;
    char *y; /* tokens `y_row` elements apart */
    long y_row;
    enum form form, y_form;
    float scale;
    long share, group, pieces, units, columns, padded; /* set by plan_attention */
} attention;

int decode_attention(const void *q, const void *k, const void *v, const void *visible, void *y, const layout *at, float scale,
                     int bf16, int threads);
void plan_attention(attention *a, int threads);
long attention_memory(const attention *a);
void attend_units(const attention *a, long first, long last, float *memory);

/* slots.c */
typedef struct { /* what the blocks of one call share; its last `queries` of `pending` nodes are the new tokens */
    long batch, queries, base, pending;
    const int64_t *lengths;
    const int64_t *parent; /* rows `parent_row` apart; NULL: a chain */
    long parent_row;
    const int64_t *positions; /* NULL: index in the sequence */
    long position_row;
    const char *cos, *sin; /* [angles, head width]; NULL: nothing turns */
    long angles, window, block; /* window 0: none; block 0: causal */
    int threads;
} scene;

enum { NO_MEMORY = -1, BAD_LENGTHS = 1, BAD_PARENT, BAD_POSITION, BAD_TOKEN };

int check_scene(const scene *s);
long sight_window(const scene *s, long window);
long sight_memory(const scene *s, long window);
const view *look(const scene *s, long window, char *memory);
void place(const scene *s, int64_t *angles);

/* step.c */
typedef struct { /* w [norm(a row's embedding); norm(what it reads)] */
    const norm *embed, *hidden;
    const layer *layer;
    const void *from; /* [batch, sources, width] */
    const int64_t *reads; /* [batch, queries]; NULL: its own place */
    long sources;
} joint;

typedef struct { /* one call: x and y [batch, queries, width], all bf16 or all fp32 */
    const void *blocks, *caches;
    long depth;
    const scene *scene;
    long width, slots;
    int bf16;
    const void *x; /* NULL: embeddings of tokens, alone or joined to something else */
    const void *table;
    const int64_t *tokens; /* rows `token_row` apart */
    long token_row, vocab;
    const joint *join; /* or NULL */
    void *y;
    const norm *last; /* NULL: no scores */
    const layer *head;
    long tail; /* of the last so many tokens of a row: */
    void *final, *scores; /* normed [batch, tail, width], or NULL; [batch, tail, vocab] */
} steps;

int run_steps(const steps *c);

/* ends.c */
void largest(const void *x, int64_t *y, long rows, long width, int bf16);

#endif
