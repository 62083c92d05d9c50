/* Flash attention: y = softmax(scale q k' + bias) v tile by tile with an online softmax, and its gradients. Tensors are read where they
 * lie and written where they go: beyond them a thread has its tiles, whatever the lengths.
 *
 * Products. All five are one loop over tiles of sums held in registers: rows of the left factor are broadcast, and the right factor
 * lies in panels of 16 columns, row after row, into which each thread copies it. Left factors may be read by columns, so that p' dy
 * and ds' q need no transposing.
 *
 * Order. Forward, a unit of work is a span of queries over all keys; backward, a piece of the queries and one of the keys, for the
 * heads that add to the same gradients. Rounds go along the antidiagonals of these cells: in a round no two have the same queries, the
 * same keys or the same distance, so that no gradient is held twice, and results do not depend on the threads.
 *
 * This file knows nothing of tensors but where they are. */
#include "rows.h"

enum { PANEL = 16, VECTORS = PANEL / LANES, ROWS = 12 / VECTORS }; /* columns of a tile of sums; its vectors and its rows */
enum { QUERIES = 96, KEYS = 192, GRAIN = 48, SPAN = 4 * QUERIES }; /* of a tile of scores; keys that are skipped at a time; a unit */

typedef struct { /* [batch, heads, tokens, width], the widths dense, the others so many numbers apart */
    char *at;
    long batch, head, token;
} spread;

typedef struct {
    long batch, heads, kv_heads, queries, keys, key_width, value_width, causal, bf16; /* bf16: q, k, v, y and dy, else fp32 */
    float scale;
    spread q, k, v, y;
    const float *bias; /* of query 0 and key 0; NULL: none */
    long bias_batch, bias_head, bias_row; /* its strides, 0: one for all; row -1: by distance */
    const int32_t *q_segments, *k_segments; /* [batch, queries], [batch, keys up to whole grains]; NULL: one segment */
    const int32_t *spans; /* [batch, grains, 2]: least and largest segment of so many keys, padding aside */
    float *lse;           /* [batch, heads, queries] */
    const float *dlse;    /* from here on backward */
    spread dy, dq, dk, dv;  /* gradients made are fp32, zeros at first */
    float *dbias;         /* as the bias; NULL: not wanted; by distance zeros */
    long batch_groups, head_groups; /* what adds to one bias or to one key head's gradients is one thread's */
    long piece;                     /* of the tokens, in whole blocks of keys: what is one thread's in a round */
} flash;

typedef struct { /* queries first .. first+count-1 of a head, rounded up to `rows`, and keys low .. high-1 */
    long b, h, first, count, rows, low, high;
    int32_t least, largest; /* segments of the queries */
} tile;

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long whole(long n, long unit) { return (n + unit - 1) / unit * unit; }
INLINE long columns(const flash *f) { return whole(f->keys, GRAIN); }
INLINE enum form form_of(const flash *f) { return stored(f->bf16); }

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

INLINE void *row_of(const spread *x, long b, long h, long token, enum form form) {
    return x->at + (b * x->batch + h * x->head + token * x->token) * size_of(form);
}

INLINE vec part(const void *row, long i, long width, enum form form) {
    return i < width ? fetch(row, i, width - i, form) : all(0.0f);
}

/* `count` tokens as a right factor of as many columns, [tokens / 16, width, 16]; zeros behind them up to `tall`. */
static void lanes(const spread *x, long b, long h, long first, long count, long tall, long width, float scale, enum form form, float *to) {
    for (long j = 0; j < tall; j++) {
        const void *row = row_of(x, b, h, first + j, form);
        float *lane = to + j / PANEL * PANEL * width + j % PANEL, some[LANES];
        EACH(i, n, width) {
            const vec v = j < count ? fetch(row, i, n, form) * all(scale) : all(0.0f);
            memcpy(some, &v, sizeof some);
            for (long l = 0; l < n; l++) lane[(i + l) * PANEL] = some[l];
        }
    }
}

/* The same as a right factor of as many rows, [width / 16, tall, 16]. */
static void panels(const spread *x, long b, long h, long first, long count, long tall, long width, float scale, enum form form, float *to) {
    for (long j = 0; j < tall; j++) {
        const void *row = row_of(x, b, h, first + j, form);
        for (long i = 0; i < whole(width, PANEL); i += LANES) {
            const vec v = j < count ? part(row, i, width, form) * all(scale) : all(0.0f);
            memcpy(to + i / PANEL * PANEL * tall + j * PANEL + i % PANEL, &v, sizeof v);
        }
    }
}

/* The queries of a tile as a left factor, its rows `apart`: where they lie, or else in `own`. */
static const float *rows(const spread *x, const tile *t, long width, enum form form, float *own, long *apart) {
    *apart = x->token;
    if (form == FLOAT && t->rows == t->count) return row_of(x, t->b, t->h, t->first, form);
    *apart = whole(width, LANES);
    memset(own, 0, t->rows * *apart * sizeof(float));
    for (long j = 0; j < t->count; j++) {
        const void *row = row_of(x, t->b, t->h, t->first + j, form);
        EACH(i, n, width) store(own + j * *apart, i, LANES, fetch(row, i, n, form), FLOAT);
    }
    return own;
}

static tile tile_of(const flash *f, long b, long h, long first) {
    const long count = least(QUERIES, f->queries - first);
    tile t = {b, h, first, count, whole(count, ROWS), 0, 0, INT32_MAX, -1};
    for (long i = first; f->q_segments && i < first + count; i++) {
        const int32_t own = f->q_segments[b * f->queries + i];
        if (own >= 0 && own < t.least) t.least = own;
        if (own > t.largest) t.largest = own;
    }
    return t;
}

/* The keys after which a query sees none. */
INLINE long horizon(const flash *f, long query) {
    const long end = query + f->keys - f->queries + 1;
    return !f->causal || end > f->keys ? f->keys : end < 0 ? 0 : end;
}

static int apart(const flash *f, const tile *t, long key) {
    const int32_t *span = f->spans + 2 * (t->b * columns(f) + key) / GRAIN;
    return span[0] > t->largest || span[1] < t->least;
}

/* Which of the KEYS keys from `first` on the queries of a tile may see; 0 where none of them does. */
static int narrow(const flash *f, tile *t, long first) {
    t->low = first;
    t->high = least(first + KEYS, whole(horizon(f, t->first + t->count - 1), GRAIN));
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
    for (long i = t->first; bias && i < t->first + t->count; i++)
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
    return (sight){s.bias, s.end, f->k_segments + t->b * columns(f), f->q_segments[t->b * f->queries + query]};
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

/* A span of queries over all keys that they see. */
static void attend(const flash *f, long unit, float *memory) {
    const long spans = (f->queries + SPAN - 1) / SPAN, head = unit / spans, b = head / f->heads, h = head % f->heads;
    const long begin = (spans - 1 - unit % spans) * SPAN, end = least(begin + SPAN, f->queries); /* those that see most come first */
    const long kv = h / (f->heads / f->kv_heads), e = f->key_width, w = whole(f->value_width, PANEL);
    float *k = memory, *v = k + KEYS * e, *own = v + KEYS * w, *scores = own + QUERIES * whole(e, PANEL), *y = scores + QUERIES * KEYS;
    float largest[SPAN], total[SPAN] = {0}, fade[QUERIES] = {0};
    for (long i = 0; i < SPAN; i++) largest[i] = -INFINITY;
    memset(y, 0, SPAN * w * sizeof(float));
    for (long first = 0; first < columns(f); first += KEYS) {
        const long tall = least(KEYS, columns(f) - first), count = least(tall, f->keys - first);
        int there = 0;
        for (long query = begin; query < end; query += QUERIES) {
            tile t = tile_of(f, b, h, query);
            if (!narrow(f, &t, first)) continue;
            expect(f, &t, bias_of(f, &t, 0));
            if (!there) {
                lanes(&f->k, b, kv, first, count, tall, e, f->scale, form_of(f), k);
                panels(&f->v, b, kv, first, count, tall, f->value_width, 1.0f, form_of(f), v);
                there = 1;
            }
            const long keys = t.high - t.low, at = query - begin;
            long q_row;
            const float *q = rows(&f->q, &t, e, form_of(f), own, &q_row);
            product(FRESH, t.rows, keys, e, q, q_row, 1, k + (t.low - first) * e, e * PANEL, scores, KEYS, fade);
            for (long i = 0; i < t.count; i++) fade[i] = soften(f, &t, query + i, scores + i * KEYS, largest + at + i, total + at + i);
            product(FADED, t.rows, w, keys, scores, KEYS, 1, v + (t.low - first) * PANEL, tall * PANEL, y + at * w, w, fade);
        }
    }
    for (long i = 0; i < end - begin; i++) {
        const float all_of_it = total[i] == 0.0f ? 1.0f : total[i];
        void *to = row_of(&f->y, b, h, begin + i, form_of(f));
        f->lse[head * f->queries + begin + i] = largest[i] + logf(all_of_it);
        EACH(j, n, f->value_width) store(to, j, n, fetch(y + i * w, j, LANES, FLOAT) / all(all_of_it), form_of(f));
    }
}

typedef struct { /* what a thread works with, backward */
    float *k_lanes, *k_panels, *v_lanes, *dk, *dv; /* of a block of keys, k scaled */
    float *q, *dy, *q_panels, *dy_panels, *p, *ds, *dq; /* of a tile */
} desk;

/* Numbers of a desk; lays one out where there is memory for it. */
static long lay_out(const flash *f, float *memory, desk *d) {
    const long e = whole(f->key_width, PANEL), w = whole(f->value_width, PANEL);
    const long sizes[] = {KEYS * e, KEYS * e, KEYS * w, KEYS * e, KEYS * w, QUERIES * e, QUERIES * w, QUERIES * e, QUERIES * w,
                          QUERIES * KEYS, QUERIES * KEYS, QUERIES * e};
    float **parts[] = {&d->k_lanes, &d->k_panels, &d->v_lanes, &d->dk, &d->dv, &d->q, &d->dy, &d->q_panels, &d->dy_panels,
                       &d->p, &d->ds, &d->dq};
    long total = 0;
    for (int i = 0; i < 12; total += sizes[i++])
        if (memory) *parts[i] = memory + total;
    return total;
}

/* Scores of a query become weights, and the weights' gradients those of the scores; the bias keeps or gathers these. */
static void harden(const flash *f, const tile *t, long query, float *p, float *ds, float *dbias, int first) {
    const sight s = sight_of(f, t, query);
    const long at = (t->b * f->heads + t->h) * f->queries + query;
    const float known = f->lse[at] == -INFINITY ? 0.0f : f->lse[at];
    const void *y = row_of(&f->y, t->b, t->h, query, form_of(f)), *dy = row_of(&f->dy, t->b, t->h, query, form_of(f));
    vec told = all(0.0f);
    EACH(i, n, f->value_width) told = multiply_add(fetch(y, i, n, form_of(f)), fetch(dy, i, n, form_of(f)), told);
    const vec rest = all(f->dlse[at] - sum(told));
    for (long j = 0; j < t->high - t->low; j += LANES) {
        const long key = t->low + j, n = f->keys - key;
        const vec weight = exponential(seen(f, &s, key, p + j) - all(known));
        const vec change = weight * ((vec)load(ds + j) + rest);
        memcpy(p + j, &weight, sizeof weight);
        memcpy(ds + j, &change, sizeof change);
        if (dbias && n > 0) store(dbias, key, n, first ? change : fetch(dbias, key, n, FLOAT) + change, FLOAT);
    }
}

/* What a tile adds to the gradients; its block of keys begins at `block`. */
static void blame(const flash *f, const tile *t, long block, long tall, float *dbias, int first, const desk *d) {
    const enum form form = form_of(f);
    const long e = f->key_width, w = f->value_width, keys = t->high - t->low, at = t->low - block;
    long q_row, dy_row;
    const float *q = rows(&f->q, t, e, form, d->q, &q_row), *dy = rows(&f->dy, t, w, form, d->dy, &dy_row);
    expect(f, t, bias_of(f, t, 0));
    product(FRESH, t->rows, keys, e, q, q_row, 1, d->k_lanes + at * e, e * PANEL, d->p, KEYS, d->p);
    product(FRESH, t->rows, keys, w, dy, dy_row, 1, d->v_lanes + at * w, w * PANEL, d->ds, KEYS, d->p);
    for (long i = 0; i < t->count; i++)
        harden(f, t, t->first + i, d->p + i * KEYS, d->ds + i * KEYS, dbias ? dbias + (t->first + i) * f->bias_row : NULL, first);
    memset(d->p + t->count * KEYS, 0, (t->rows - t->count) * KEYS * sizeof(float));
    memset(d->ds + t->count * KEYS, 0, (t->rows - t->count) * KEYS * sizeof(float));
    panels(&f->q, t->b, t->h, t->first, t->count, t->rows, e, 1.0f, form, d->q_panels);
    panels(&f->dy, t->b, t->h, t->first, t->count, t->rows, w, 1.0f, form, d->dy_panels);
    const long e_row = whole(e, PANEL), w_row = whole(w, PANEL);
    product(ADDED, keys, w_row, t->rows, d->p, 1, KEYS, d->dy_panels, t->rows * PANEL, d->dv + at * w_row, w_row, d->p);
    product(ADDED, keys, e_row, t->rows, d->ds, 1, KEYS, d->q_panels, t->rows * PANEL, d->dk + at * e_row, e_row, d->p);
    product(FRESH, t->rows, e_row, keys, d->ds, KEYS, 1, d->k_panels + at * PANEL, tall * PANEL, d->dq, e_row, d->p);
}

/* Adds `count` rows of sums, times `scale`, to tokens from `first` on. */
static void add(const spread *x, long b, long h, long first, long count, long width, float scale, const float *made) {
    for (long j = 0; j < count; j++, made += whole(width, PANEL)) {
        float *row = row_of(x, b, h, first + j, FLOAT);
        EACH(i, n, width) store(row, i, n, multiply_add(all(scale), fetch(made, i, n, FLOAT), fetch(row, i, n, FLOAT)), FLOAT);
    }
}

/* A dense bias's gradient where the keys from..to-1 of a block are hidden from a tile. */
static void clear(const flash *f, const tile *t, long from, long to, float *dbias) {
    const long count = least(to, f->keys) - from;
    for (long i = t->first; count > 0 && i < t->first + t->count; i++) memset(dbias + i * f->bias_row + from, 0, count * sizeof(float));
}

/* A block of keys of a head against a range of queries of the heads that share it. */
static void meet(const flash *f, long b, long kv, long block, const long range[2], const desk *d) {
    const long tall = least(KEYS, columns(f) - block), count = least(tall, f->keys - block), share = f->heads / f->kv_heads;
    const long e = f->key_width, w = f->value_width;
    int there = 0;
    for (long h = kv * share; h < (kv + 1) * share; h++) {
        float *own = f->dbias ? f->dbias + b * f->bias_batch + h * f->bias_head : NULL;
        const int first = own && f->bias_row > 0 && (f->bias_batch || !b) && (f->bias_head || !h); /* nobody was here before */
        for (long query = range[0]; query < range[1]; query += QUERIES) {
            tile t = tile_of(f, b, h, query);
            const int met = narrow(f, &t, block);
            if (first) {
                clear(f, &t, block, met ? t.low : block + tall, own);
                if (met) clear(f, &t, t.high, block + tall, own);
            }
            if (!met) continue;
            if (!there) {
                lanes(&f->k, b, kv, block, count, tall, e, f->scale, form_of(f), d->k_lanes);
                panels(&f->k, b, kv, block, count, tall, e, f->scale, form_of(f), d->k_panels);
                lanes(&f->v, b, kv, block, count, tall, w, 1.0f, form_of(f), d->v_lanes);
                memset(d->dk, 0, tall * whole(e, PANEL) * sizeof(float));
                memset(d->dv, 0, tall * whole(w, PANEL) * sizeof(float));
                there = 1;
            }
            blame(f, &t, block, tall, own, first, d);
            add(&f->dq, b, h, query, t.count, e, 1.0f, d->dq);
        }
    }
    if (!there) return;
    add(&f->dk, b, kv, block, count, e, f->scale, d->dk);
    add(&f->dv, b, kv, block, count, w, 1.0f, d->dv);
}

/* Backward, one of the cells that a round has: keys and queries from multiples of `piece` on that add up to the round's number. */
static void backward(const flash *f, long unit, long round, float *memory) {
    const long cells = f->batch_groups * f->head_groups, group = unit % cells, key = unit / cells * f->piece;
    const long query = round * f->piece - key, range[] = {query, least(query + f->piece, f->queries)};
    desk d;
    if (query < 0 || query >= f->queries) return;
    lay_out(f, memory, &d);
    for (long block = key; block < least(key + f->piece, f->keys); block += KEYS)
        for (long b = group / f->head_groups; b < f->batch; b += f->batch_groups)
            for (long kv = group % f->head_groups; kv < f->kv_heads; kv += f->head_groups) meet(f, b, kv, block, range, &d);
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
    const int back = f->dy.at != NULL;
    const long e = whole(f->key_width, PANEL), w = whole(f->value_width, PANEL);
    const long pieces = back ? (f->keys + f->piece - 1) / f->piece : 1, ranges = back ? (f->queries + f->piece - 1) / f->piece : 1;
    const long units = back ? pieces * f->batch_groups * f->head_groups : f->batch * f->heads * ((f->queries + SPAN - 1) / SPAN);
    const long each = back ? lay_out(f, NULL, &(desk){0}) : (KEYS + QUERIES) * e + (KEYS + SPAN) * w + QUERIES * KEYS;
    if (forked || f->batch * f->heads * f->queries * f->keys * (e + w) < PARALLEL) threads = 1;
    if (threads > units) threads = units ? units : 1;
    float *memory = aligned_alloc(64, threads * each * sizeof(float));
    if (!memory) return -1;
    for (long round = 0; round < pieces + ranges - 1; round++) {
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
        for (long unit = 0; unit < units; unit++)
            if (back) backward(f, unit, round, memory + thread() * each);
            else attend(f, unit, memory + thread() * each);
    }
    free(memory);
    return 0;
}
