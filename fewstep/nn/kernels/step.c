/* The step of a stack of decoder blocks: x + attention(norm(x)), then x + MLP(norm(x)), for a few rows over caches of keys and
 * values, all blocks, and what stands before and behind them, in one parallel region whose threads meet between the stages.
 *
 * Rounding. What is stored has the activations' type: norms, projections, turned queries and keys, attention, activations and
 * both sums are rounded once each; in between all is fp32. PyTorch's operators round more often within a norm, a turn and an
 * activation.
 *
 * Order. Norms, turns and activations work on one row at a time in one fixed order, beside the panels of skinny.c and the columns
 * of attention.c, which do not depend on one another either: so a row's result is bitwise the same alone or among others, on one
 * thread or many.
 *
 * This file knows nothing of tensors or of trees. */
#include "rows.h"
#ifdef _OPENMP
#include <sched.h>
#include <stdatomic.h>
#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

enum { SPINS = 2000 }; /* looks at a meeting's state before a thread sleeps, so that the awaited one may have its core */
enum { OWN_NORMS = 8 }; /* rows up to which every thread norms them all for itself */
enum { WORTH = 1 << 18 }; /* multiply-adds of a block below which a second thread costs more than it saves */

typedef struct { /* one per layer of the model, made once */
    layer qkv, out, up, down;
    norm mixer, mlp, q, k;
    long heads, kv_heads, head_width, window;
    int gated;
} block;

typedef struct {
    char *data;
    long sides, bytes;
} cache;

typedef struct { /* one call */
    const steps *c;
    const block *blocks, *end;
    const cache *caches;
    const scene *scene;
    const view **views; /* per block */
    const int64_t *angles;
    long rows, width, slots;
    int bf16;
    enum form form, words; /* of activations; of those that panels read */
    char *y, *projected, *more; /* the sum so far; qkv, gate and up; what is added to the sum */
    float *normed, *mixed, *active, *joined, *scratch; /* words; `own` floats a thread */
    long own;
} work;

typedef struct {
#ifdef _OPENMP
    _Alignas(64) atomic_int arrived;
    _Alignas(64) atomic_int round;
    atomic_int asleep;
#endif
    int threads;
} meeting;

typedef struct {
    const work *w;
    meeting *at;
    int thread, threads;
} hand;

/* Waits until all threads are here. */
static void meet(const hand *h) {
#ifdef _OPENMP
    if (h->threads == 1) return;
    const int round = atomic_load_explicit(&h->at->round, memory_order_relaxed);
    if (atomic_fetch_add_explicit(&h->at->arrived, 1, memory_order_acq_rel) == h->threads - 1) {
        atomic_store_explicit(&h->at->arrived, 0, memory_order_relaxed);
        atomic_store(&h->at->round, round + 1);
#ifdef __linux__
        if (atomic_load(&h->at->asleep)) syscall(SYS_futex, &h->at->round, FUTEX_WAKE_PRIVATE, h->threads, NULL, NULL, 0);
#endif
        return;
    }
    for (int i = 0; i < SPINS; i++) {
        if (atomic_load_explicit(&h->at->round, memory_order_acquire) != round) return;
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }
    atomic_fetch_add(&h->at->asleep, 1);
    while (atomic_load(&h->at->round) == round) {
#ifdef __linux__
        syscall(SYS_futex, &h->at->round, FUTEX_WAIT_PRIVATE, round, NULL, NULL, 0);
#else
        sched_yield();
#endif
    }
    atomic_fetch_sub(&h->at->asleep, 1);
#else
    (void)h;
#endif
}

static long start(const hand *h, long count) { return count * h->thread / h->threads; }
static long stop(const hand *h, long count) { return count * (h->thread + 1) / h->threads; }

static char *word_row(float *words, long row, long in) { return (char *)(words + row * skinny_pitch(in)); }

static void end_row(const work *w, char *row, long in) { memset(row + in * size_of(w->words), 0, 2 * sizeof(float)); }

/* Rows of the sum so far, normed, as words: of few rows each thread makes its own, which costs less than to meet. */
static const float *norm_rows(const hand *h, const norm *by) {
    const work *w = h->w;
    const long width = w->width;
    const int shared = w->rows > OWN_NORMS;
    float *normed = w->normed + (shared ? 0 : h->thread * w->rows * skinny_pitch(width));
    for (long r = shared ? start(h, w->rows) : 0; r < (shared ? stop(h, w->rows) : w->rows); r++) {
        char *to = word_row(normed, r, width);
        const char *from = w->y + r * width * size_of(w->form);
        if (w->words == ROUNDED) normalise(by, from, NARROW, to, ROUNDED, width);
        else normalise(by, from, w->form, to, w->words, width);
        end_row(w, to, width);
    }
    if (shared) meet(h);
    return normed;
}

static void panels(const hand *h, const layer *l, const float *words, char *y, long first, long last) {
    skinny_panels(l->weight, l->bias, words, y, h->w->rows, l->in, l->out, h->w->bf16, first, last);
}

typedef struct {
    const work *w;
    const block *b;
} turner;

static const char *angle(const work *w, const char *table, long row, long bytes) {
    return table ? table + w->angles[row] * bytes : NULL;
}

/* A query turned in place. */
static void turn_query(const void *owner, long row, long head, float *wide) {
    const turner *own = owner;
    const work *w = own->w;
    const block *b = own->b;
    const long width = b->head_width * size_of(w->form);
    char *q = w->projected + (row * (b->heads + 2 * b->kv_heads) + head) * width;
    turn(&b->q, q, angle(w, w->scene->cos, row, width), angle(w, w->scene->sin, row, width), q, b->head_width, w->form, wide);
}

/* Whether every key and every value lies within the panels of one thread. */
static int whole_heads(const hand *h, const block *b) {
    const long count = skinny_panel_count(b->qkv.out);
    for (int t = 1; t < h->threads; t++) {
        const long cut = count * t / h->threads * 16 - b->heads * b->head_width;
        if (cut > 0 && cut % b->head_width) return 0;
    }
    return 1;
}

/* Keys turned and values as they are into the cache: by the thread that made them, or shared out where their panels are. */
static void place_heads(const hand *h, const block *b, const cache *c) {
    const work *w = h->w;
    const scene *s = w->scene;
    const long width = b->head_width * size_of(w->form), sides = 2 * b->kv_heads, all_panels = skinny_panel_count(b->qkv.out);
    const int own = whole_heads(h, b);
    float *wide = w->scratch + h->thread * w->own;
    if (!own) meet(h);
    for (long i = own ? 0 : start(h, w->rows * sides); i < (own ? w->rows * sides : stop(h, w->rows * sides)); i++) {
        const long row = i / sides, side = i % sides, panel = (b->heads + side) * b->head_width / 16;
        if (own && (panel < start(h, all_panels) || panel >= stop(h, all_panels))) continue;
        const long slot = s->base + s->pending - s->queries + row % s->queries;
        const char *from = w->projected + (row * (b->heads + sides) + b->heads + side) * width;
        char *to = c->data + ((row / s->queries * c->sides + side) * w->slots + slot) * width;
        if (side >= b->kv_heads) memcpy(to, from, width);
        else turn(&b->k, from, angle(w, s->cos, row, width), angle(w, s->sin, row, width), to, b->head_width, w->form, wide);
    }
    meet(h);
}

static layout laid_out(const work *w, const block *b) {
    const scene *s = w->scene;
    const long width = b->head_width, row = (b->heads + 2 * b->kv_heads) * width, head = w->slots * width;
    return (layout){
        .batch = s->batch, .heads = b->heads, .kv_heads = b->kv_heads, .queries = s->queries, .keys = s->base + s->pending,
        .width = width, .q_batch = s->queries * row, .q_head = width, .q_row = row,
        .k_batch = 2 * b->kv_heads * head, .k_head = head, .k_row = width,
        .v_batch = 2 * b->kv_heads * head, .v_head = head, .v_row = width,
    };
}

static void mix(const hand *h, const block *b, const cache *c) {
    const work *w = h->w;
    const layout at = laid_out(w, b);
    const long inner = b->out.in;
    const turner owner = {w, b};
    attention a = {.at = &at, .views = w->views[b - w->blocks], .form = w->form, .y_form = w->words};
    a.prepare = turn_query;
    a.owner = &owner;
    a.q = w->projected;
    a.k = c->data;
    a.v = c->data + b->kv_heads * at.k_head * size_of(w->form);
    a.y = (char *)w->mixed;
    a.y_row = skinny_pitch(inner) * (long)sizeof(float) / size_of(w->words);
    a.scale = 1.0f / sqrtf((float)b->head_width);
    plan_attention(&a, h->threads);
    attend_units(&a, start(h, a.units), stop(h, a.units), w->scratch + h->thread * w->own);
    for (long r = start(h, w->rows); r < stop(h, w->rows); r++) end_row(w, word_row(w->mixed, r, inner), inner);
    meet(h);
}

/* The sum so far += the layer of `words`, a thread's own outputs. */
static void add(const hand *h, const layer *l, const float *words) {
    const work *w = h->w;
    const long all_panels = skinny_panel_count(l->out), first = start(h, all_panels), last = stop(h, all_panels);
    panels(h, l, words, w->more, first, last);
    const long from = first * 16, to = last * 16 < l->out ? last * 16 : l->out;
    for (long r = 0; r < w->rows; r++) {
        const long offset = (r * l->out + from) * size_of(w->form);
        EACH(i, n, to - from)
            store(w->y + offset, i, n, fetch(w->y + offset, i, n, w->form) + fetch(w->more + offset, i, n, w->form), w->form);
    }
    meet(h);
}

/* SwiGLU of gate and up, or the exact GELU, as words. */
static void activate(const hand *h, const block *b, const float *normed) {
    const work *w = h->w;
    const long hidden = b->down.in, count = skinny_panel_count(hidden), first = start(h, count), last = stop(h, count);
    panels(h, &b->up, normed, w->projected, first, last);
    if (b->gated && hidden % 16 == 0) panels(h, &b->up, normed, w->projected, count + first, count + last);
    else if (b->gated) { /* gate's last panel is up's first */
        const long rest = skinny_panel_count(b->up.out) - count;
        panels(h, &b->up, normed, w->projected, count + start(h, rest), count + stop(h, rest));
        meet(h);
    }
    const long from = first * 16, to = last * 16 < hidden ? last * 16 : hidden;
    for (long r = 0; r < w->rows; r++) {
        const char *up = w->projected + (r * b->up.out + from) * size_of(w->form);
        char *row = word_row(w->active, r, hidden), *y = row + from * size_of(w->words);
        EACH(i, n, to - from) {
            const vec x = fetch(up, i, n, w->form);
            store(y, i, n, b->gated ? swish(x) * fetch(up, hidden + i, n, w->form) : gelu(x), w->words);
        }
        if (first < last && to == hidden) end_row(w, row, hidden);
    }
    meet(h);
}

static const char *embedding(const steps *c, long row, long bytes) {
    const long queries = c->scene->queries;
    return (const char *)c->table + c->tokens[row / queries * c->token_row + row % queries] * bytes;
}

/* Two rows side by side, each normed for itself or as it is, through a layer: of few rows each thread makes its own words. */
static void enter(const hand *h) {
    const work *w = h->w;
    const joint *j = w->c->join;
    const long width = w->width, bytes = width * size_of(w->form), queries = w->scene->queries, count = skinny_panel_count(width);
    const int shared = w->rows > OWN_NORMS;
    float *joined = w->joined + (shared ? 0 : h->thread * w->rows * skinny_pitch(2 * width));
    for (long r = shared ? start(h, w->rows) : 0; r < (shared ? stop(h, w->rows) : w->rows); r++) {
        const long read = j->reads ? j->reads[r] : r % queries;
        const char *sides[2] = {embedding(w->c, r, bytes), (const char *)j->from + (r / queries * j->sources + read) * bytes};
        const norm *by[2] = {j->embed, j->hidden};
        char *to = word_row(joined, r, 2 * width);
        for (int side = 0; side < 2; side++, to += width * size_of(w->words))
            if (by[side]->weight) normalise(by[side], sides[side], w->form, to, w->words, width);
            else EACH(i, n, width) store(to, i, n, fetch(sides[side], i, n, w->form), w->words);
        end_row(w, word_row(joined, r, 2 * width), 2 * width);
    }
    if (shared) meet(h);
    panels(h, j->layer, joined, w->y, start(h, count), stop(h, count));
    meet(h);
}

/* The last tokens' scores: normed rows through the unembedding. */
static void leave(const hand *h) {
    const work *w = h->w;
    const steps *c = w->c;
    const long width = w->width, bytes = width * size_of(w->form), queries = w->scene->queries, rows = w->scene->batch * c->tail;
    const long count = skinny_panel_count(c->head->out);
    const int shared = w->rows > OWN_NORMS; /* as the memory is laid out */
    float *normed = w->normed + (shared ? 0 : h->thread * w->rows * skinny_pitch(width));
    for (long r = shared ? start(h, rows) : 0; r < (shared ? stop(h, rows) : rows); r++) {
        const char *from = w->y + (r / c->tail * queries + queries - c->tail + r % c->tail) * bytes;
        char *to = word_row(normed, r, width);
        normalise(c->last, from, w->form, to, w->words, width);
        end_row(w, to, width);
        if (c->final && (shared || h->thread == 0)) normalise(c->last, from, w->form, (char *)c->final + r * bytes, w->form, width);
    }
    if (shared) meet(h);
    skinny_panels(c->head->weight, c->head->bias, normed, c->scores, rows, width, c->head->out, w->bf16, start(h, count),
                  stop(h, count));
}

static void run(const hand *h) {
    const work *w = h->w;
    if (w->c->join) enter(h);
    for (const block *b = w->blocks; b < w->end; b++) {
        const cache *c = w->caches + (b - w->blocks);
        const long qkv = skinny_panel_count(b->qkv.out);
        panels(h, &b->qkv, norm_rows(h, &b->mixer), w->projected, start(h, qkv), stop(h, qkv));
        place_heads(h, b, c);
        mix(h, b, c);
        add(h, &b->out, w->mixed);
        activate(h, b, norm_rows(h, &b->mlp));
        add(h, &b->down, w->active);
    }
    if (w->c->last) leave(h);
}

static void *take(char **memory, long bytes) {
    char *taken = *memory;
    *memory += (bytes + 63) / 64 * 64;
    return taken;
}

static long more(long a, long b) { return a > b ? a : b; }

/* Lays the call's memory out from `memory` on and returns its end; makes what blocks see where `memory` is real. */
static char *lay_out(work *w, char *memory, int threads, int real) {
    const scene *s = w->scene;
    const long size = size_of(w->form), depth = w->end - w->blocks;
    long widest = 0, mixed = 0, active = 0, own = 0;
    w->views = take(&memory, depth * sizeof(view *));
    for (const block *b = w->blocks; b < w->end; b++) {
        const layout at = laid_out(w, b);
        attention a = {.at = &at};
        widest = more(widest, more(b->qkv.out, b->up.out));
        mixed = more(mixed, skinny_pitch(b->out.in));
        active = more(active, skinny_pitch(b->down.in));
        for (int n = 1; n <= threads; n++) { /* the system may give fewer than asked for */
            plan_attention(&a, n);
            own = more(own, more(attention_memory(&a), b->head_width));
        }
        const long window = sight_window(s, b->window);
        const block *same = w->blocks;
        while (sight_window(s, same->window) != window) same++;
        if (real && same < b) w->views[b - w->blocks] = w->views[same - w->blocks];
        if (same < b) continue;
        char *sight = take(&memory, sight_memory(s, window));
        if (real) w->views[b - w->blocks] = look(s, window, sight);
    }
    w->own = (own + 31) / 16 * 16;
    w->projected = take(&memory, w->rows * widest * size);
    w->more = take(&memory, w->rows * w->width * size);
    w->normed = take(&memory, (w->rows > OWN_NORMS ? 1 : threads) * w->rows * skinny_pitch(w->width) * sizeof(float));
    w->joined = take(&memory, w->c->join ? (w->rows > OWN_NORMS ? 1 : threads) * w->rows * skinny_pitch(2 * w->width) * sizeof(float) : 0);
    w->mixed = take(&memory, w->rows * mixed * sizeof(float));
    w->active = take(&memory, w->rows * active * sizeof(float));
    w->scratch = take(&memory, threads * w->own * sizeof(float));
    return memory;
}

static int threads_for(const work *w) {
    long work_of_all = 0;
    for (const block *b = w->blocks; b < w->end; b++)
        work_of_all += b->qkv.in * b->qkv.out + b->out.in * b->out.out + b->up.in * b->up.out + b->down.in * b->down.out;
    return forked || w->scene->threads < 1 || w->rows * work_of_all < (w->end - w->blocks) * WORTH ? 1 : w->scene->threads;
}

/* Where the call begins, unless it is joined. 0, or BAD_TOKEN; nothing written then. */
static int begin(const work *w) {
    const steps *c = w->c;
    const long bytes = w->width * size_of(w->form);
    for (long r = 0; !c->x && r < w->rows; r++) {
        const int64_t token = c->tokens[r / c->scene->queries * c->token_row + r % c->scene->queries];
        if (token < 0 || token >= c->vocab) return BAD_TOKEN;
    }
    if (c->x) memcpy(w->y, c->x, w->rows * bytes);
    else if (!c->join)
        for (long r = 0; r < w->rows; r++) memcpy(w->y + r * bytes, embedding(c, r, bytes), bytes);
    return 0;
}

/* Caches [batch, keys then values of kv_heads, slots, head_width]. Returns 0; what is out of range, nothing written; or NO_MEMORY:
 * nothing written. */
int run_steps(const steps *c) {
    const scene *s = c->scene;
    const block *blocks = c->blocks;
    work w = {.c = c, .blocks = blocks, .end = blocks + c->depth, .caches = c->caches, .scene = s, .rows = s->batch * s->queries,
              .width = c->width, .slots = c->slots, .bf16 = c->bf16, .form = stored(c->bf16), .words = skinny_form(c->bf16), .y = c->y};
    const int bad = check_scene(s), threads = threads_for(&w);
    if (bad) return bad;
    const long angles = (w.rows * (long)sizeof(int64_t) + 63) / 64 * 64;
    char *memory = malloc(lay_out(&w, NULL, threads, 0) - (char *)NULL + angles + 64);
    if (!memory) return NO_MEMORY;
    int64_t *turns = (int64_t *)(((uintptr_t)memory + 63) & ~(uintptr_t)63);
    place(s, turns);
    w.angles = turns;
    int failed = begin(&w);
    for (long r = 0; s->cos && r < w.rows && !failed; r++) failed = turns[r] < 0 ? BAD_POSITION : 0;
    if (failed) {
        free(memory);
        return failed;
    }
    lay_out(&w, (char *)turns + angles, threads, 1);
#ifdef _OPENMP
    meeting at = {0};
#pragma omp parallel num_threads(threads) if (threads > 1)
    run(&(hand){&w, &at, omp_get_thread_num(), omp_get_num_threads()});
#else
    run(&(hand){&w, NULL, 0, 1});
#endif
    free(memory);
    return 0;
}
