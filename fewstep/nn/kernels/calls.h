/* The kernels that other kernels call. */
#ifndef FEWSTEP_CALLS_H
#define FEWSTEP_CALLS_H
#include <stdint.h>

typedef struct {
    long batch, heads, kv_heads, queries, keys, width;
    long q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row; /* strides in elements */
    long visible_batch, visible_row;
} layout;

int skinny_linear(const void *weight, const float *bias, const void *x, void *y, long rows, long in, long out, int w_bf16, int x_bf16,
                  int threads);
int decode_attention(const void *q, const void *k, const void *v, const void *visible, void *y, const layout *at, float scale, int bf16,
                     int threads);

#endif
