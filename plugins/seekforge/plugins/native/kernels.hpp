// The inner loops that operators share. `kernels.cpp` is compiled once for each set of vector instructions, and the
// best one that this processor has is taken when the library is first used.
#pragma once

#include <cstddef>
#include <cstdint>

namespace seekforge {

// Values that share a power of two where rows are rounded to FP8 (plugins/quant.py).
constexpr int64_t kFp8Block = 128;

// How many rows before its turn `dots` has a row fetched from memory: at 512 to 2,560 bytes a row 8 to 40 KB, which a
// second cache holds beside all else.
constexpr size_t kRowsAhead = 16;

struct Kernels {
    // out[h * out_stride + j] = Σ_d q[h * q_stride + d] · rows[j][d], for h < heads, j < count, d < width. `rows` has
    // `known` ≥ count rows: those behind are what comes next, and the first kRowsAhead of them are fetched meanwhile.
    void (*dots)(const float* q, size_t q_stride, size_t heads, const float* const* rows, size_t count, size_t known,
                 size_t width, float* out, size_t out_stride);
    // out[h * out_stride + d] += Σ_j w[h * w_stride + j] · rows[j][d].
    void (*add_weighted)(const float* w, size_t w_stride, size_t heads, const float* const* rows, size_t count,
                         size_t width, float* out, size_t out_stride);
    // out[r * out_stride + n] = Σ_k x[r * x_stride + k] · w[k * w_stride + n], for r < rows, k < depth, n < width. For few
    // rows: w is read once, row after row, and what a row gives does not depend on how many there are.
    void (*few_rows)(const float* x, size_t x_stride, size_t rows, const float* w, size_t w_stride, size_t depth,
                     size_t width, float* out, size_t out_stride);
    // x[i] = exp(x[i] − shift), and the sum of all; for x[i] ≤ shift.
    float (*exp_sum)(float* x, size_t count, float shift);
    float (*largest)(const float* x, size_t count);  // NaN is passed over
    void (*scale)(float* x, size_t count, float by);
    // out[j] = Σ_h w[h] · max(dots[h * stride + j], 0), NaN kept; then NaN to the lowest, infinities to the largest.
    void (*head_scores)(const float* dots, size_t stride, size_t heads, const float* w, size_t count, float* out);
    // Rounds to e4m3 with one power of two per kFp8Block values, and back (plugins/quant.py: fake_quantize). In place too.
    void (*fake_quantize)(const float* x, size_t count, float* out);
    // out = w · x / √(mean x² + eps).
    void (*rms_norm)(const float* x, const float* w, size_t count, float eps, float* out);
    // out = w · (x − mean) / √(variance + eps) + b.
    void (*layer_norm)(const float* x, const float* w, const float* b, size_t count, float eps, float* out);
    // out = silu(gate) · up.
    void (*swiglu)(const float* gate, const float* up, size_t count, float* out);
    void (*add)(const float* a, const float* b, size_t count, float* out);
};

const Kernels& kernels();

}  // namespace seekforge
