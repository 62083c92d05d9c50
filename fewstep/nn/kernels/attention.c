/* Decode attention: y = softmax(scale q k') v for a few queries of each sequence over a cache of keys and values.
 *
 * Order. A score is one chain of multiply-adds over the head's width. The maximum is exact. The sum of exponentials and each
 * output are one chain over keys in slot order, to which a hidden key adds exactly nothing. So a query's result depends on the
 * keys it sees and their order alone: not on hidden slots between or behind them (a tree's other nodes, another row's padding,
 * the cache's capacity), nor on the queries, rows and threads that share the call.
 *
 * This file knows nothing of tensors, of trees or of positions. */
#include "calls.h"
#include "vector.h"

enum { BLOCK = 16, MAX_ROWS = 8, MAX_VECTORS = 2 }; /* keys widened to fp32 at a time; sums a tile keeps */

typedef struct {
    const layout *at;
    const char *q, *k, *v;
    const uint8_t *visible;
    char *y;
    float scale;
    int bf16;
    long share;   /* columns of one kv head: its query heads x queries */
    long columns; /* share rounded up to whole vectors */
    long padded;  /* width rounded up to whole vectors */
} call;

typedef struct { /* one thread's memory */
    float *queries, *block, *scores, *outputs, *totals;
    int32_t *slots;
} scratch;

static long whole(long n) { return (n + LANES - 1) / LANES * LANES; }

INLINE void widen(const char *from, int bf16, long width, float *to) {
    if (!bf16) memcpy(to, from, width * sizeof(float));
    else for (long e = 0; e < width; e++) ((uint32_t *)to)[e] = (uint32_t)((const uint16_t *)from)[e] << 16;
}

/* sums [rows, vectors] += left[r, i] right[i, vectors] over i < count: rows are keys and i runs over the width (scores), or rows
 * are queries and i runs over keys (outputs). rows and vectors are constants once inlined. */
INLINE void multiply(const int rows, const int vectors, const float *left, long left_row, long left_step, const float *right,
                     long right_step, long count, float *sums, long pitch, const int fresh) {
    vec a[MAX_ROWS][MAX_VECTORS];
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) a[r][v] = fresh ? all(0.0f) : (vec)load(sums + r * pitch + v * LANES);
    for (long i = 0; i < count; i++, left += left_step, right += right_step) {
        vec b[MAX_VECTORS];
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            b[v] = (vec)load(right + v * LANES);
            KEEP(b[v]);
        }
#pragma GCC unroll 8
        for (int r = 0; r < rows; r++) {
            const vec p = broadcast(left + r * left_row);
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) a[r][v] = multiply_add(p, b[v], a[r][v]);
        }
    }
#pragma GCC unroll 8
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) memcpy(sums + r * pitch + v * LANES, &a[r][v], sizeof(vec));
}

/* Scores of a block of keys against a kv head's queries [width, columns]. */
static void score_block(const call *c, const float *q, const float *block, float *scores, long pitch) {
    long i = 0;
    for (; i + 2 * LANES <= c->columns; i += 2 * LANES)
        for (int j = 0; j < BLOCK; j += 4)
            multiply(4, 2, block + j * c->padded, c->padded, 1, q + i, c->columns, c->at->width, scores + j * pitch + i, pitch, 1);
    if (i < c->columns)
        for (int j = 0; j < BLOCK; j += 8)
            multiply(8, 1, block + j * c->padded, c->padded, 1, q + i, c->columns, c->at->width, scores + j * pitch + i, pitch, 1);
}

/* outputs [share, padded] += weights of `count` keys times their values. */
static void gather_block(const call *c, const float *weights, long pitch, const float *block, long count, float *outputs) {
    const long padded = c->padded;
    long i = 0;
    for (; i + 4 <= c->share; i += 4) {
        long e = 0;
        for (; e + 2 * LANES <= padded; e += 2 * LANES)
            multiply(4, 2, weights + i, 1, pitch, block + e, padded, count, outputs + i * padded + e, padded, 0);
        if (e < padded) multiply(4, 1, weights + i, 1, pitch, block + e, padded, count, outputs + i * padded + e, padded, 0);
    }
    for (; i < c->share; i++) {
        long e = 0;
        for (; e + 2 * LANES <= padded; e += 2 * LANES)
            multiply(1, 2, weights + i, 1, pitch, block + e, padded, count, outputs + i * padded + e, padded, 0);
        if (e < padded) multiply(1, 1, weights + i, 1, pitch, block + e, padded, count, outputs + i * padded + e, padded, 0);
    }
}

/* Scores [n, pitch] become weights, a column a query: exponentials relative to the column's maximum; totals are their sums. */
static void soften(float *scores, long n, long columns, long pitch, float *totals) {
    for (long column = 0; column < columns; column += LANES) {
        vec top = all(-INFINITY), total = all(0.0f);
        for (long s = 0; s < n; s++) {
            const vec x = (vec)load(scores + s * pitch + column);
            top = choose(x > top, x, top);
        }
        top = choose(top == all(-INFINITY), all(0.0f), top); /* a query that sees no key: all its weights are zero */
        for (long s = 0; s < n; s++) {
            const vec weight = exponential((vec)load(scores + s * pitch + column) - top);
            memcpy(scores + s * pitch + column, &weight, sizeof weight);
            total += weight;
        }
        memcpy(totals + column, &total, sizeof total);
    }
}

/* The slots of sequence b that any of its queries sees, in order. */
static long list_slots(const call *c, long b, int32_t *slots) {
    long n = 0;
    for (long s = 0; s < c->at->keys; s++) {
        int seen = !c->visible;
        for (long t = 0; t < c->at->queries && !seen; t++) seen = c->visible[b * c->at->visible_batch + t * c->at->visible_row + s];
        slots[n] = (int32_t)s;
        n += seen;
    }
    return n;
}

static void hide(const call *c, long b, const int32_t *slots, long n, long columns, float *scores, long pitch) {
    for (long t = 0; t < c->at->queries; t++) {
        const uint8_t *visible = c->visible + b * c->at->visible_batch + t * c->at->visible_row;
        for (long s = 0; s < n; s++)
            if (!visible[slots[s]])
                for (long column = t; column < columns; column += c->at->queries) scores[s * pitch + column] = -INFINITY;
    }
}

/* Row i of kv head g's share: query head g * repeat + i / queries, query i % queries. */
static void load_queries(const call *c, long b, long g, float *to) {
    const layout *at = c->at;
    memset(to, 0, at->width * c->columns * sizeof(float));
    for (long i = 0; i < c->share; i++) {
        const long head = g * (at->heads / at->kv_heads) + i / at->queries, t = i % at->queries;
        const long from = b * at->q_batch + head * at->q_head + t * at->q_row;
        for (long e = 0; e < at->width; e++) {
            float value;
            widen(c->q + (from + e) * (c->bf16 ? 2 : 4), c->bf16, 1, &value);
            to[e * c->columns + i] = value * c->scale;
        }
    }
}

static void store_outputs(const call *c, long b, long g, const float *outputs, const float *totals) {
    const layout *at = c->at;
    for (long i = 0; i < c->share; i++) {
        const long head = g * (at->heads / at->kv_heads) + i / at->queries, t = i % at->queries;
        const long to = ((b * at->queries + t) * at->heads + head) * at->width;
        const float *y = outputs + i * c->padded, total = totals[i] == 0.0f ? 1.0f : totals[i];
        for (long e = 0; e < at->width; e++) {
            if (c->bf16) ((uint16_t *)c->y)[to + e] = to_bf16(y[e] / total);
            else ((float *)c->y)[to + e] = y[e] / total;
        }
    }
}

static void load_block(const call *c, const char *rows, long row, const int32_t *slots, long count, float *block) {
    for (long j = 0; j < count; j++) widen(rows + slots[j] * row * (c->bf16 ? 2 : 4), c->bf16, c->at->width, block + j * c->padded);
}

/* kv heads first..last of sequence b, side by side in the columns of scores. A head's last vector may spill into the next
 * head's columns, which that head then overwrites. */
static void attend(const call *c, long b, long first, long last, long pitch, const scratch *m) {
    const layout *at = c->at;
    const long size = c->bf16 ? 2 : 4, columns = (last - first) * c->share, n = list_slots(c, b, m->slots);
    memset(m->block, 0, BLOCK * c->padded * sizeof(float));
    for (long g = first; g < last; g++) {
        const char *keys = c->k + (b * at->k_batch + g * at->k_head) * size;
        load_queries(c, b, g, m->queries);
        for (long s = 0; s < n; s += BLOCK) {
            load_block(c, keys, at->k_row, m->slots + s, n - s < BLOCK ? n - s : BLOCK, m->block);
            score_block(c, m->queries, m->block, m->scores + s * pitch + (g - first) * c->share, pitch);
        }
    }
    if (c->visible) hide(c, b, m->slots, n, columns, m->scores, pitch);
    soften(m->scores, n, columns, pitch, m->totals);
    for (long g = first; g < last; g++) {
        const char *values = c->v + (b * at->v_batch + g * at->v_head) * size;
        memset(m->outputs, 0, c->share * c->padded * sizeof(float));
        for (long s = 0; s < n; s += BLOCK) {
            const long count = n - s < BLOCK ? n - s : BLOCK;
            load_block(c, values, at->v_row, m->slots + s, count, m->block);
            gather_block(c, m->scores + s * pitch + (g - first) * c->share, pitch, m->block, count, m->outputs);
        }
        store_outputs(c, b, g, m->outputs, m->totals + (g - first) * c->share);
    }
}

static int attend_range(const call *c, long group, long first, long last) {
    const layout *at = c->at;
    const long groups = (at->kv_heads + group - 1) / group, pitch = whole((group - 1) * c->share + c->columns);
    const long queries = at->width * c->columns, outputs = c->share * c->padded, scores = (at->keys + BLOCK) * pitch;
    float *memory = malloc((queries + outputs + BLOCK * c->padded + scores + pitch + at->keys + 1) * sizeof(float));
    if (!memory) return -1;
    scratch m = {.queries = memory, .outputs = memory + queries};
    m.block = m.outputs + outputs;
    m.scores = m.block + BLOCK * c->padded;
    m.totals = m.scores + scores;
    m.slots = (int32_t *)(m.totals + pitch);
    for (long unit = first; unit < last; unit++) {
        const long b = unit / groups, g = unit % groups * group;
        attend(c, b, g, g + group < at->kv_heads ? g + group : at->kv_heads, pitch, &m);
    }
    free(memory);
    return 0;
}

/* q [batch, heads, queries, width], k and v [batch, kv_heads, keys, width] strided, all bf16 or all fp32; visible: bytes
 * [batch, queries, keys] or NULL; y [batch, queries, heads, width] contiguous. Returns 0, or -1 where memory is lacking. */
int decode_attention(const void *q, const void *k, const void *v, const void *visible, void *y, const layout *at, float scale, int bf16,
                     int threads) {
    call c = {.at = at, .q = q, .k = k, .v = v, .visible = visible, .y = y, .scale = scale, .bf16 = bf16};
    c.share = at->heads / at->kv_heads * at->queries;
    c.columns = whole(c.share);
    c.padded = whole(at->width);
    const long pairs = at->batch * at->kv_heads;
    if (forked || threads > pairs || pairs * c.share * at->keys * at->width < PARALLEL) threads = 1;
    long group = LANES / (c.share ? c.share : 1); /* kv heads taken together, so that few queries still fill the vectors of soften */
    if (group > pairs / threads) group = pairs / threads;
    if (group > at->kv_heads) group = at->kv_heads;
    if (group < 1) group = 1;
    const long units = at->batch * ((at->kv_heads + group - 1) / group);
    int failed = 0;
#ifdef _OPENMP
    if (threads > 1) {
#pragma omp parallel num_threads(threads) reduction(| : failed)
        {
            const long t = omp_get_thread_num(), n = omp_get_num_threads();
            failed |= attend_range(&c, group, units * t / n, units * (t + 1) / n);
        }
        return failed;
    }
#endif
    return attend_range(&c, group, 0, units);
}
