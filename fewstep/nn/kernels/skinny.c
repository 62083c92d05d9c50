/* Skinny matmul: y[r,o] = sum_i x[r,i] w[o,i] + b[o] for few rows r, each weight read from memory once.
 *
 * Layout. Weights lie in panels of 16 outputs (the last one padded with zeros). A panel is a run of 64-byte lines, one per
 * step of the sum. fp32: line s holds w[o, s] of the panel's outputs; bf16: line s holds their pairs (w[o, 2s], w[o, 2s+1]).
 *
 * Order. Each y[r,o] is one chain of fp32 multiply-adds over i = 0, 1, 2, ... begun at zero, then the bias, then one rounding to
 * the activations' type. Tiles, chunks and threads say where a chain is kept meanwhile, never its order, so a row's result is
 * bitwise the same alone or among others, on one thread or many. Between instruction sets the last bits differ: avx2 and
 * avx512 fuse multiply and add; portable rounds the product first (build with -ffp-contract=off); avx512bf16, when activations
 * are bf16 too, adds a pair of products per step and takes subnormal inputs and results as zero.
 *
 * This file knows nothing of tensors, of packing, or of when ATen would be the better choice. */
#include "rows.h"

/* TILE_ROWS: as many rows as the registers hold sums for, beside two vectors of weights and a broadcast activation.
 * WIDTH: panels a tile walks at once, so that few rows still have enough independent chains in flight. */
#if LANES == 16
#define TILE_ROWS 12
#define WIDTH(rows) ((rows) <= 2 ? 4 : (rows) <= 4 ? 2 : 1)
#elif LANES == 8
#define TILE_ROWS 6
#define WIDTH(rows) ((rows) == 1 ? 4 : (rows) == 2 ? 2 : 1)
#else
#define TILE_ROWS 6
#define WIDTH(rows) ((rows) == 1 ? 2 : 1)
#endif

enum { PANEL = 16, LINE = 64, VECTORS = PANEL / LANES, MAX_WIDTH = 4, BLOCK_ROWS = 48 };
enum { CHUNK = 96, AHEAD = 32 };   /* lines: a panel's piece that tiles share in the first-level cache; prefetch distance */
enum kind { F32, BF16, BF16_DOT }; /* fp32 weights; bf16 pairs widened to fp32; bf16 pairs dotted with bf16 pairs */

typedef struct {
    const char *weight;
    const float *bias, *x; /* x: the block's rows as words, `pitch` apart */
    char *y;
    long in, out, steps, pitch;
    int rows, tiles, least, larger; /* rows of a tile: `least`, the first `larger` of them one more */
    enum form y_form;
    enum kind kind;
} job;

/* A line's words as fp32: bf16 pairs give their halves in turn, widened exactly. */
INLINE bits half(const enum kind kind, const int h, bits w) { return kind != BF16 ? w : h ? w & 0xffff0000u : w << 16; }

INLINE vec add_product(const enum kind kind, vec x, bits w, vec sum) {
#ifdef __AVX512BF16__
    if (kind == BF16_DOT) return _mm512_dpbf16_ps(sum, (__m512bh)x, (__m512bh)w);
#endif
    (void)kind;
    return multiply_add(x, (vec)w, sum);
}

/* Advance rows x panels x 16 chains by `steps` lines, prefetching from `ahead` at `pace` bytes a step.
 * kind, rows and panels are constants once inlined: `a` lives in registers and the short loops vanish. */
INLINE void tile(const enum kind kind, const int rows, const int panels, const char *w, long stride, const char *ahead, long pace,
                 const float *x, long pitch, long steps, float *sums) {
    vec a[TILE_ROWS][MAX_WIDTH * VECTORS];
    const int vectors = panels * VECTORS, halves = kind == BF16 ? 2 : 1;
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) a[r][v] = (vec)load(sums + (r * vectors + v) * LANES);
    for (; steps > 0; steps--, w += LINE, ahead += pace, x += halves) {
#pragma GCC unroll 4
        for (int p = 0; p < panels; p++) __builtin_prefetch(ahead + p * stride);
        if (rows <= 2) { /* few rows: load a line once for both its halves */
            vec b[2][2];
#pragma GCC unroll 2
            for (int r = 0; r < rows; r++)
#pragma GCC unroll 2
                for (int h = 0; h < halves; h++) b[r][h] = broadcast(x + r * pitch + h);
#pragma GCC unroll 16
            for (int v = 0; v < vectors; v++) {
                bits q = load(w + (v / VECTORS) * stride + (v % VECTORS) * 4 * LANES);
                if (rows * halves > 1) KEEP(q);
#pragma GCC unroll 2
                for (int h = 0; h < halves; h++)
#pragma GCC unroll 2
                    for (int r = 0; r < rows; r++) a[r][v] = add_product(kind, b[r][h], half(kind, h, q), a[r][v]);
            }
        } else { /* many rows: load an activation once for all the vectors of a line */
#pragma GCC unroll 2
            for (int h = 0; h < halves; h++) {
                bits q[MAX_WIDTH * VECTORS];
#pragma GCC unroll 16
                for (int v = 0; v < vectors; v++) {
                    q[v] = half(kind, h, load(w + (v / VECTORS) * stride + (v % VECTORS) * 4 * LANES));
                    KEEP(q[v]);
                }
#pragma GCC unroll 16
                for (int r = 0; r < rows; r++) {
                    const vec b = broadcast(x + r * pitch + h);
#pragma GCC unroll 16
                    for (int v = 0; v < vectors; v++) a[r][v] = add_product(kind, b, q[v], a[r][v]);
                }
            }
        }
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 16
        for (int v = 0; v < vectors; v++) memcpy(sums + (r * vectors + v) * LANES, &a[r][v], sizeof(vec));
}

typedef void tile_function(int rows, int panels, const char *w, long stride, const char *ahead, long pace, const float *x,
                           long pitch, long steps, float *sums);
#define WIDE(kind, rows, wide) \
    if (WIDTH(rows) >= wide && panels == wide) tile(kind, rows, wide, w, stride, ahead, pace, x, pitch, steps, sums); \
    else
#define CASE(kind, rows) \
    case rows: \
        WIDE(kind, rows, 4) WIDE(kind, rows, 3) WIDE(kind, rows, 2) tile(kind, rows, 1, w, stride, ahead, pace, x, pitch, steps, sums); \
        break;
#if TILE_ROWS == 12
#define MORE_CASES(kind) CASE(kind, 7) CASE(kind, 8) CASE(kind, 9) CASE(kind, 10) CASE(kind, 11) CASE(kind, 12)
#else
#define MORE_CASES(kind)
#endif
#define TILES(name, kind) \
    static void name(int rows, int panels, const char *w, long stride, const char *ahead, long pace, const float *x, long pitch, \
                     long steps, float *sums) { \
        switch (rows) { CASE(kind, 1) CASE(kind, 2) CASE(kind, 3) CASE(kind, 4) CASE(kind, 5) CASE(kind, 6) MORE_CASES(kind) } \
    }
TILES(tile_f32, F32)
TILES(tile_bf16, BF16)
#ifdef __AVX512BF16__
TILES(tile_dot, BF16_DOT)
#else
#define tile_dot tile_bf16
#endif

INLINE void finish(const job *j, const enum form form, long first, long width, const float *sums) {
    const long count = j->out - first < width ? j->out - first : width;
    for (long r = 0; r < j->rows; r++, sums += width) {
        char *to = j->y + (r * j->out + first) * size_of(form);
        EACH(o, n, count) {
            const vec sum = (vec)load(sums + o);
            store(to, o, n, j->bias ? sum + fetch(j->bias + first, o, n, FLOAT) : sum, form);
        }
    }
}

static int tile_rows(const job *j, int t) { return j->least + (t < j->larger); }

/* Panels for the next tile of so many rows: as many as it walks at once, the last ones in even groups. */
static long group(int rows, long left) {
    const long widest = WIDTH(rows);
    return left >= 2 * widest || left == widest ? widest : left > widest ? (left + 1) / 2 : left;
}

/* The block's rows times panels first..last. One tile runs down whole panels; several take turns on chunks, each prefetching
 * its share of the next chunk. Near the end of a wide group its panels' next lines are the following group's first. */
static void compute(const job *j, long first, long last) {
    float sums[BLOCK_ROWS * PANEL];
    tile_function *const advance = j->kind == F32 ? tile_f32 : j->kind == BF16 ? tile_bf16 : tile_dot;
    const long stride = j->steps * LINE, words = j->kind == BF16 ? 2 : 1, pace = (LINE + j->tiles - 1) / j->tiles;
    for (long p = first, panels; p < last; p += panels) {
        panels = j->tiles == 1 ? group(j->rows, last - p) : 1;
        const char *w = j->weight + p * stride;
        const long ahead = j->tiles > 1 ? CHUNK : AHEAD / panels;
        const long body = panels > 1 && j->steps > ahead ? j->steps - ahead : j->steps;
        memset(sums, 0, j->rows * panels * LINE);
        for (long s = 0, n; s < j->steps; s += n) {
            n = j->tiles > 1 ? CHUNK : s == 0 ? body : ahead;
            if (n > j->steps - s) n = j->steps - s;
            const char *next = w + (s + ahead) * LINE + (s + ahead >= j->steps ? (panels - 1) * stride : 0);
            for (int t = 0, row = 0; t < j->tiles; row += tile_rows(j, t++))
                advance(tile_rows(j, t), (int)panels, w + s * LINE, stride, next + t * n * pace, pace,
                        j->x + row * j->pitch + s * words, j->pitch, n, sums + row * panels * PANEL);
        }
        if (j->y_form == NARROW) finish(j, NARROW, p * PANEL, panels * PANEL, sums);
        else finish(j, FLOAT, p * PANEL, panels * PANEL, sums);
    }
}

/* x [rows, in] -> words [rows, pitch] with zeros after the last input: fp32, or pairs of bf16 for BF16_DOT. */
static void spread(const job *j, const void *x, int x_bf16, float *to) {
    for (long r = 0; r < j->rows; r++, to += j->pitch) {
        const uint16_t *narrow = (const uint16_t *)x + r * j->in;
        memset(to + (j->kind == BF16_DOT ? j->in / 2 : j->in), 0, 2 * sizeof(float));
        if (!x_bf16) memcpy(to, (const float *)x + r * j->in, j->in * sizeof(float));
        else if (j->kind == BF16_DOT) memcpy(to, narrow, j->in * sizeof(uint16_t));
        else for (long i = 0; i < j->in; i++) ((uint32_t *)to)[i] = (uint32_t)narrow[i] << 16;
    }
}

static void compute_all(const job *j, int threads) {
    const long panels = skinny_panel_count(j->out);
#ifdef _OPENMP
    if (threads > 1 && !forked && j->rows * j->in * j->out >= PARALLEL) {
#pragma omp parallel num_threads(threads)
        {
            const long t = omp_get_thread_num(), n = omp_get_num_threads();
            compute(j, panels * t / n, panels * (t + 1) / n);
        }
        return;
    }
#endif
    (void)threads;
    compute(j, 0, panels);
}

static enum kind kind_of(int w_bf16, int x_bf16) {
#ifdef __AVX512BF16__
    if (w_bf16 && x_bf16) return BF16_DOT;
#endif
    (void)x_bf16;
    return w_bf16 ? BF16 : F32;
}

long skinny_pitch(long in) { return in + 17; } /* off the powers of two, at which all rows would share one set of the cache */
long skinny_panel_count(long out) { return (out + PANEL - 1) / PANEL; }
enum form skinny_form(int bf16) { return !bf16 ? FLOAT : kind_of(1, 1) == BF16_DOT ? NARROW : ROUNDED; }

static void set_rows(job *j, long rows) {
    j->rows = (int)(rows < BLOCK_ROWS ? rows : BLOCK_ROWS);
    j->tiles = (j->rows + TILE_ROWS - 1) / TILE_ROWS;
    j->least = j->rows / j->tiles;
    j->larger = j->rows % j->tiles;
}

/* Panels first..last of a layer whose weight, words and results y [rows, out] are all bf16 or all fp32. */
void skinny_panels(const void *weight, const float *bias, const float *words, void *y, long rows, long in, long out, int bf16,
                   long first, long last) {
    job j = {.weight = weight, .bias = bias, .in = in, .out = out, .y_form = stored(bf16), .kind = kind_of(bf16, bf16)};
    j.steps = bf16 ? (in + 1) / 2 : in;
    j.pitch = skinny_pitch(in);
    for (long row = 0; row < rows; row += j.rows) {
        set_rows(&j, rows - row);
        j.x = words + row * j.pitch;
        j.y = (char *)y + row * out * size_of(j.y_form);
        compute(&j, first, last);
    }
}

/* weight: panels of bf16 or fp32; bias: fp32 or NULL; x [rows, in] and y [rows, out]: contiguous, both bf16 or both fp32.
 * Returns 0, or -1 where memory for the activations is lacking. */
int skinny_linear(const void *weight, const float *bias, const void *x, void *y, long rows, long in, long out, int w_bf16,
                  int x_bf16, int threads) {
    const long size = x_bf16 ? 2 : 4, block = rows < BLOCK_ROWS ? rows : BLOCK_ROWS;
    job j = {.weight = weight, .bias = bias, .in = in, .out = out, .y_form = stored(x_bf16), .kind = kind_of(w_bf16, x_bf16)};
    j.steps = w_bf16 ? (in + 1) / 2 : in;
    j.pitch = skinny_pitch(in);
    float local[8192], *heap = NULL, *words = local;
    if (block * j.pitch > 8192 && !(words = heap = malloc(block * j.pitch * sizeof(float)))) return -1;
    j.x = words;
    for (long row = 0; row < rows; row += j.rows) {
        set_rows(&j, rows - row);
        j.y = (char *)y + row * out * size;
        spread(&j, (const char *)x + row * in * size, x_bf16, words);
        compute_all(&j, threads);
    }
    free(heap);
    return 0;
}
