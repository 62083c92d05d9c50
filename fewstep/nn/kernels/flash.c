/* Flash attention: y = softmax(q k' + bias) v tile by tile with an online softmax, and its gradients, in memory linear in the lengths.
 *
 * Products. All five are one loop over tiles of sums held in registers: rows of the left factor are broadcast, and the right factor
 * lies in panels of 16 columns, row after row. Left factors may be read by columns, so that p' dy and ds' q need no transposing.
 *
 * Order. A unit of work, a block of queries (backward: a range of keys for the heads that share a bias), is computed by one thread in
 * one order, so that results do not depend on the threads.
 *
 * This file knows nothing of tensors: whoever calls scales, pads and packs. */
#include "rows.h"

enum { PANEL = 16, VECTORS = PANEL / LANES, ROWS = 12 / VECTORS }; /* columns of a tile of sums; its vectors and its rows */
enum { QUERIES = 96, KEYS = 192, GRAIN = 48 }; /* of a tile of scores; keys that are skipped at a time */

typedef struct { /* all fp32; widths are multiples of 16, `rows` of 12 and `columns` of 48: lengths with zeros behind them */
    long batch, heads, kv_heads, queries, keys, rows, columns, key_width, value_width;
    long causal, pieces; /* backward: of the keys, each a unit of work */
    const float *q;       /* [batch, heads, rows, key_width], scaled */
    const float *k_lanes; /* [batch, kv_heads, columns / 16, key_width, 16] */
    const float *values;  /* v: forward [batch, kv_heads, value_width / 16, columns, 16], backward as k_lanes */
    const float *bias;    /* of query 0 and key 0; NULL: none */
    long bias_batch, bias_head, bias_row; /* its strides */
    const int32_t *q_segments, *k_segments; /* [batch, rows or columns]; NULL: one segment */
    const int32_t *spans; /* [batch, columns / 48, 2]: least and largest segment of so many keys, padding aside */
    float *y, *lse;       /* [batch, heads, rows, value_width], [batch, heads, queries] */
    const float *rest;    /* as lse: its gradient less dy y; from here on backward */
    const float *dy, *dy_panels, *q_panels; /* [batch, heads, rows, value_width]; [batch, heads, width / 16, rows, 16] */
    const float *k_panels; /* [batch, kv_heads, key_width / 16, columns, 16] */
    float *dq;             /* [pieces, batch, heads, rows, key_width], zeros */
    float *dk, *dv;        /* [batch, heads, columns, width], zeros */
    float *dbias;          /* strides of the bias; by distance zeros; NULL: not wanted */
    long dbias_piece, bias_batches, bias_heads; /* one for each piece, so far apart; heads that share a bias are one thread's */
} flash;

typedef struct { /* queries first .. first+count-1, some of the last beyond the end, of a head and keys low .. high-1 */
    long b, h, first, count, low, high;
    int32_t least, largest; /* segments of the queries */
} tile;

enum sums { FRESH, ADDED, FADED };

/* c (+)= a b over `depth` for ROWS rows and PANEL columns; what a row of c held is first multiplied by its `fade`. */
INLINE void sums(const enum sums mode, long depth, const float *a, long a_row, long a_step, const float *b, float *c, long c_row,
                 const float *fade) {
    vec s[ROWS][VECTORS];
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            s[i][v] = mode == FRESH ? all(0.0f) : (vec)load(c + i * c_row + v * LANES);
            if (mode == FADED) s[i][v] *= broadcast(fade + i);
        }
    for (; depth > 0; depth--, a += a_step, b += PANEL) {
        vec right[VECTORS];
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
            right[v] = (vec)load(b + v * LANES);
            KEEP(right[v]);
        }
#pragma GCC unroll 12
        for (int i = 0; i < ROWS; i++) {
            const vec left = broadcast(a + i * a_row);
#pragma GCC unroll 4
            for (int v = 0; v < VECTORS; v++) s[i][v] = multiply_add(left, right[v], s[i][v]);
        }
    }
#pragma GCC unroll 12
    for (int i = 0; i < ROWS; i++)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) memcpy(c + i * c_row + v * LANES, &s[i][v], sizeof(vec));
}

/* The same for `height` rows and `width` columns, whose panels lie `b_panel` numbers apart. */
INLINE void product(const enum sums mode, long height, long width, long depth, const float *a, const long a_row, const long a_step,
                    const float *b, long b_panel, float *c, long c_row, const float *fade) {
    for (long j = 0; j < width; j += PANEL, b += b_panel, c += PANEL)
        for (long i = 0; i < height; i += ROWS)
            sums(mode, depth, a + i * a_row, a_row, a_step, b, c + i * c_row, c_row, fade + i);
}

static void tile_of(const flash *f, tile *t, long b, long h, long first) {
    *t = (tile){b, h, first, f->rows - first < QUERIES ? f->rows - first : QUERIES, 0, 0, INT32_MAX, -1};
    for (long i = first; f->q_segments && i < first + t->count; i++) {
        const int32_t own = f->q_segments[b * f->rows + i];
        if (own >= 0 && own < t->least) t->least = own;
        if (own > t->largest) t->largest = own;
    }
}

/* The keys after which a query sees none. */
INLINE long horizon(const flash *f, long query) {
    const long end = query + f->keys - f->queries + 1;
    return !f->causal || end > f->keys ? f->keys : end < 0 ? 0 : end;
}

static int apart(const flash *f, const tile *t, long key) {
    const int32_t *span = f->spans + 2 * (t->b * f->columns + key) / GRAIN;
    return span[0] > t->largest || span[1] < t->least;
}

/* Which of the KEYS keys from `first` on the queries of a tile may see; 0 where none of them does. */
static int narrow(const flash *f, tile *t, long first) {
    const long last = t->first + t->count < f->queries ? t->first + t->count : f->queries, end = horizon(f, last - 1);
    t->low = first;
    t->high = first + KEYS < end ? first + KEYS : (end + GRAIN - 1) / GRAIN * GRAIN;
    if (!f->q_segments) return t->low < t->high;
    while (t->low < t->high && apart(f, t, t->low)) t->low += GRAIN;
    while (t->low < t->high && apart(f, t, t->high - GRAIN)) t->high -= GRAIN;
    return t->low < t->high;
}

INLINE const float *bias_of(const flash *f, const tile *t, long query) {
    return f->bias ? f->bias + t->b * f->bias_batch + t->h * f->bias_head + query * f->bias_row : NULL;
}

/* Asks for a tile of a bias before products are computed: its rows lie too far apart to be foreseen. */
INLINE void expect(const flash *f, const tile *t, const float *bias) {
    for (long i = t->first; bias && i < t->first + t->count && i < f->queries; i++)
        for (long key = t->low; key < t->high && key < f->keys; key += 16) __builtin_prefetch(bias + i * f->bias_row + key);
}

typedef struct { /* what a query makes of the scores of a tile: a bias, and the end and segment of the keys it sees */
    const float *bias;
    long end;
    const int32_t *segments;
    int32_t own;
} sight;

static sight sight_of(const flash *f, const tile *t, long query) {
    const sight s = {bias_of(f, t, query), horizon(f, query), NULL, 0};
    if (!f->q_segments) return s;
    return (sight){s.bias, s.end, f->k_segments + t->b * f->columns, f->q_segments[t->b * f->rows + query]};
}

/* A vector of scores from key `key` on, -inf where hidden; -inf is the neutral score. */
INLINE vec seen(const flash *f, const sight *s, long key, const float *scores) {
    vec v = (vec)load(scores);
    if (key >= s->end) return all(-INFINITY);
    if (s->bias) v += fetch(s->bias, key, f->keys - key, FLOAT);
    if (s->segments) v = choose((mask)load(s->segments + key) == (mask)((bits){0} + (uint32_t)s->own), v, all(-INFINITY));
    if (key + LANES > s->end) {
        int32_t left[LANES];
        for (int i = 0; i < LANES; i++) left[i] = key + i < s->end ? -1 : 0;
        v = choose((mask)load(left), v, all(-INFINITY));
    }
    return v;
}

INLINE float top(vec v) {
    float s[LANES];
    memcpy(s, &v, sizeof s);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) s[i] = s[i] > s[i + n] ? s[i] : s[i + n];
    return s[0];
}

/* Scores of a query become weights, relative to the largest so far; what was summed before must fade by what is returned. */
static float soften(const flash *f, const tile *t, long query, float *scores, float *largest, float *total) {
    const sight s = sight_of(f, t, query);
    const long count = t->high - t->low;
    vec most = all(-INFINITY), sum_of = all(0.0f);
    for (long j = 0; j < count; j += LANES) {
        const vec v = seen(f, &s, t->low + j, scores + j);
        memcpy(scores + j, &v, sizeof v);
        most = larger(most, v);
    }
    const float new = top(most) > *largest ? top(most) : *largest, level = new == -INFINITY ? 0.0f : new;
    for (long j = 0; j < count; j += LANES) {
        const vec p = exponential((vec)load(scores + j) - all(level));
        memcpy(scores + j, &p, sizeof p);
        sum_of += p;
    }
    const float fade = expf(*largest - level);
    *largest = new;
    *total = *total * fade + sum(sum_of);
    return fade;
}

/* Over all keys that a block of queries sees. */
static void attend(const flash *f, tile *t, float *scores) {
    const long head = t->b * f->heads + t->h, kv = t->b * f->kv_heads + t->h / (f->heads / f->kv_heads);
    const long e = f->key_width, w = f->value_width;
    const float *q = f->q + (head * f->rows + t->first) * e;
    float *y = f->y + (head * f->rows + t->first) * w, largest[QUERIES], total[QUERIES] = {0}, fade[QUERIES] = {0};
    const long count = f->queries - t->first < t->count ? f->queries - t->first : t->count;
    for (long i = 0; i < t->count; i++) largest[i] = -INFINITY;
    memset(y, 0, t->count * w * sizeof(float));
    for (long first = 0; first < f->columns; first += KEYS) {
        if (!narrow(f, t, first)) continue;
        const float *k = f->k_lanes + (kv * f->columns + t->low) * e, *v = f->values + (kv * w * f->columns) + t->low * PANEL;
        const long keys = t->high - t->low;
        expect(f, t, bias_of(f, t, 0));
        product(FRESH, t->count, keys, e, q, e, 1, k, e * PANEL, scores, KEYS, fade);
        for (long i = 0; i < count; i++) fade[i] = soften(f, t, t->first + i, scores + i * KEYS, largest + i, total + i);
        product(FADED, t->count, w, keys, scores, KEYS, 1, v, f->columns * PANEL, y, w, fade);
    }
    for (long i = 0; i < count; i++) {
        const float whole = total[i] == 0.0f ? 1.0f : total[i];
        f->lse[head * f->queries + t->first + i] = largest[i] + logf(whole);
        for (long j = 0; j < w; j += LANES) store(y + i * w, j, LANES, fetch(y + i * w, j, LANES, FLOAT) / all(whole), FLOAT);
    }
}

/* Scores of a query become weights, and the weights' gradients those of the scores; the bias gathers these. */
static void harden(const flash *f, const tile *t, long query, float *p, float *ds, float *dbias) {
    const sight s = sight_of(f, t, query);
    const long at = (t->b * f->heads + t->h) * f->queries + query;
    const float known = f->lse[at] == -INFINITY ? 0.0f : f->lse[at];
    for (long j = 0; j < t->high - t->low; j += LANES) {
        const long key = t->low + j, n = f->keys - key;
        const vec weight = exponential(seen(f, &s, key, p + j) - all(known));
        const vec change = weight * ((vec)load(ds + j) + broadcast(f->rest + at));
        memcpy(p + j, &weight, sizeof weight);
        memcpy(ds + j, &change, sizeof change);
        if (dbias && n > 0) store(dbias, key, n, fetch(dbias, key, n, FLOAT) + change, FLOAT);
    }
}

/* What a tile adds to the gradients. */
static void blame(const flash *f, const tile *t, float *dq, float *dbias, float *p, float *ds) {
    const long head = t->b * f->heads + t->h, kv = t->b * f->kv_heads + t->h / (f->heads / f->kv_heads);
    const long e = f->key_width, w = f->value_width, row = head * f->rows + t->first, keys = t->high - t->low;
    const long beyond = f->queries - t->first < t->count ? f->queries - t->first : t->count, column = kv * f->columns + t->low;
    expect(f, t, bias_of(f, t, 0));
    product(FRESH, t->count, keys, e, f->q + row * e, e, 1, f->k_lanes + column * e, e * PANEL, p, KEYS, p);
    product(FRESH, t->count, keys, w, f->dy + row * w, w, 1, f->values + column * w, w * PANEL, ds, KEYS, p);
    for (long i = 0; i < beyond; i++)
        harden(f, t, t->first + i, p + i * KEYS, ds + i * KEYS, dbias ? dbias + (t->first + i) * f->bias_row : NULL);
    memset(p + beyond * KEYS, 0, (t->count - beyond) * KEYS * sizeof(float));
    memset(ds + beyond * KEYS, 0, (t->count - beyond) * KEYS * sizeof(float));
    const float *dy = f->dy_panels + head * f->rows * w + t->first * PANEL, *q = f->q_panels + head * f->rows * e + t->first * PANEL;
    const float *k = f->k_panels + kv * f->columns * e + t->low * PANEL;
    float *dk = f->dk + (head * f->columns + t->low) * e, *dv = f->dv + (head * f->columns + t->low) * w;
    product(ADDED, keys, w, t->count, p, 1, KEYS, dy, f->rows * PANEL, dv, w, p);
    product(ADDED, keys, e, t->count, ds, 1, KEYS, q, f->rows * PANEL, dk, e, p);
    product(ADDED, t->count, e, keys, ds, KEYS, 1, k, f->columns * PANEL, dq + row * e, e, p);
}

/* The numbers of a bias that queries from `first` on and a block of keys meet are nobody's else: they are cleared when first met. */
static void clear(const flash *f, long first, long key, float *dbias) {
    const long count = f->keys - key < KEYS ? f->keys - key : KEYS;
    for (long i = first; count > 0 && i < first + QUERIES && i < f->queries; i++)
        memset(dbias + i * f->bias_row + key, 0, count * sizeof(float));
}

/* Backward over a piece of the keys, for all heads that share a bias. */
static void backward(const flash *f, long unit, float *memory) {
    const long piece = unit % f->pieces, shared = unit / f->pieces, blocks = (f->columns + KEYS - 1) / KEYS;
    float *dq = f->dq + piece * f->batch * f->heads * f->rows * f->key_width;
    for (long b = shared / f->bias_heads; b < f->batch; b += f->bias_batches)
        for (long h = shared % f->bias_heads; h < f->heads; h += f->bias_heads) {
            float *dbias = f->dbias ? f->dbias + piece * f->dbias_piece + b * f->bias_batch + h * f->bias_head : NULL;
            for (long block = blocks * piece / f->pieces; block < blocks * (piece + 1) / f->pieces; block++)
                for (long first = 0; first < f->rows; first += QUERIES) {
                    tile t;
                    tile_of(f, &t, b, h, first);
                    if (dbias && f->bias_row > 0 && b < f->bias_batches && h < f->bias_heads) clear(f, first, block * KEYS, dbias);
                    if (narrow(f, &t, block * KEYS)) blame(f, &t, dq, dbias, memory, memory + QUERIES * KEYS);
                }
        }
}

static void forward(const flash *f, long unit, float *memory) {
    const long blocks = (f->rows + QUERIES - 1) / QUERIES, head = unit / blocks;
    tile t;
    tile_of(f, &t, head / f->heads, head % f->heads, (blocks - 1 - unit % blocks) * QUERIES); /* those that see most come first */
    attend(f, &t, memory);
}

static int thread(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* Forward, or where there is dy backward. Returns 0, or -1 where memory is lacking. */
int flash_attention(const flash *f, int threads) {
    const long blocks = (f->rows + QUERIES - 1) / QUERIES;
    const long units = f->dy ? f->bias_batches * f->bias_heads * f->pieces : f->batch * f->heads * blocks;
    if (forked || f->batch * f->heads * f->rows * f->columns * (f->key_width + f->value_width) < PARALLEL) threads = 1;
    if (threads > units) threads = units ? units : 1;
    float *memory = aligned_alloc(64, threads * 2 * QUERIES * KEYS * sizeof(float));
    if (!memory) return -1;
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
    for (long unit = 0; unit < units; unit++) {
        float *own = memory + thread() * 2 * QUERIES * KEYS;
        if (f->dy) backward(f, unit, own);
        else forward(f, unit, own);
    }
    free(memory);
    return 0;
}
