// Softmax attention of some heads of one query to rows of a latent cache, 64 keys at a time.
#pragma once

#include <cmath>

#include "kernels.hpp"
#include "paged.hpp"

namespace seekforge {

// Heads that share a pass over the keys; a thread takes so many.
constexpr int64_t kHeadsOfPass = 8;
// Multiplications below which other threads are not woken.
constexpr int64_t kWorthThreads = 200000;

// Where the queries of a step lie: [B, Q, H, C], or with the heads first, [H, B · Q, C], as products per head have them.
struct Queries {
    Tensor latent, pe;
    int64_t batch, queries, heads, latent_dim, rope;
    bool heads_first;

    Queries(const Call& call, bool heads_first)
        : latent(call.input(0, heads_first ? 3 : 4, "the latent queries have another rank")),
          pe(call.input(1, 4, "q_pe is not [B, Q, H, R]")),
          batch(pe.size(0)),
          queries(pe.size(1)),
          heads(pe.size(2)),
          latent_dim(latent.size(latent.rank - 1)),
          rope(pe.size(3)),
          heads_first(heads_first) {
        const bool agree = heads_first ? latent.size(0) == heads && latent.size(1) == tokens()
                                       : latent.size(0) == batch && latent.size(1) == queries && latent.size(2) == heads;
        require(agree, "the latent queries and q_pe have other sizes");
    }
    int64_t tokens() const { return batch * queries; }
    int64_t place(int64_t token, int64_t head) const {
        return (heads_first ? head * tokens() + token : token * heads + head) * latent_dim;
    }
    int64_t head_stride() const { return (heads_first ? tokens() : 1) * latent_dim; }
};

// What the attention operators have in common; `kKeys` is the type of the input that says which keys a token has.
template <bool kHeadsFirst, ort::Type kKeys>
struct LatentAttention {
    static constexpr ort::Type kInputs[] = {ort::Type::kF32, ort::Type::kF32, ort::Type::kF32, ort::Type::kI32, kKeys};
    static constexpr size_t kNumOutputs = kHeadsFirst ? 3 : 1;
    static constexpr ort::Type kOutputs[] = {ort::Type::kF32, ort::Type::kF32, ort::Type::kF32};

    explicit LatentAttention(const Attributes& attributes) : scale(attributes.number("scale")) {}

    // The paged rows, whose sizes must be those of the queries.
    static PagedRows paged_rows(const Call& call, const Queries& q) {
        const Tensor cache = call.input(2, 2, "latent_cache is not [NB·64, C+R]");
        const Tensor table = call.input(3, 2, "block_table is not [B, MB]");
        require(cache.size(1) == q.latent_dim + q.rope && table.size(0) == q.batch,
                "sizes of the inputs do not agree");
        return PagedRows(cache, table);
    }

    float scale;
};

// Writes o[h, 0:latent] = Σ_j softmax_j(scale · q_h · key_j) · key_j[0:latent] for `heads` heads.
//
// The sum is that of a running softmax, block after block of 64 keys in the order in which they are given: it depends
// on the query and its keys alone, not on what else a step holds.
//
// Args:
//   q_latent, q_pe: [heads, latent], rows `stride` apart as those of `o`, and [heads, rope].
//   keys: has `count`, without any of which the result is 0, and row(j) of latent + rope values.
template <class Keys>
void attend(const float* q_latent, const float* q_pe, int64_t stride, int64_t heads, int64_t latent, int64_t rope,
            float scale, const Keys& keys, float* o) {
    const Kernels& loops = kernels();
    const int64_t width = latent + rope;
    float* query = scratch(heads * (width + kBlockSize));
    float* score = query + heads * width;
    float top[kHeadsOfPass], total[kHeadsOfPass];
    for (int64_t h = 0; h < heads; ++h) {
        std::memcpy(query + h * width, q_latent + h * stride, latent * sizeof(float));
        std::memcpy(query + h * width + latent, q_pe + h * rope, rope * sizeof(float));
        std::memset(o + h * stride, 0, latent * sizeof(float));
        top[h] = -INFINITY;
        total[h] = 0.0f;
    }
    loops.scale(query, heads * width, scale);
    const float* rows[kBlockSize + kRowsAhead];
    for (int64_t start = 0; start < keys.count; start += kBlockSize) {
        const int64_t here = keys.count - start < kBlockSize ? keys.count - start : kBlockSize;
        const int64_t left = keys.count - start, most = kBlockSize + int64_t(kRowsAhead);
        const int64_t known = left < most ? left : most;
        for (int64_t j = 0; j < known; ++j) rows[j] = keys.row(start + j);
        loops.dots(query, width, heads, rows, here, known, width, score, kBlockSize);
        for (int64_t h = 0; h < heads; ++h) {
            float* line = score + h * kBlockSize;
            const float highest = loops.largest(line, here);
            if (highest > top[h]) {
                const float by = std::exp(top[h] - highest);  // 0 at the first block
                if (start) loops.scale(o + h * stride, latent, by);
                total[h] *= by;
                top[h] = highest;
            }
            total[h] += loops.exp_sum(line, here, top[h]);
        }
        loops.add_weighted(score, kBlockSize, heads, rows, here, latent, o, stride);
    }
    if (keys.count == 0) return;
    for (int64_t h = 0; h < heads; ++h) loops.scale(o + h * stride, latent, 1.0f / total[h]);
}

// Computes the attention of all tokens and writes the outputs of the node.
//
// Args:
//   num_keys: of all tokens together, an estimate.
//   keys_of: token -> its keys.
template <class KeysOf>
void attend_all(Call& call, const Queries& q, float scale, int64_t num_keys, const KeysOf& keys_of) {
    const Tensor o = call.output(0, q.latent.sizes, q.latent.rank);
    const int64_t passes = (q.heads + kHeadsOfPass - 1) / kHeadsOfPass;
    const bool worth = num_keys * q.heads * (2 * q.latent_dim + q.rope) > kWorthThreads;
    call.parallel(q.tokens() * passes, worth, [&](size_t work) {
        const int64_t token = work / passes, first = work % passes * kHeadsOfPass;
        const int64_t some = q.heads - first < kHeadsOfPass ? q.heads - first : kHeadsOfPass;
        attend(q.latent.f32() + q.place(token, first), q.pe.f32() + (token * q.heads + first) * q.rope, q.head_stride(),
               some, q.latent_dim, q.rope, scale, keys_of(token), o.f32() + q.place(token, first));
    });
    if (!q.heads_first) return;
    // what parity looks at: both by tokens
    const Tensor shown[] = {call.output(1, {q.batch, q.queries, q.heads, q.latent_dim}),
                            call.output(2, {q.batch, q.queries, q.heads, q.latent_dim})};
    const float* const sources[] = {q.latent.f32(), o.f32()};
    call.parallel(q.tokens(), q.tokens() > 16, [&](size_t token) {
        for (int side = 0; side < 2; ++side) {
            for (int64_t h = 0; h < q.heads; ++h) {
                std::memcpy(shown[side].f32() + (token * q.heads + h) * q.latent_dim, sources[side] + q.place(token, h),
                            q.latent_dim * sizeof(float));
            }
        }
    });
}

}  // namespace seekforge
