/* Rows of activations a vector at a time: how they are stored, norms, turns and activation functions. */
#ifndef FEWSTEP_ROWS_H
#define FEWSTEP_ROWS_H
#include "calls.h"
#include "vector.h"

typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef halves halves_anywhere __attribute__((aligned(2), may_alias));
typedef bits bits_anywhere __attribute__((aligned(4), may_alias));

#define EACH(i, n, width) for (long i = 0, n; (n = (width)-i < LANES ? (width)-i : LANES) > 0; i += LANES)

INLINE long size_of(enum form form) { return form == NARROW ? 2 : 4; }
INLINE enum form stored(int bf16) { return bf16 ? NARROW : FLOAT; }

INLINE vec widen(const void *from, enum form form) {
    if (form != NARROW) return (vec)load(from);
    bits u; /* in one instruction where gcc would take four */
#if LANES == 16
    u = (bits)_mm512_cvtepu16_epi32(_mm256_loadu_si256(from));
#elif LANES == 8
    u = (bits)_mm256_cvtepu16_epi32(_mm_loadu_si128(from));
#else
    halves h;
    memcpy(&h, from, sizeof h);
    u = __builtin_convertvector(h, bits);
#endif
    return (vec)(u << 16);
}

/* Elements i .. i+n-1 of a row as fp32, zeros behind them; n < LANES at a row's end only. */
INLINE vec fetch(const void *row, long i, long n, enum form form) {
    const long size = size_of(form);
    if (n >= LANES) return widen((const char *)row + i * size, form);
    char tail[4 * LANES] = {0};
    memcpy(tail, (const char *)row + i * size, n * size);
    return widen(tail, form);
}

INLINE void store(void *row, long i, long n, vec v, enum form form) {
    char *to = (char *)row + i * size_of(form);
    bits u = (bits)v;
    if (form != FLOAT) {
        const mask number = v == v;
        u = ((u + 0x7fff + (u >> 16 & 1)) >> 16 & (bits)number) | (0x7fc0 & ~(bits)number); /* to nearest, ties to even */
    }
    if (form == ROUNDED) u <<= 16;
    if (form == NARROW) {
        const halves h = __builtin_convertvector(u, halves);
        if (n >= LANES) *(halves_anywhere *)to = h;
        else { /* by way of memory, and of its own: a whole vector never leaves its register */
            const halves tail = h;
            memcpy(to, &tail, n * 2);
        }
    } else if (n >= LANES) *(bits_anywhere *)to = u;
    else {
        const bits tail = u;
        memcpy(to, &tail, n * 4);
    }
}

INLINE float sum(vec v) {
    float s[LANES];
    memcpy(s, &v, sizeof s);
    for (int n = LANES / 2; n; n /= 2)
        for (int i = 0; i < n; i++) s[i] += s[i + n];
    return s[0];
}

/* y = x weight / sqrt(mean(x x) + eps) for one row; y may be x. */
INLINE void normalise(const norm *by, const void *x, enum form from, void *y, enum form to, long width) {
    vec squares = all(0.0f);
    EACH(i, n, width) {
        const vec v = fetch(x, i, n, from);
        squares = multiply_add(v, v, squares);
    }
    const vec scale = all(1.0f / sqrtf(sum(squares) / (float)width + by->eps));
    EACH(i, n, width) store(y, i, n, fetch(x, i, n, from) * scale * fetch(by->weight, i, n, FLOAT), to);
}

/* One head [width], normed and turned: channels (i, i + width/2) are a pair, `sin` carries the sign. `to` may be `from`;
 * `wide` holds `width` floats. */
INLINE void turn(const norm *by, const void *from, const void *cos, const void *sin, void *to, long width, enum form form,
                 float *wide) {
    if (by->weight) normalise(by, from, form, wide, FLOAT, width);
    else EACH(i, n, width) store(wide, i, n, fetch(from, i, n, form), FLOAT);
    if (!cos) {
        EACH(i, n, width) store(to, i, n, fetch(wide, i, n, FLOAT), form);
        return;
    }
    const long half = width / 2;
    for (long side = 0; side < width; side += half)
        EACH(i, n, half) {
            const vec own = fetch(wide, side + i, n, FLOAT), other = fetch(wide, half - side + i, n, FLOAT);
            const vec turned = multiply_add(own, fetch(cos, side + i, n, form), other * fetch(sin, side + i, n, form));
            store(to, side + i, n, turned, form);
        }
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

INLINE vec swish(vec x) { return x / (all(1.0f) + exponential(-x)); }
INLINE vec gelu(vec x) { return all(0.5f) * x * (all(1.0f) + error_function(x * all(0x1.6a09e6p-1f))); }

#endif
