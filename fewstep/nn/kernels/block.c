/* A decoder block's step: x + attention(norm(x)), then x + MLP(norm(x)), for a few rows over a cache of keys and values.
 *
 * Rounding. What is stored has the activations' type: norms, projections, turned queries and keys, attention, activations and
 * both sums are rounded once each; in between all is fp32. PyTorch's operators round more often within a norm, a turn and an
 * activation.
 *
 * Order. Every stage works on one row at a time, its sum of squares in one fixed order, beside `skinny_linear` and
 * `decode_attention`, whose rows do not depend on one another either: so a row's result is bitwise the same alone or among others.
 *
 * This file knows nothing of tensors, of trees or of how positions become angles. */
#include "calls.h"
#include "vector.h"

typedef uint16_t halves __attribute__((vector_size(2 * LANES)));

typedef struct {
    const void *weight;
    const float *bias;
    long in, out;
} layer;

typedef struct {
    const float *weight; /* NULL: no norm */
    float eps;
} norm;

typedef struct { /* one per layer of the model, made once */
    layer qkv, out, up, down;
    norm mixer, mlp, q, k;
    long heads, kv_heads, head_width;
    int gated, bf16;
} block;

typedef struct { /* one per call of the model */
    long batch, queries, start; /* keys and values go to slots start .. start + queries - 1, the last ones used */
    const char *visible;        /* bytes [batch, queries, slots]; NULL: all */
    long visible_batch, visible_row; /* strides in elements */
    const char *cos, *sin;           /* [batch, queries, head_width]; NULL: nothing turns */
    long turn_batch, turn_row;
    int threads;
} call;

/* Elements i .. i+n-1 of a row as fp32, zeros behind them; n < LANES at a row's end only. */
INLINE vec fetch(const void *row, long i, long n, int bf16) {
    const long size = bf16 ? 2 : 4;
    const char *from = (const char *)row + i * size;
    char tail[4 * LANES] = {0};
    if (n < LANES) from = memcpy(tail, from, n * size);
    if (!bf16) return (vec)load(from);
    halves h;
    memcpy(&h, from, sizeof h);
    return (vec)(__builtin_convertvector(h, bits) << 16);
}

INLINE void store(void *row, long i, long n, vec v, int bf16) {
    char *to = (char *)row + i * (bf16 ? 2 : 4);
    bits u = (bits)v;
    if (!bf16) {
        memcpy(to, &u, n < LANES ? n * 4 : (long)sizeof u);
        return;
    }
    const mask number = v == v;
    u = ((u + 0x7fff + (u >> 16 & 1)) >> 16 & (bits)number) | (0x7fc0 & ~(bits)number); /* to nearest, ties to even */
    const halves h = __builtin_convertvector(u, halves);
    memcpy(to, &h, n < LANES ? n * 2 : (long)sizeof h);
}

#define EACH(i, n, width) for (long i = 0, n; (n = (width)-i < LANES ? (width)-i : LANES) > 0; i += LANES)

static float sum(vec v) {
    float s[LANES];
    memcpy(s, &v, sizeof s);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) s[i] += s[i + n];
    return s[0];
}

/* y = x weight / sqrt(mean(x x) + eps) for one row; y may be x. */
static void normalise(const norm *by, const void *x, int x_bf16, void *y, int y_bf16, long width) {
    vec squares = all(0.0f);
    EACH(i, n, width) {
        const vec v = fetch(x, i, n, x_bf16);
        squares = multiply_add(v, v, squares);
    }
    const vec scale = all(1.0f / sqrtf(sum(squares) / (float)width + by->eps));
    EACH(i, n, width) store(y, i, n, fetch(x, i, n, x_bf16) * scale * fetch(by->weight, i, n, 0), y_bf16);
}

/* x [rows, width] and y alike, both bf16 or both fp32; weight [width]. */
void rms_norm(const void *x, const float *weight, void *y, long rows, long width, float eps, int bf16) {
    const norm by = {weight, eps};
    const long pitch = width * (bf16 ? 2 : 4);
    for (long r = 0; r < rows; r++) normalise(&by, (const char *)x + r * pitch, bf16, (char *)y + r * pitch, bf16, width);
}

/* One head [width], normed and turned: channels (i, i + width/2) are a pair, `sin` carries the sign. `to` may be `from`;
 * `wide` holds `width` floats. */
static void turn(const norm *by, const void *from, const void *cos, const void *sin, void *to, long width, int bf16, float *wide) {
    if (by->weight) normalise(by, from, bf16, wide, 0, width);
    else EACH(i, n, width) store(wide, i, n, fetch(from, i, n, bf16), 0);
    if (!cos) {
        EACH(i, n, width) store(to, i, n, fetch(wide, i, n, 0), bf16);
        return;
    }
    const long half = width / 2;
    for (long side = 0; side < width; side += half)
        EACH(i, n, half) {
            const vec own = fetch(wide, side + i, n, 0), other = fetch(wide, half - side + i, n, 0);
            const vec turned = multiply_add(own, fetch(cos, side + i, n, bf16), other * fetch(sin, side + i, n, bf16));
            store(to, side + i, n, turned, bf16);
        }
}

/* Queries turned in place; keys turned and values as they are into the cache. */
static void place(const block *b, const call *c, char *qkv, char *cache, long slots, float *wide) {
    const long size = b->bf16 ? 2 : 4, width = b->head_width, all_heads = b->heads + b->kv_heads;
    for (long row = 0; row < c->batch * c->queries; row++) {
        const long sequence = row / c->queries, t = row % c->queries, angle = sequence * c->turn_batch + t * c->turn_row;
        const char *cos = c->cos ? c->cos + angle * size : NULL, *sin = c->cos ? c->sin + angle * size : NULL;
        char *slot = cache + (sequence * 2 * b->kv_heads * slots + c->start + t) * width * size;
        for (long head = 0; head < b->heads; head++, qkv += width * size) turn(&b->q, qkv, cos, sin, qkv, width, b->bf16, wide);
        for (long head = b->heads; head < all_heads; head++, qkv += width * size, slot += slots * width * size)
            turn(&b->k, qkv, cos, sin, slot, width, b->bf16, wide);
        for (long head = 0; head < b->kv_heads; head++, qkv += width * size, slot += slots * width * size)
            memcpy(slot, qkv, width * size);
    }
}

static int attend(const block *b, const call *c, const char *q, const char *cache, long slots, char *y) {
    const long width = b->head_width, row = (b->heads + 2 * b->kv_heads) * width, head = slots * width;
    const layout at = {
        .batch = c->batch, .heads = b->heads, .kv_heads = b->kv_heads, .queries = c->queries, .keys = c->start + c->queries,
        .width = width, .q_batch = c->queries * row, .q_head = width, .q_row = row,
        .k_batch = 2 * b->kv_heads * head, .k_head = head, .k_row = width,
        .v_batch = 2 * b->kv_heads * head, .v_head = head, .v_row = width,
        .visible_batch = c->visible_batch, .visible_row = c->visible_row,
    };
    const char *values = cache + b->kv_heads * head * (b->bf16 ? 2 : 4);
    return decode_attention(q, cache, values, c->visible, y, &at, 1.0f / sqrtf((float)width), b->bf16, c->threads);
}

/* erf to a few units in the last place: the minimax quotient of odd and even polynomials that Eigen uses. */
INLINE vec error_function(vec x) {
    const vec limit = all(4.0f);
    x = choose(x > limit, limit, choose(x < -limit, -limit, x));
    const vec square = x * x;
    vec p = all(-2.72614225801306e-10f), q = all(-1.45660718464996e-05f);
    p = multiply_add(p, square, all(2.77068142495902e-08f));
    p = multiply_add(p, square, all(-2.10102402082508e-06f));
    p = multiply_add(p, square, all(-5.69250639462346e-05f));
    p = multiply_add(p, square, all(-7.34990630326855e-04f));
    p = multiply_add(p, square, all(-2.95459980854025e-03f));
    p = multiply_add(p, square, all(-1.60960333262415e-02f));
    q = multiply_add(q, square, all(-2.13374055278905e-04f));
    q = multiply_add(q, square, all(-1.68282697438203e-03f));
    q = multiply_add(q, square, all(-7.37332916720468e-03f));
    q = multiply_add(q, square, all(-1.42647390514189e-02f));
    return x * p / q;
}

/* One row: SwiGLU of gate and up, or the exact GELU. */
static void activate(const block *b, const void *up, void *to) {
    const long hidden = b->down.in;
    const vec one = all(1.0f);
    EACH(i, n, hidden) {
        const vec x = fetch(up, i, n, b->bf16);
        vec y;
        if (b->gated) y = x / (one + exponential(-x)) * fetch(up, hidden + i, n, b->bf16);
        else y = all(0.5f) * x * (one + error_function(x * all(0x1.6a09e6p-1f)));
        store(to, i, n, y, b->bf16);
    }
}

static void add(const void *x, const void *more, void *y, long count, int bf16) {
    EACH(i, n, count) store(y, i, n, fetch(x, i, n, bf16) + fetch(more, i, n, bf16), bf16);
}

static int apply(const layer *l, const block *b, const void *x, void *y, long rows, int threads) {
    return skinny_linear(l->weight, l->bias, x, y, rows, l->in, l->out, b->bf16, b->bf16, threads);
}

/* x and y [batch, queries, width], cache [batch, keys then values of kv_heads, slots, head_width], weights: all bf16 or all fp32.
 * Returns 0, or -1 where memory is lacking: the slots may then have been written, y is undefined. */
int block_step(const block *b, const call *c, const void *x, void *y, char *cache, long slots) {
    const long rows = c->batch * c->queries, width = b->qkv.in, size = b->bf16 ? 2 : 4;
    const long wide = b->qkv.out > b->up.out ? b->qkv.out : b->up.out, narrow = b->out.in > b->down.in ? b->out.in : b->down.in;
    char *memory = malloc((rows * (width + wide + narrow) + 1) * size + b->head_width * sizeof(float));
    if (!memory) return -1;
    float *head = (float *)memory; /* first, where it is aligned */
    char *normed = memory + b->head_width * sizeof(float), *projected = normed + rows * width * size;
    char *inner = projected + rows * wide * size;

    rms_norm(x, b->mixer.weight, normed, rows, width, b->mixer.eps, b->bf16);
    int failed = apply(&b->qkv, b, normed, projected, rows, c->threads);
    if (!failed) {
        place(b, c, projected, cache, slots, head);
        failed = attend(b, c, projected, cache, slots, inner) || apply(&b->out, b, inner, normed, rows, c->threads);
    }
    if (!failed) {
        add(x, normed, y, rows * width, b->bf16);
        rms_norm(y, b->mlp.weight, normed, rows, width, b->mlp.eps, b->bf16);
        failed = apply(&b->up, b, normed, projected, rows, c->threads);
    }
    if (!failed) {
        for (long r = 0; r < rows; r++) activate(b, projected + r * b->up.out * size, inner + r * b->down.in * size);
        failed = apply(&b->down, b, inner, normed, rows, c->threads);
    }
    if (!failed) add(y, normed, y, rows * width, b->bf16);
    free(memory);
    return failed ? -1 : 0;
}
