// The loops of `kernels.hpp` for vectors of SEEKFORGE_LANES floats, as the symbol SEEKFORGE_KERNELS.
//
// Compiled with instructions that not every processor has, so nothing here may be an inline function of the standard
// library: the linker would keep one copy for all callers. GCC's and Clang's vector types are the same on all
// processors. Products are of rows that lie apart (a paged cache), which no product of ONNX Runtime takes, and of a few
// rows with a matrix that is no constant of a node, which ONNX Runtime would pack anew in every call.
#include "kernels.hpp"

#include <float.h>
#include <math.h>
#include <string.h>

namespace seekforge {
namespace {

constexpr size_t L = SEEKFORGE_LANES;
typedef float V __attribute__((vector_size(SEEKFORGE_LANES * 4)));
typedef int32_t I __attribute__((vector_size(SEEKFORGE_LANES * 4)));

inline V load(const float* p) {
    V v;
    memcpy(&v, p, sizeof v);
    return v;
}
inline void store(float* p, V v) { memcpy(p, &v, sizeof v); }
inline V all(float x) { return x - V{}; }

template <size_t... N>
struct Lanes {};
template <size_t N, size_t... Rest>
struct MakeLanes : MakeLanes<N - 1, N - 1, Rest...> {};
template <size_t... Rest>
struct MakeLanes<0, Rest...> {
    using type = Lanes<Rest...>;
};

// Lane i gets the sum of lanes i and i ^ S, of `a` where bit S of i is 0 and of `b` where it is 1.
template <size_t S, size_t... N>
inline V fold(V a, V b, Lanes<N...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, ((N & S) ? L + N : N)...) +
           __builtin_shufflevector(a, b, ((N & S) ? L + (N ^ S) : (N ^ S))...);
#else
    const I low = {int32_t((N & S) ? L + N : N)...}, high = {int32_t((N & S) ? L + (N ^ S) : (N ^ S))...};
    return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}

// The sums of L vectors: lane i is the sum of all lanes of v[i].
inline V sums_of_all(V* v) {
    size_t count = L;
    // the first fold pairs neighbors by bit 1, the next by bit 2, …
    if constexpr (L >= 2) {
        for (size_t i = 0; i < count / 2; ++i) v[i] = fold<1>(v[2 * i], v[2 * i + 1], typename MakeLanes<L>::type{});
        count /= 2;
    }
    if constexpr (L >= 4) {
        for (size_t i = 0; i < count / 2; ++i) v[i] = fold<2>(v[2 * i], v[2 * i + 1], typename MakeLanes<L>::type{});
        count /= 2;
    }
    if constexpr (L >= 8) {
        for (size_t i = 0; i < count / 2; ++i) v[i] = fold<4>(v[2 * i], v[2 * i + 1], typename MakeLanes<L>::type{});
        count /= 2;
    }
    if constexpr (L >= 16) {
        for (size_t i = 0; i < count / 2; ++i) v[i] = fold<8>(v[2 * i], v[2 * i + 1], typename MakeLanes<L>::type{});
        count /= 2;
    }
    return v[0];
}
inline float sum(V v) {
    float lanes[L];
    memcpy(lanes, &v, sizeof v);
    for (size_t n = L / 2; n; n /= 2) {
        for (size_t i = 0; i < n; ++i) lanes[i] += lanes[i + n];
    }
    return lanes[0];
}

constexpr size_t kHeads = 4, kRows = L / 4;  // a tile: as many sums as there are lanes
constexpr size_t kLine = 16;                 // floats of a line of the processor's caches

void dots(const float* q, size_t q_stride, size_t heads, const float* const* rows, size_t count, size_t known,
          size_t width, float* out, size_t out_stride) {
    const size_t whole = width / L * L;
    for (size_t j = 0; j < count; j += kRows) {
        const size_t here = count - j < kRows ? count - j : kRows;
        const float *keys[kRows], *later[kRows];
        for (size_t r = 0; r < kRows; ++r) {
            const size_t next = j + r + kRowsAhead;
            keys[r] = rows[j + (r < here ? r : 0)];
            later[r] = rows[next < known ? next : known - 1];
        }
        for (size_t h = 0; h < heads; h += kHeads) {
            const size_t some = heads - h < kHeads ? heads - h : kHeads;
            const float* queries[kHeads];
            for (size_t i = 0; i < kHeads; ++i) queries[i] = q + (h + (i < some ? i : 0)) * q_stride;
            V tile[L];
            for (size_t i = 0; i < L; ++i) tile[i] = V{};
            for (size_t d = 0; d < whole; d += L) {
                if (h == 0 && d % kLine == 0) {  // into the second cache: what is worked on stays in the first
                    for (size_t r = 0; r < kRows; ++r) __builtin_prefetch(later[r] + d, 0, 2);
                }
                V key[kRows];
                for (size_t r = 0; r < kRows; ++r) key[r] = load(keys[r] + d);
                for (size_t i = 0; i < kHeads; ++i) {
                    const V query = load(queries[i] + d);
                    for (size_t r = 0; r < kRows; ++r) tile[i * kRows + r] += query * key[r];
                }
            }
            float result[L];
            store(result, sums_of_all(tile));
            for (size_t d = whole; d < width; ++d) {
                for (size_t i = 0; i < kHeads; ++i) {
                    for (size_t r = 0; r < kRows; ++r) result[i * kRows + r] += queries[i][d] * keys[r][d];
                }
            }
            for (size_t i = 0; i < some; ++i) {
                for (size_t r = 0; r < here; ++r) out[(h + i) * out_stride + j + r] = result[i * kRows + r];
            }
        }
    }
}

constexpr size_t kColumns = L >= 16 ? 4 : 2;  // vectors of columns that a tile of `add_weighted` holds

void add_weighted(const float* w, size_t w_stride, size_t heads, const float* const* rows, size_t count, size_t width,
                  float* out, size_t out_stride) {
    const size_t whole = width / (kColumns * L) * (kColumns * L);
    size_t h = 0;
    for (; h + kHeads <= heads; h += kHeads) {
        for (size_t d = 0; d < whole; d += kColumns * L) {
            V tile[kHeads][kColumns];
            for (size_t i = 0; i < kHeads; ++i) {
                for (size_t c = 0; c < kColumns; ++c) tile[i][c] = load(out + (h + i) * out_stride + d + c * L);
            }
            for (size_t j = 0; j < count; ++j) {
                V value[kColumns];
                for (size_t c = 0; c < kColumns; ++c) value[c] = load(rows[j] + d + c * L);
                for (size_t i = 0; i < kHeads; ++i) {
                    const V weight = all(w[(h + i) * w_stride + j]);
                    for (size_t c = 0; c < kColumns; ++c) tile[i][c] += weight * value[c];
                }
            }
            for (size_t i = 0; i < kHeads; ++i) {
                for (size_t c = 0; c < kColumns; ++c) store(out + (h + i) * out_stride + d + c * L, tile[i][c]);
            }
        }
    }
    for (size_t rest = 0; rest < heads; ++rest) {
        float* sums_of = out + rest * out_stride;
        for (size_t d = rest < h ? whole : 0; d < width; ++d) {
            float total = sums_of[d];
            for (size_t j = 0; j < count; ++j) total += w[rest * w_stride + j] * rows[j][d];
            sums_of[d] = total;
        }
    }
}

constexpr size_t kDepth = 4;  // rows of the matrix that `few_rows` adds at a time, while its sums are in vectors

void few_rows(const float* x, size_t x_stride, size_t rows, const float* w, size_t w_stride, size_t depth, size_t width,
              float* out, size_t out_stride) {
    const size_t whole = width / L * L, deep = depth / kDepth * kDepth;
    for (size_t r = 0; r < rows; ++r) memset(out + r * out_stride, 0, width * sizeof(float));
    for (size_t k = 0; k < deep; k += kDepth) {
        const float *const w0 = w + k * w_stride, *const w1 = w0 + w_stride, *const w2 = w1 + w_stride,
                    *const w3 = w2 + w_stride;
        for (size_t r = 0; r < rows; ++r) {
            const float* const by = x + r * x_stride + k;
            float* const sums_of = out + r * out_stride;
            for (size_t n = 0; n < whole; n += L) {
                V total = load(sums_of + n);
                total += by[0] * load(w0 + n);
                total += by[1] * load(w1 + n);
                total += by[2] * load(w2 + n);
                total += by[3] * load(w3 + n);
                store(sums_of + n, total);
            }
            for (size_t n = whole; n < width; ++n) {
                sums_of[n] = sums_of[n] + by[0] * w0[n] + by[1] * w1[n] + by[2] * w2[n] + by[3] * w3[n];
            }
        }
    }
    for (size_t k = deep; k < depth; ++k) {
        for (size_t r = 0; r < rows; ++r) {
            for (size_t n = 0; n < width; ++n) out[r * out_stride + n] += x[r * x_stride + k] * w[k * w_stride + n];
        }
    }
}

// exp to about one unit in the last place, for x ≤ 88; below −87 it is 0 but for 1e-38.
inline V exp_of(V x) {
    const V lowest = all(-87.0f);
    x = (x < lowest) ? lowest : x;
    const V magic = all(12582912.0f);  // 1.5 · 2^23: adding it rounds to a whole number
    const V n = (x * 1.44269504f + magic) - magic;
    const V r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    V p = all(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const I power = (__builtin_convertvector(n, I) + 127) << 23;
    V factor;
    memcpy(&factor, &power, sizeof factor);
    return p * factor;
}

// Applies a function of vectors to the last values, fewer than L.
template <class Function>
inline void tail(const float* x, size_t count, float filler, float* out, const Function& function) {
    float lanes[L];
    for (size_t i = 0; i < L; ++i) lanes[i] = i < count ? x[i] : filler;
    store(lanes, function(load(lanes)));
    memcpy(out, lanes, count * sizeof(float));
}

float exp_sum(float* x, size_t count, float shift) {
    V total{};
    size_t i = 0;
    for (; i + L <= count; i += L) {
        const V e = exp_of(load(x + i) - shift);
        store(x + i, e);
        total += e;
    }
    float result = sum(total);
    if (i < count) {
        tail(x + i, count - i, shift, x + i, [shift](V v) { return exp_of(v - shift); });
        for (; i < count; ++i) result += x[i];
    }
    return result;
}

float largest(const float* x, size_t count) {
    float result = -INFINITY;
    for (size_t i = 0; i < count; ++i) result = x[i] > result ? x[i] : result;
    return result;
}

void scale(float* x, size_t count, float by) {
    for (size_t i = 0; i < count; ++i) x[i] *= by;
}

void head_scores(const float* dots, size_t stride, size_t heads, const float* w, size_t count, float* out) {
    for (size_t j = 0; j < count; ++j) out[j] = 0.0f;
    for (size_t h = 0; h < heads; ++h) {
        const float* line = dots + h * stride;
        const float weight = w[h];
        for (size_t j = 0; j < count; ++j) out[j] += weight * (line[j] < 0.0f ? 0.0f : line[j]);
    }
    for (size_t j = 0; j < count; ++j) {
        float x = out[j];
        x = x != x ? -FLT_MAX : x;
        x = x > FLT_MAX ? FLT_MAX : x;
        x = x < -FLT_MAX ? -FLT_MAX : x;
        out[j] = x + 0.0f;  // no negative zero: it ties with zero
    }
}

inline float of_bits(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}
inline uint32_t bits_of(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

void fake_quantize(const float* x, size_t count, float* out) {
    for (size_t start = 0; start < count; start += kFp8Block) {
        float amax = 0.0f;
        for (size_t i = start; i < start + kFp8Block; ++i) {
            const float magnitude = fabsf(x[i]);
            amax = magnitude > amax ? magnitude : amax;
        }
        const uint32_t share = bits_of((amax > 1e-4f ? amax : 1e-4f) * of_bits(0x3B124925));  // 1 / 448
        int exponent = int(share >> 23) - 127 + ((share & 0x7FFFFF) != 0);
        exponent = exponent < -22 ? -22 : exponent > 120 ? 120 : exponent;
        const float up = of_bits(uint32_t(exponent + 127) << 23), down = of_bits(uint32_t(127 - exponent) << 23);
        for (size_t i = start; i < start + kFp8Block; ++i) {
            const float v = x[i] * down;
            const uint32_t bits = bits_of(v);
            const float normal = of_bits((bits + 0x7FFFF + ((bits >> 20) & 1)) & 0xFFF00000);  // 3 bits of mantissa
            const float steps = (fabsf(v) + 16384.0f) - 16384.0f;  // of 2^-9
            const float small = of_bits(bits_of(steps) | (bits & 0x80000000u));
            out[i] = (fabsf(v) < 0.015625f ? small : normal) * up;
        }
    }
}

void rms_norm(const float* x, const float* w, size_t count, float eps, float* out) {
    V squares{};
    size_t i = 0;
    for (; i + L <= count; i += L) squares += load(x + i) * load(x + i);
    float total = sum(squares);
    for (; i < count; ++i) total += x[i] * x[i];
    const float by = 1.0f / sqrtf(total / float(count) + eps);
    for (i = 0; i < count; ++i) out[i] = x[i] * by * w[i];
}

void layer_norm(const float* x, const float* w, const float* b, size_t count, float eps, float* out) {
    V sums_of{};
    size_t i = 0;
    for (; i + L <= count; i += L) sums_of += load(x + i);
    float total = sum(sums_of);
    for (; i < count; ++i) total += x[i];
    const float mean = total / float(count);
    V squares{};
    for (i = 0; i + L <= count; i += L) {
        const V apart = load(x + i) - mean;
        squares += apart * apart;
    }
    float spread = sum(squares);
    for (; i < count; ++i) spread += (x[i] - mean) * (x[i] - mean);
    const float by = 1.0f / sqrtf(spread / float(count) + eps);
    for (i = 0; i < count; ++i) out[i] = (x[i] - mean) * by * w[i] + b[i];
}

// gate / (1 + exp(−gate)) · up, with the exponential of a number that is never positive.
inline V swiglu_of(V gate, V up) {
    const V e = exp_of(gate < 0.0f ? gate : -gate);
    const V share = (gate < 0.0f ? e : all(1.0f)) / (e + 1.0f);
    return gate * share * up;
}

void swiglu(const float* gate, const float* up, size_t count, float* out) {
    size_t i = 0;
    for (; i + L <= count; i += L) store(out + i, swiglu_of(load(gate + i), load(up + i)));
    if (i < count) {
        float lanes[2][L] = {};
        memcpy(lanes[0], gate + i, (count - i) * sizeof(float));
        memcpy(lanes[1], up + i, (count - i) * sizeof(float));
        store(lanes[0], swiglu_of(load(lanes[0]), load(lanes[1])));
        memcpy(out + i, lanes[0], (count - i) * sizeof(float));
    }
}

void add(const float* a, const float* b, size_t count, float* out) {
    for (size_t i = 0; i < count; ++i) out[i] = a[i] + b[i];
}

}  // namespace

extern const Kernels SEEKFORGE_KERNELS;
const Kernels SEEKFORGE_KERNELS = {dots,        add_weighted,  few_rows, exp_sum,    largest, scale,
                                   head_scores, fake_quantize, rms_norm, layer_norm, swiglu,  add};

}  // namespace seekforge
