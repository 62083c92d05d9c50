/* Decode attention: y = softmax(scale q k') v for a few queries of each sequence over a cache of keys and values.
 *
 * Order. A score is one chain of multiply-adds per lane over the head's width, then a fixed tree over the lanes. The maximum is
 * exact. The sum of exponentials and each output are one chain over keys in slot order, to which a hidden key adds exactly
 * nothing. So a query's result depends on the keys it sees and their order alone: not on hidden slots between or behind them (a
 * tree's other nodes, another row's padding, the cache's capacity), nor on the queries, rows and threads that share the call.
 *
 * This file knows nothing of tensors, of trees or of positions. */
#include "calls.h"
#include "vector.h"

enum { BLOCK = 16, SUMS = 8 }; /* keys widened to fp32 at a time; vectors of sums that a tile keeps in registers */

typedef struct {
    const layout *at;
    const char *q, *k, *v;
    const uint8_t *visible;
    char *y;
    float scale;
    int bf16;
    long share;  /* columns of one kv head: its query heads x queries */
    long padded; /* width rounded up to whole vectors */
} call;

typedef uint16_t narrow __attribute__((vector_size(2 * LANES)));

typedef struct { /* one thread's memory */
    float *queries, *block, *scores, *outputs, *totals;
    int32_t *slots;
} scratch;

static long whole(long n) { return (n + LANES - 1) / LANES * LANES; }

static void widen(const char *from, int bf16, long width, float *to) {
    if (!bf16) {
        memcpy(to, from, width * sizeof(float));
        return;
    }
    long e = 0;
    for (; e + LANES <= width; e += LANES) {
        narrow n;
        memcpy(&n, from + 2 * e, sizeof n);
        const bits wide = __builtin_convertvector(n, bits) << 16;
        memcpy(to + e, &wide, sizeof wide);
    }
    for (; e < width; e++) ((uint32_t *)to)[e] = (uint32_t)((const uint16_t *)from)[e] << 16;
}

/* The sums over lanes of eight vectors. */
INLINE void sum_lanes(const vec *a, float *sums) {
#if LANES >= 8
    __m256 s[SUMS];
#pragma GCC unroll 8
    for (int i = 0; i < SUMS; i++)
#if LANES == 16
        s[i] = _mm512_castps512_ps256(a[i]) + _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a[i]), 1));
#else
        s[i] = a[i];
#endif
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(s[4], s[5]), _mm256_hadd_ps(s[6], s[7]));
    _mm256_storeu_ps(sums, _mm256_permute2f128_ps(low, high, 0x20) + _mm256_permute2f128_ps(low, high, 0x31));
#else
    for (int i = 0; i < SUMS; i++) sums[i] = (a[i][0] + a[i][1]) + (a[i][2] + a[i][3]);
#endif
}

/* Scores of queries x keys, eight together; both are constants once inlined. */
INLINE void score(const int queries, const int keys, const float *q, const float *k, long padded, float *scores, long pitch) {
    vec a[SUMS];
    float sums[SUMS];
#pragma GCC unroll 8
    for (int i = 0; i < SUMS; i++) a[i] = all(0.0f);
    for (long e = 0; e < padded; e += LANES) {
        vec b[SUMS];
#pragma GCC unroll 8
        for (int i = 0; i < queries; i++) {
            b[i] = (vec)load(q + i * padded + e);
            KEEP(b[i]);
        }
#pragma GCC unroll 8
        for (int j = 0; j < keys; j++) {
            vec key = (vec)load(k + j * padded + e);
            if (queries > 1) KEEP(key);
#pragma GCC unroll 8
            for (int i = 0; i < queries; i++) a[j * queries + i] = multiply_add(key, b[i], a[j * queries + i]);
        }
    }
    sum_lanes(a, sums);
#pragma GCC unroll 8
    for (int j = 0; j < keys; j++) memcpy(scores + j * pitch, sums + j * queries, queries * sizeof(float));
}

/* outputs [queries, vectors] += weights of `count` keys times their values; queries and vectors are constants once inlined. */
INLINE void gather(const int queries, const int vectors, const float *weights, long pitch, const float *v, long count,
                   long padded, float *outputs) {
    vec a[4][SUMS];
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 8
        for (int e = 0; e < vectors; e++) a[i][e] = (vec)load(outputs + i * padded + e * LANES);
    for (; count > 0; count--, v += padded, weights += pitch) {
        vec b[SUMS];
#pragma GCC unroll 8
        for (int e = 0; e < vectors; e++) {
            b[e] = (vec)load(v + e * LANES);
            if (queries > 1) KEEP(b[e]);
        }
#pragma GCC unroll 4
        for (int i = 0; i < queries; i++) {
            const vec p = broadcast(weights + i);
#pragma GCC unroll 8
            for (int e = 0; e < vectors; e++) a[i][e] = multiply_add(p, b[e], a[i][e]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 8
        for (int e = 0; e < vectors; e++) memcpy(outputs + i * padded + e * LANES, &a[i][e], sizeof(vec));
}

/* A kv head's queries [share, padded] against a block of keys. */
static void score_block(const call *c, const float *q, const float *block, float *scores, long pitch) {
    long i = 0;
    for (; i + 4 <= c->share; i += 4)
        for (int j = 0; j < BLOCK; j += 2)
            score(4, 2, q + i * c->padded, block + j * c->padded, c->padded, scores + j * pitch + i, pitch);
    for (; i < c->share; i++)
        for (int j = 0; j < BLOCK; j += 8)
            score(1, 8, q + i * c->padded, block + j * c->padded, c->padded, scores + j * pitch + i, pitch);
}

/* Its outputs [share, padded] += weights of a block's `count` keys times their values. */
static void gather_block(const call *c, const float *weights, long pitch, const float *block, long count, float *outputs) {
    const long padded = c->padded;
    for (long i = 0, rows; i < c->share; i += rows, weights += rows, outputs += rows * padded) {
        rows = c->share - i >= 4 ? 4 : 1;
        for (long e = 0, vectors; e < padded; e += vectors * LANES) {
            const long left = (padded - e) / LANES;
            vectors = rows == 4 ? (left >= 2 ? 2 : 1) : left >= 8 ? 8 : left >= 4 ? 4 : 1;
            float *to = outputs + e;
            if (rows == 4 && vectors == 2) gather(4, 2, weights, pitch, block + e, count, padded, to);
            else if (rows == 4) gather(4, 1, weights, pitch, block + e, count, padded, to);
            else if (vectors == 8) gather(1, 8, weights, pitch, block + e, count, padded, to);
            else if (vectors == 4) gather(1, 4, weights, pitch, block + e, count, padded, to);
            else gather(1, 1, weights, pitch, block + e, count, padded, to);
        }
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
        for (long t = 0; t < c->at->queries && !seen; t++)
            seen = c->visible[b * c->at->visible_batch + t * c->at->visible_row + s];
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
    memset(to, 0, c->share * c->padded * sizeof(float));
    for (long i = 0; i < c->share; i++, to += c->padded) {
        const long head = g * (at->heads / at->kv_heads) + i / at->queries, t = i % at->queries;
        widen(c->q + (b * at->q_batch + head * at->q_head + t * at->q_row) * (c->bf16 ? 2 : 4), c->bf16, at->width, to);
        for (long e = 0; e < at->width; e++) to[e] *= c->scale;
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
    for (long j = 0; j < count; j++)
        widen(rows + slots[j] * row * (c->bf16 ? 2 : 4), c->bf16, c->at->width, block + j * c->padded);
}

/* kv heads first..last of sequence b, side by side in the columns of scores. */
static void attend(const call *c, long b, long first, long last, long pitch, const scratch *m) {
    const layout *at = c->at;
    const long size = c->bf16 ? 2 : 4, columns = (last - first) * c->share, n = list_slots(c, b, m->slots);
    memset(m->block, 0, BLOCK * c->padded * sizeof(float)); /* the padding of its rows stays zero */
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
    const long groups = (at->kv_heads + group - 1) / group, pitch = whole(group * c->share);
    const long rows = c->share * c->padded, scores = (at->keys + BLOCK) * pitch;
    float *memory = malloc((2 * rows + BLOCK * c->padded + scores + pitch + at->keys + 1) * sizeof(float));
    if (!memory) return -1;
    scratch m = {.queries = memory, .outputs = memory + rows};
    m.block = m.outputs + rows;
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
int decode_attention(const void *q, const void *k, const void *v, const void *visible, void *y, const layout *at, float scale,
                     int bf16, int threads) {
    call c = {.at = at, .q = q, .k = k, .v = v, .visible = visible, .y = y, .scale = scale, .bf16 = bf16};
    c.share = at->heads / at->kv_heads * at->queries;
    c.padded = whole(at->width);
    const long pairs = at->batch * at->kv_heads;
    if (forked || threads > pairs || pairs * c.share * at->keys * at->width < PARALLEL) threads = 1;
    long group = LANES / (c.share ? c.share : 1); /* kv heads together, so that few queries still fill the vectors of soften */
    if (group > pairs / threads) group = pairs / threads;
    if (group > at->kv_heads) group = at->kv_heads;
    if (group < 1) group = 1;
    const long units = at->batch * ((at->kv_heads + group - 1) / group);
#ifdef _OPENMP
    if (threads > 1) {
        int failed = 0;
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
