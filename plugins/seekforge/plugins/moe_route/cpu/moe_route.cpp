// `MoeRoute` for ONNX Runtime on a CPU: one node in place of twenty, each of which costs more than its work. `MoeRouteAll`
// also gives the weights of all experts, as QMoE takes them.
#include <cmath>

#include "op.hpp"

namespace seekforge {
namespace {

// The first of the largest values that are not taken yet; NaN is never one.
int64_t best_left(const float* values, const std::vector<bool>& taken, int64_t count) {
    int64_t best = -1;
    for (int64_t i = 0; i < count; ++i) {
        if (!taken[i] && (best < 0 || values[i] > values[best])) best = i;
    }
    return best;
}

template <bool kAll>
struct Route {
    static constexpr const char* kName = kAll ? "MoeRouteAll" : "MoeRoute";
    static constexpr ort::Type kInputs[] = {ort::Type::kF32, ort::Type::kF32};
    static constexpr size_t kNumOutputs = kAll ? 3 : 2;
    static constexpr ort::Type kOutputs[] = {ort::Type::kI32, ort::Type::kF32, ort::Type::kF32};

    explicit Route(const Attributes& attributes)
        : n_group(attributes.integer("n_group")),
          topk_group(attributes.integer("topk_group")),
          top_k(attributes.integer("top_k")),
          norm(attributes.integer("norm") != 0),
          scale(attributes.number("scale")) {}

    void compute(Call& call) const {
        const Tensor logits = call.input(0, 2, "logits is not [T, E]");
        const Tensor bias = call.input(1, 1, "bias is not [E]");
        const int64_t tokens = logits.size(0), experts = logits.size(1);
        require(bias.count() == experts && n_group > 0 && experts % n_group == 0 && topk_group > 0 && topk_group <= n_group &&
                    top_k > 0 && top_k <= experts,
                "sizes of the inputs do not agree with the attributes");
        const int64_t of_group = experts / n_group;
        const Tensor ids = call.output(0, {tokens, top_k}), weights = call.output(1, {tokens, top_k});
        const Tensor all = kAll ? call.output(2, {tokens, experts}) : Tensor{};
        if (kAll) std::memset(all.f32(), 0, tokens * experts * sizeof(float));
        std::vector<float> score(experts), biased(experts), group(n_group);
        std::vector<bool> taken(experts), kept(n_group);
        for (int64_t t = 0; t < tokens; ++t) {
            for (int64_t e = 0; e < experts; ++e) {
                score[e] = 1.0f / (std::exp(-logits.f32()[t * experts + e]) + 1.0f);
                biased[e] = score[e] + bias.f32()[e];
            }
            for (int64_t g = 0; g < n_group; ++g) {
                float first = -INFINITY, second = -INFINITY;
                for (int64_t e = g * of_group; e < (g + 1) * of_group; ++e) {
                    if (biased[e] > first) {
                        second = first;
                        first = biased[e];
                    } else if (biased[e] > second) {
                        second = biased[e];
                    }
                }
                group[g] = first + second;
            }
            kept.assign(n_group, false);
            for (int64_t i = 0; i < topk_group; ++i) kept[best_left(group.data(), kept, n_group)] = true;
            for (int64_t e = 0; e < experts; ++e) {
                if (!kept[e / of_group]) biased[e] = -INFINITY;
            }
            taken.assign(experts, false);
            float total = 0.0f;
            for (int64_t i = 0; i < top_k; ++i) {
                const int64_t e = best_left(biased.data(), taken, experts);
                taken[e] = true;
                ids.as<int32_t>()[t * top_k + i] = int32_t(e);
                weights.f32()[t * top_k + i] = score[e];
                total += score[e];
            }
            for (int64_t i = 0; i < top_k; ++i) {
                float& weight = weights.f32()[t * top_k + i];
                weight = (norm ? weight / (total + 1e-20f) : weight) * scale;
                if (kAll) all.f32()[t * experts + ids.as<int32_t>()[t * top_k + i]] = weight;
            }
        }
    }

    int64_t n_group, topk_group, top_k;
    bool norm;
    float scale;
};

}  // namespace

const ort::CustomOp* moe_route() { return registered<Route<false>>(); }
const ort::CustomOp* moe_route_all() { return registered<Route<true>>(); }

}  // namespace seekforge
