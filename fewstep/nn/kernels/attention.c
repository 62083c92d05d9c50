/* Decode attention: y = softmax(scale q k') v for a few queries of each sequence over a cache of keys and values.
 *
 * Order. A score is one chain of multiply-adds per lane over the head's width, then a fixed tree over the lanes. The maximum is
 * exact. The sum of exponentials and each output are one chain over keys in slot order, to which a hidden key adds exactly
 * nothing. So a query's result depends on the keys it sees and their order alone: not on hidden slots between or behind them (a
 * tree's other nodes, another row's padding, the cache's capacity), nor on the queries, rows and threads that share the call.
 *
 * This file knows nothing of tensors, of trees or of positions. */
#include "rows.h"

enum { BLOCK = 32, KEYS = 8 }; /* keys that all columns pass before the next; the most of a tile, some of them beyond the last */
enum { QUERIES = 3, SUMS = 12 }; /* the most columns of a tile; the most vectors of sums, as many as the registers hold */

typedef struct { /* a thread's work: columns of kv heads first .. last-1 of sequence b, and its memory */
    const view *seen;
    long b, first, last, column, columns, pitch;
    float *queries, *scores, *outputs, *totals;
} unit;

typedef float four __attribute__((vector_size(16)));

static long whole(long n) { return (n + LANES - 1) / LANES * LANES; }

/* The sums over lanes of four vectors. */
INLINE four sum_lanes(const vec *a) {
#if LANES >= 8
    __m256 s[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++)
#if LANES == 16
        s[i] = _mm512_castps512_ps256(a[i]) + _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a[i]), 1));
#else
        s[i] = a[i];
#endif
    const __m256 halves = _mm256_hadd_ps(_mm256_hadd_ps(s[0], s[1]), _mm256_hadd_ps(s[2], s[3]));
    return _mm256_castps256_ps128(halves) + _mm256_extractf128_ps(halves, 1);
#else
    four sums;
    for (int i = 0; i < 4; i++) sums[i] = (a[i][0] + a[i][1]) + (a[i][2] + a[i][3]);
    return sums;
#endif
}

/* Sums [queries, keys] += products of channels e .. e+n-1; n < LANES at a row's end only. */
INLINE void add_scores(const int queries, const int keys, const enum form form, const float *q, long padded,
                       const char *const *rows, long e, long n, vec *sums) {
    vec b[QUERIES];
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++) {
        b[i] = (vec)load(q + i * padded + e);
        KEEP(b[i]);
    }
#pragma GCC unroll 8
    for (int j = 0; j < keys; j++) {
        vec key = fetch(rows[j], e, n, form);
        if (queries > 1) KEEP(key);
#pragma GCC unroll 4
        for (int i = 0; i < queries; i++) sums[i * keys + j] = multiply_add(key, b[i], sums[i * keys + j]);
    }
}

/* Scores of queries x keys; both and the form are constants once inlined. */
INLINE void score(const int queries, const int keys, const enum form form, const float *q, long padded, const char *const *rows,
                  long width, float *scores, long pitch) {
    vec a[SUMS];
    long e = 0;
#pragma GCC unroll 12
    for (int i = 0; i < queries * keys; i++) a[i] = all(0.0f);
    for (; e + LANES <= width; e += LANES) add_scores(queries, keys, form, q, padded, rows, e, LANES, a);
    if (e < width) add_scores(queries, keys, form, q, padded, rows, e, width - e, a);
#pragma GCC unroll 3
    for (int i = 0; i < queries * keys; i += 4) {
        const four sums = sum_lanes(a + i);
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) scores[(i % keys + j) * pitch + i / keys] = sums[j]; /* straight from the register */
    }
}

/* outputs [queries, vectors] += weights of `count` keys times their values from channel e on, of which a single vector takes n, fewer
 * than LANES at a row's end; queries, vectors and the form are constants once inlined. */
INLINE void gather(const int queries, const int vectors, const enum form form, const float *weights, long pitch,
                   const char *const *rows, long count, long e, long n, long padded, float *outputs) {
    vec a[QUERIES][8];
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) a[i][v] = (vec)load(outputs + i * padded + e + v * LANES);
    for (; count > 0; count--, rows++, weights += pitch) {
        vec p[QUERIES];
#pragma GCC unroll 4
        for (int i = 0; i < queries; i++) p[i] = broadcast(weights + i);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) {
            vec value = fetch(*rows, e + v * LANES, vectors > 1 ? LANES : n, form);
            if (queries > 1) KEEP(value);
#pragma GCC unroll 4
            for (int i = 0; i < queries; i++) a[i][v] = multiply_add(p[i], value, a[i][v]);
        }
    }
#pragma GCC unroll 4
    for (int i = 0; i < queries; i++)
#pragma GCC unroll 8
        for (int v = 0; v < vectors; v++) memcpy(outputs + i * padded + e + v * LANES, &a[i][v], sizeof(vec));
}

/* Columns for the next tile: threes fill the registers best. */
static long together(long left) { return left == 4 ? 2 : left < QUERIES ? left : QUERIES; }

#define SCORE(wanted, keys) \
    for (long j = 0; queries == wanted && j < count; j += keys) \
        score(wanted, keys, form, q, padded, rows + j, width, scores + j * pitch, pitch);

/* Queries [columns, padded] against a block of keys. */
INLINE void score_block(const enum form form, long columns, long padded, const float *q, const char *const *rows, long count,
                        long width, float *scores, long pitch) {
    for (long queries; columns > 0; columns -= queries, q += queries * padded, scores += queries) {
        queries = together(columns);
        SCORE(3, 4) SCORE(2, 4) SCORE(1, 8)
    }
}

#define GATHER(wanted, vectors, least) \
    for (; queries == wanted && width - e >= least; e += vectors * LANES) \
        gather(wanted, vectors, form, weights, pitch, rows, count, e, width - e, padded, outputs);

/* Outputs [columns, padded] += weights of a block's keys times their values. */
INLINE void gather_block(const enum form form, long columns, long padded, const float *weights, long pitch,
                         const char *const *rows, long count, long width, float *outputs) {
    for (long queries; columns > 0; columns -= queries, weights += queries, outputs += queries * padded) {
        queries = together(columns);
        long e = 0;
        GATHER(3, 4, 4 * LANES) GATHER(3, 1, 1) GATHER(2, 4, 4 * LANES) GATHER(2, 1, 1)
        GATHER(1, 8, 8 * LANES) GATHER(1, 4, 4 * LANES) GATHER(1, 1, 1)
    }
}

/* Scores [n, pitch] become weights, a column a query: exponentials relative to the column's maximum; totals are their sums. */
static void soften(float *scores, long n, long columns, long pitch, float *totals) {
    for (long column = 0; column < columns; column += LANES) {
        vec top = all(-INFINITY), total = all(0.0f);
        for (long s = 0; s < n; s++) {
            const vec x = (vec)load(scores + s * pitch + column);
            top = larger(x, top);
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

/* Hides from each query what it does not see. */
static void hide(const attention *a, const unit *u) {
    const view *seen = u->seen;
    const long heads = u->last - u->first;
    for (long s = seen->open; s < seen->count; s++) {
        const uint8_t *visible = seen->visible + s - seen->open;
        float *scores = u->scores + s * u->pitch;
        for (long c = 0, t = u->column % a->at->queries; c < u->columns; c++, t = t + 1 < a->at->queries ? t + 1 : 0)
            if (!visible[t * seen->row])
                for (long g = 0; g < heads; g++) scores[g * u->columns + c] = -INFINITY;
    }
}

/* Column c of kv head g: query head g * repeat + c / queries, query c % queries. */
static void load_queries(const attention *a, const unit *u, long g) {
    const layout *at = a->at;
    for (long i = 0; i < u->columns; i++) {
        const long c = u->column + i, head = g * (at->heads / at->kv_heads) + c / at->queries, t = c % at->queries;
        const char *q = a->q + (u->b * at->q_batch + head * at->q_head + t * at->q_row) * size_of(a->form);
        float *to = u->queries + i * a->padded;
        if (a->prepare) a->prepare(a->owner, u->b * at->queries + t, head, to);
        memset(to + a->padded - LANES, 0, LANES * sizeof(float));
        EACH(e, n, at->width) store(to, e, n, fetch(q, e, n, a->form) * all(a->scale), FLOAT);
    }
}

static void store_outputs(const attention *a, const unit *u, long g) {
    const layout *at = a->at;
    for (long i = 0; i < u->columns; i++) {
        const long c = u->column + i, head = g * (at->heads / at->kv_heads) + c / at->queries, t = c % at->queries;
        const float *y = u->outputs + i * a->padded, total = u->totals[(g - u->first) * u->columns + i];
        char *to = a->y + ((u->b * at->queries + t) * a->y_row + head * at->width) * size_of(a->y_form);
        EACH(e, n, at->width) store(to, e, n, fetch(y, e, n, FLOAT) / all(total == 0.0f ? 1.0f : total), a->y_form);
    }
}

/* Where the rows of a block of keys from the first-th seen one on lie, the last one repeated behind them; returns how many. The
 * block after it is on its way meanwhile. */
static long find_rows(const attention *a, const unit *u, const char *base, long row, long first, const char **rows) {
    const int32_t *slots = u->seen->slots + first;
    const long bytes = row * size_of(a->form), used = a->at->width * size_of(a->form), left = u->seen->count - first;
    const long count = left < BLOCK ? left : BLOCK;
    for (long j = 0; j < count; j++) {
        rows[j] = base + slots[j] * bytes;
        if (j + BLOCK < left)
            for (long i = 0; i < used; i += 64) __builtin_prefetch(base + slots[j + BLOCK] * bytes + i);
    }
    for (long j = count; j < count + KEYS; j++) rows[j] = rows[count - 1];
    return count;
}

static void attend(const attention *a, const unit *u) {
    const layout *at = a->at;
    const long size = size_of(a->form), seen = u->seen->count, width = at->width, padded = a->padded, pitch = u->pitch;
    const char *rows[BLOCK + KEYS];
    for (long g = u->first; g < u->last; g++) {
        const char *keys = a->k + (u->b * at->k_batch + g * at->k_head) * size;
        load_queries(a, u, g);
        for (long s = 0; s < seen; s += BLOCK) {
            const long count = find_rows(a, u, keys, at->k_row, s, rows);
            float *scores = u->scores + s * pitch + (g - u->first) * u->columns;
            if (a->form == NARROW) score_block(NARROW, u->columns, padded, u->queries, rows, count, width, scores, pitch);
            else score_block(FLOAT, u->columns, padded, u->queries, rows, count, width, scores, pitch);
        }
    }
    hide(a, u);
    soften(u->scores, seen, (u->last - u->first) * u->columns, pitch, u->totals);
    for (long g = u->first; g < u->last; g++) {
        const char *values = a->v + (u->b * at->v_batch + g * at->v_head) * size;
        memset(u->outputs, 0, u->columns * padded * sizeof(float));
        for (long s = 0; s < seen; s += BLOCK) {
            const long count = find_rows(a, u, values, at->v_row, s, rows);
            const float *weights = u->scores + s * pitch + (g - u->first) * u->columns;
            if (a->form == NARROW) gather_block(NARROW, u->columns, padded, weights, pitch, rows, count, width, u->outputs);
            else gather_block(FLOAT, u->columns, padded, weights, pitch, rows, count, width, u->outputs);
        }
        store_outputs(a, u, g);
    }
}

/* Units of work: groups of kv heads, so that few queries still fill the vectors of `soften`, or a head's columns in pieces. */
void plan_attention(attention *a, int threads) {
    const layout *at = a->at;
    const long pairs = at->batch * at->kv_heads;
    a->share = at->heads / at->kv_heads * at->queries;
    a->padded = whole(at->width);
    a->group = LANES / (a->share ? a->share : 1);
    if (a->group > pairs / threads) a->group = pairs / threads;
    if (a->group > at->kv_heads) a->group = at->kv_heads;
    if (a->group < 1) a->group = 1;
    a->units = at->batch * ((at->kv_heads + a->group - 1) / a->group);
    a->pieces = a->group > 1 || a->units % threads == 0 || a->units > 4 * threads ? 1 : threads < a->share ? threads : a->share;
    a->units *= a->pieces;
    a->columns = a->pieces > 1 ? (a->share + a->pieces - 1) / a->pieces : a->share;
}

/* Floats that a thread needs. */
long attention_memory(const attention *a) {
    const long pitch = whole(a->group * a->columns), keys = a->at->keys + KEYS;
    return 2 * a->columns * a->padded + keys * pitch + pitch;
}

void attend_units(const attention *a, long first, long last, float *memory) {
    unit u = {.pitch = whole(a->group * a->columns), .queries = memory};
    u.outputs = u.queries + a->columns * a->padded;
    u.totals = u.outputs + a->columns * a->padded;
    u.scores = u.totals + u.pitch;
    const long groups = (a->at->kv_heads + a->group - 1) / a->group;
    for (long i = first; i < last; i++) {
        const long heads = i / a->pieces, piece = i % a->pieces;
        u.b = heads / groups;
        u.first = heads % groups * a->group;
        u.last = u.first + a->group < a->at->kv_heads ? u.first + a->group : a->at->kv_heads;
        u.column = a->share * piece / a->pieces;
        u.columns = a->share * (piece + 1) / a->pieces - u.column;
        u.seen = a->views + u.b;
        attend(a, &u);
    }
}

/* Sequence b's slots that any query sees, in order, and who sees them, from `visible` [queries, keys]; NULL: all see all. */
static void list_slots(const layout *at, const uint8_t *visible, view *to, int32_t *slots, uint8_t *bytes) {
    *to = (view){.slots = slots, .visible = bytes, .row = at->keys};
    for (long s = 0; s < at->keys; s++) {
        long seen = visible ? 0 : at->queries;
        for (long t = 0; visible && t < at->queries; t++)
            seen += bytes[t * at->keys + to->count - to->open] = visible[t * at->visible_row + s];
        slots[to->count] = (int32_t)s;
        to->open += seen == at->queries && to->open == to->count;
        to->count += seen > 0;
    }
}

/* q [batch, heads, queries, width], k and v [batch, kv_heads, keys, width] strided, all bf16 or all fp32; visible: bytes
 * [batch, queries, keys] or NULL; y [batch, queries, heads, width] contiguous. Returns 0, or -1 where memory is lacking. */
int decode_attention(const void *q, const void *k, const void *v, const void *visible, void *y, const layout *at, float scale,
                     int bf16, int threads) {
    attention a = {.at = at, .q = q, .k = k, .v = v, .y = y, .y_row = at->heads * at->width, .scale = scale};
    a.form = a.y_form = stored(bf16);
    if (forked || at->batch * at->heads * at->queries * at->keys * at->width < PARALLEL) threads = 1;
    plan_attention(&a, threads);
    const long own = attention_memory(&a), batch = at->batch, bytes = visible ? at->queries * at->keys : 0;
    char *memory = malloc(batch * (sizeof(view) + at->keys * sizeof(int32_t) + bytes) + threads * own * sizeof(float) + 64);
    if (!memory) return -1;
    view *views = (view *)memory;
    float *scratch = (float *)(views + batch);
    int32_t *slots = (int32_t *)(scratch + threads * own);
    uint8_t *seen = (uint8_t *)(slots + batch * at->keys);
    for (long b = 0; b < batch; b++) {
        const uint8_t *row = visible ? (const uint8_t *)visible + b * at->visible_batch : NULL;
        list_slots(at, row, views + b, slots + b * at->keys, seen + b * bytes);
    }
    a.views = views;
#ifdef _OPENMP
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        const long t = omp_get_thread_num(), n = omp_get_num_threads();
        attend_units(&a, a.units * t / n, a.units * (t + 1) / n, scratch + t * own);
    }
#else
    attend_units(&a, 0, a.units, scratch);
#endif
    free(memory);
    return 0;
}
