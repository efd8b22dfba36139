// `MlaAttention` for ONNX Runtime on a CPU, f32: every visible row is read where it lies. `HeadMlaAttention` is the same
// with the heads first.
#include "latent_attention.hpp"

namespace seekforge {
namespace {

// The keys up to a token's own.
struct Visible {
    const PagedRows& cache;
    int64_t sequence, count;

    const float* row(int64_t j) const { return cache.row(sequence, j); }
};

template <bool kHeadsFirst>
struct Attention : LatentAttention<kHeadsFirst, ort::Type::kI64> {
    static constexpr const char* kName = kHeadsFirst ? "HeadMlaAttention" : "MlaAttention";
    using LatentAttention<kHeadsFirst, ort::Type::kI64>::LatentAttention;

    void compute(Call& call) const {
        const Queries q(call, kHeadsFirst);
        const Tensor positions = call.input(4, 2, "positions is not [B, Q]");
        require(positions.size(0) == q.batch && positions.size(1) == q.queries, "sizes of the inputs do not agree");
        const PagedRows keys = this->paged_rows(call, q);
        int64_t visible = 0;
        for (int64_t i = 0; i < positions.count(); ++i) {
            const int64_t position = positions.as<int64_t>()[i];
            require(position < keys.positions(), "a position is one that the block table has not");
            visible += position + 1;
        }
        attend_all(call, q, this->scale, visible, [&](int64_t token) {
            const int64_t position = positions.as<int64_t>()[token];
            return Visible{keys, token / q.queries, position < 0 ? 0 : position + 1};
        });
    }
};

}  // namespace

const ort::CustomOp* mla_attention() { return registered<Attention<false>>(); }
const ort::CustomOp* head_mla_attention() { return registered<Attention<true>>(); }

}  // namespace seekforge
