/* The two ends of a call: what a draft module reads, and the best of a row of scores. */
#include "rows.h"

/* y[r,t] = w [norm(a[r,t]); norm(b[r,reads[r,t]])] + bias: a [batch, count, width], b [batch, sources, width], y [batch, count, out],
 * all bf16 or all fp32; reads NULL: b[r,t]. A norm without weight passes its row on. Returns 0, NO_MEMORY, or 1 for a read
 * outside of b. */
int join_rows(const norm *a_norm, const norm *b_norm, const void *weight, const float *bias, const void *a, const void *b,
              const int64_t *reads, void *y, long batch, long count, long sources, long width, long out, int bf16, int threads) {
    const long rows = batch * count, pitch = width * (bf16 ? 2 : 4);
    const enum form form = stored(bf16);
    char *joined = malloc(rows * 2 * pitch + 1), *to = joined;
    if (!joined) return NO_MEMORY;
    int failed = 0;
    for (long r = 0; r < rows && !failed; r++) {
        const long from = reads ? reads[r] : r % count;
        failed = from < 0 || from >= sources;
        if (failed) break;
        const char *sides[2] = {(const char *)a + r * pitch, (const char *)b + (r / count * sources + from) * pitch};
        const norm *by[2] = {a_norm, b_norm};
        for (int side = 0; side < 2; side++, to += pitch)
            if (by[side]->weight) normalise(by[side], sides[side], form, to, form, width);
            else memcpy(to, sides[side], pitch);
    }
    if (!failed && skinny_linear(weight, bias, joined, y, rows, 2 * width, out, bf16, bf16, threads)) failed = NO_MEMORY;
    free(joined);
    return failed;
}

/* y[r] = the index of the largest of x[r] [width], the first of several; a NaN is larger than any number. */
void largest(const void *x, int64_t *y, long rows, long width, int bf16) {
    const enum form form = stored(bf16);
    for (long r = 0; r < rows; r++, x = (const char *)x + width * size_of(form)) {
        vec top = all(-INFINITY);
        mask bad = {0};
        EACH(i, n, width) {
            vec v = fetch(x, i, n, form);
            bad |= v != v;
            if (n < LANES) for (long e = n; e < LANES; e++) v[e] = -INFINITY;
            top = choose(v > top, v, top);
        }
        float best = top[0];
        int nan = bad[0];
        for (int e = 1; e < LANES; e++) {
            best = top[e] > best ? top[e] : best;
            nan |= bad[e];
        }
        long i = 0;
        for (; i < width - 1; i++) {
            const float f = form == FLOAT ? ((const float *)x)[i] : ((union { uint32_t u; float f; }){(uint32_t)((const uint16_t *)x)[i] << 16}).f;
            if (nan ? f != f : f == best) break;
        }
        y[r] = i;
    }
}
