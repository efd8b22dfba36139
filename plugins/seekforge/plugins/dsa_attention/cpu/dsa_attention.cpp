// `DsaAttention` for ONNX Runtime on a CPU, f32: the chosen rows are read where they lie, none is copied. `HeadAttention`
// is the same with the heads first.
#include "latent_attention.hpp"

namespace seekforge {
namespace {

// The keys that a token chose.
struct Chosen {
    const PagedRows& cache;
    int64_t sequence;
    const int32_t* positions;
    int64_t count;
    std::vector<int32_t> packed;

    Chosen(const PagedRows& cache, int64_t sequence, const int32_t* indices, int64_t topk)
        : cache(cache), sequence(sequence), positions(indices), count(0) {
        while (count < topk && indices[count] >= 0) ++count;
        for (int64_t j = count; j < topk; ++j) {  // −1 is no key, wherever it stands; the indexer's come last
            if (indices[j] < 0) continue;
            if (packed.empty()) packed.assign(indices, indices + count);
            packed.push_back(indices[j]);
        }
        if (!packed.empty()) count = int64_t(packed.size());
    }
    const float* row(int64_t j) const { return cache.row(sequence, packed.empty() ? positions[j] : packed[j]); }
};

template <bool kHeadsFirst>
struct Attention : LatentAttention<kHeadsFirst, ort::Type::kI32> {
    static constexpr const char* kName = kHeadsFirst ? "HeadAttention" : "DsaAttention";
    using LatentAttention<kHeadsFirst, ort::Type::kI32>::LatentAttention;

    void compute(Call& call) const {
        const Queries q(call, kHeadsFirst);
        const Tensor chosen = call.input(4, 3, "topk_indices is not [B, Q, TOPK]");
        const int64_t topk = chosen.size(2);
        require(chosen.size(0) == q.batch && chosen.size(1) == q.queries, "sizes of the inputs do not agree");
        const PagedRows keys = this->paged_rows(call, q);
        const int32_t* indices = chosen.as<int32_t>();
        for (int64_t i = 0; i < chosen.count(); ++i) {
            require(indices[i] < keys.positions(), "topk_indices names a position that the block table has not");
        }
        attend_all(call, q, this->scale, q.tokens() * topk, [&](int64_t token) {
            return Chosen(keys, token / q.queries, indices + token * topk, topk);
        });
    }
};

}  // namespace

const ort::CustomOp* dsa_attention() { return registered<Attention<false>>(); }
const ort::CustomOp* head_attention() { return registered<Attention<true>>(); }

}  // namespace seekforge
