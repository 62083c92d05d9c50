/* Which instruction set the kernels were built for, and whether this process is a forked child. */
#include "vector.h"
#ifdef _OPENMP
#include <pthread.h>
#endif

int forked;
#ifdef _OPENMP
static void after_fork(void) { forked = 1; }
__attribute__((constructor)) static void watch_forks(void) { pthread_atfork(NULL, NULL, after_fork); }
#endif

const char *instruction_set(void) {
#if defined(__AVX512BF16__)
    return "avx512bf16";
#elif LANES == 16
    return "avx512";
#elif LANES == 8
    return "avx2";
#else
    return "portable";
#endif
}
