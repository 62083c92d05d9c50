/* What the kernels share: vectors of this instruction set, bfloat16, and threads that survive a fork. */
#ifndef FEWSTEP_VECTOR_H
#define FEWSTEP_VECTOR_H
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif
#ifdef _OPENMP
#include <omp.h>
#endif

#define INLINE static inline __attribute__((always_inline))

#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX2__) && defined(__FMA__)
#define LANES 8
#else
#define LANES 4
#endif

enum { PARALLEL = 1 << 18 }; /* multiply-adds below which a second thread costs more than it saves */

typedef float vec __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));

#if LANES == 16
INLINE vec multiply_add(vec a, vec b, vec c) { return _mm512_fmadd_ps(a, b, c); }
INLINE vec all(float f) { return _mm512_set1_ps(f); }
#define KEEP(v) __asm__("" : "+v"(v))
#elif LANES == 8
INLINE vec multiply_add(vec a, vec b, vec c) { return _mm256_fmadd_ps(a, b, c); }
INLINE vec all(float f) { return _mm256_set1_ps(f); }
#define KEEP(v) __asm__("" : "+x"(v)) /* in a register: left alone, gcc loads it anew for every row that uses it */
#else
INLINE vec multiply_add(vec a, vec b, vec c) { return a * b + c; }
INLINE vec all(float f) { return (vec){f, f, f, f}; }
#define KEEP(v) (void)(v)
#endif

INLINE bits load(const void *p) {
    bits v;
    memcpy(&v, p, sizeof v);
    return v;
}

INLINE vec broadcast(const float *p) { return all(*p); }

typedef int32_t mask __attribute__((vector_size(4 * LANES)));

#if LANES == 8
INLINE vec choose(mask m, vec yes, vec no) { return _mm256_blendv_ps(no, yes, (vec)m); }
INLINE vec larger(vec a, vec b) { return _mm256_max_ps(a, b); }
#else
INLINE vec choose(mask m, vec yes, vec no) { return (vec)(((bits)m & (bits)yes) | (~(bits)m & (bits)no)); }
INLINE vec larger(vec a, vec b) { return choose(a > b, a, b); } /* b where either is NaN */
#endif

/* e^x to about one unit in the last place; 0 below -87, where float32 ends; NaN stays NaN. */
INLINE vec exponential(vec x) {
    const vec shift = all(0x1.8p23f);                             /* pushes a float's whole part into its last bits */
    const vec turns = multiply_add(x, all(0x1.715476p+0f), shift); /* x / ln 2, rounded */
    const vec n = turns - shift;
    vec r = multiply_add(n, all(-0x1.62e4p-1f), x);               /* ln 2 in two parts: the first times n is exact */
    r = multiply_add(n, all(-0x1.7f7d1cp-20f), r);
    vec p = all(0x1.6850e4p-10f);
    p = multiply_add(p, r, all(0x1.123bccp-7f));
    p = multiply_add(p, r, all(0x1.555b98p-5f));
    p = multiply_add(p, r, all(0x1.55548ep-3f));
    p = multiply_add(p, r, all(0x1.fffff8p-2f));
    p = multiply_add(p, r, all(1.0f));
    p = multiply_add(p, r, all(1.0f));
    const vec y = (vec)((bits)p + ((bits)turns << 23));
    return choose(x > all(-87.0f), choose(x < all(88.0f), y, all(INFINITY)), choose(x == x, all(0.0f), x));
}

/* Set in a forked child: it has none of its parent's OpenMP threads and would wait for them for ever, so it computes alone. */
extern int forked;

#endif
