/* RMSNorm of rows, each in one fixed order, so that a row's result is bitwise the same alone or among others. */
#include "rows.h"

/* x [rows, width] and y alike, both bf16 or both fp32; weight [width]. */
void rms_norm(const void *x, const float *weight, void *y, long rows, long width, float eps, int bf16) {
    const norm by = {weight, eps};
    const long pitch = width * (bf16 ? 2 : 4);
    for (long r = 0; r < rows; r++)
        normalise(&by, (const char *)x + r * pitch, stored(bf16), (char *)y + r * pitch, stored(bf16), width);
}
