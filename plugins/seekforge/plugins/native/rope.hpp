// Rotary embedding of the first values of a head, as RotaryEmbedding of ONNX computes it.
#pragma once

#include <cstdint>
#include <cstring>

namespace seekforge {

// Turns x[0:2 · half] into out, which may be x; pairs (2i, 2i + 1), or (i, i + half). cos, sin: [half].
inline void rotate(const float* x, const float* cos, const float* sin, int64_t half, bool interleaved, float* out) {
    for (int64_t i = 0; i < half; ++i) {
        const int64_t first = interleaved ? 2 * i : i, second = interleaved ? 2 * i + 1 : i + half;
        const float a = x[first], b = x[second];
        out[first] = cos[i] * a - sin[i] * b;
        out[second] = sin[i] * a + cos[i] * b;
    }
}

}  // namespace seekforge
