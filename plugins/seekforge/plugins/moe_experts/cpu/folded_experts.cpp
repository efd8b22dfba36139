// `FoldedExperts` for ONNX Runtime on a CPU: in place of a loop over all experts with a branch and fourteen nodes in each,
// two products for every expert that has a token.
#include "kernels.hpp"
#include "product.hpp"

namespace seekforge {
namespace {

struct FoldedExperts {
    static constexpr const char* kName = "FoldedExperts";
    static constexpr ort::Type kInputs[] = {ort::Type::kF32, ort::Type::kI32, ort::Type::kF32, ort::Type::kF32,
                                            ort::Type::kF32};
    static constexpr ort::Type kOutputs[] = {ort::Type::kF32};

    explicit FoldedExperts(const Attributes& attributes)
        : rounds(attributes.text("act_quant") == "ue8m0"), product(attributes) {}

    void compute(Call& call) const {
        const Tensor x = call.input(0, 2, "x is not [T, H]");
        const Tensor ids = call.input(1, 2, "expert_ids is not [T, TOPK]");
        const Tensor shares = call.input(2, 2, "expert_weights is not [T, TOPK]");
        const Tensor w13 = call.input(3, 3, "w13 is not [E, H, 2I]"), w2 = call.input(4, 3, "w2 is not [E, I, H]");
        const int64_t tokens = x.size(0), hidden = x.size(1), top_k = ids.size(1);
        const int64_t experts = w13.size(0), inter = w2.size(1);
        require(ids.size(0) == tokens && shares.size(0) == tokens && shares.size(1) == top_k && w13.size(1) == hidden &&
                    w13.size(2) == 2 * inter && w2.size(0) == experts && w2.size(2) == hidden && inter > 0 && hidden > 0,
                "sizes of the inputs do not agree");
        require(!rounds || (hidden % kFp8Block == 0 && inter % kFp8Block == 0), "rows have no whole blocks of 128");
        const Tensor y = call.output(0, {tokens, hidden});
        if (tokens == 0) return;
        std::memset(y.bytes, 0, y.count() * sizeof(float));

        // places t · TOPK + i of each expert, behind one another: those of e are [starts[e], starts[e + 1])
        std::vector<int64_t> starts(experts + 1, 0), places(tokens * top_k), next;
        for (int64_t place = 0; place < tokens * top_k; ++place) {
            const int32_t expert = ids.as<int32_t>()[place];
            require(expert >= -1 && expert < experts, "expert_ids names an expert that there is not");
            if (expert >= 0) ++starts[expert + 1];
        }
        int64_t most = 0;
        for (int64_t e = 0; e < experts; ++e) {
            most = starts[e + 1] > most ? starts[e + 1] : most;
            starts[e + 1] += starts[e];
        }
        next = starts;
        for (int64_t place = 0; place < tokens * top_k; ++place) {
            const int32_t expert = ids.as<int32_t>()[place];
            if (expert >= 0) places[next[expert]++] = place;
        }

        const Kernels& loops = kernels();
        const bool few = most <= kFewRows && !rows_keep_their_bits();
        const int64_t held = few ? starts[experts] : most;  // rows that are worked on at a time
        float* const rounded = scratch((rounds ? tokens * hidden : 0) + held * (2 * hidden + 3 * inter));
        float* const own = rounded + (rounds ? tokens * hidden : 0);
        float* const gate_up = own + held * hidden;
        float* const act = gate_up + held * 2 * inter;
        float* const out = act + held * inter;
        const float* const taken = rounds ? rounded : x.f32();
        if (rounds) {
            by_rows(call, tokens, hidden, [&](int64_t first, int64_t last) {
                loops.fake_quantize(x.f32() + first * hidden, (last - first) * hidden, rounded + first * hidden);
            });
        }
        const auto gather = [&](const int64_t* mine, int64_t rows) {
            by_rows(call, rows, hidden, [&](int64_t first, int64_t last) {
                for (int64_t row = first; row < last; ++row) {
                    std::memcpy(own + row * hidden, taken + mine[row] / top_k * hidden, hidden * sizeof(float));
                }
            });
        };
        const auto activate = [&](int64_t rows) {
            by_rows(call, rows, inter, [&](int64_t first, int64_t last) {
                for (int64_t row = first; row < last; ++row) {
                    const float* gate = gate_up + row * 2 * inter;
                    loops.swiglu(gate, gate + inter, inter, act + row * inter);
                    if (rounds) loops.fake_quantize(act + row * inter, inter, act + row * inter);
                }
            });
        };
        const auto add = [&](int64_t place, const float* part) {
            float* const sum = y.f32() + place / top_k * hidden;
            const float share = shares.f32()[place];
            for (int64_t d = 0; d < hidden; ++d) sum[d] += share * part[d];
        };
        if (few) {
            std::vector<int64_t> active;
            for (int64_t e = 0; e < experts; ++e) {
                if (starts[e + 1] > starts[e]) active.push_back(e);
            }
            const auto multiply = [&](const float* rows, const Tensor& of, int64_t depth, int64_t width, float* result) {
                const int64_t pieces = (width + kColumns - 1) / kColumns, some = (width + pieces - 1) / pieces;
                call.parallel(active.size() * pieces, true, [&](size_t task) {
                    const int64_t e = active[task / pieces], first = int64_t(task) % pieces * some;
                    loops.few_rows(rows + starts[e] * depth, depth, starts[e + 1] - starts[e],
                                   of.f32() + e * depth * width + first, width, depth,
                                   first + some < width ? some : width - first, result + starts[e] * width + first,
                                   width);
                });
            };
            gather(places.data(), held);
            multiply(own, w13, hidden, 2 * inter, gate_up);
            activate(held);
            multiply(act, w2, inter, hidden, out);
            for (int64_t row = 0; row < held; ++row) add(places[row], out + row * hidden);
            return;
        }
        for (int64_t e = 0; e < experts; ++e) {
            const int64_t rows = starts[e + 1] - starts[e];
            if (rows == 0) continue;
            const int64_t* const mine = places.data() + starts[e];
            gather(mine, rows);
            product.run(call, own, w13.f32() + e * hidden * 2 * inter, rows, hidden, 2 * inter, gate_up);
            activate(rows);
            product.run(call, act, w2.f32() + e * inter * hidden, rows, inter, hidden, out);
            by_rows(call, rows, hidden, [&](int64_t first, int64_t last) {  // a token has an expert once at most
                for (int64_t row = first; row < last; ++row) add(mine[row], out + row * hidden);
            });
        }
    }

    // Experts of so few rows read their matrices row after row, in pieces of so many columns. ONNX Runtime's product
    // packs a matrix in every call, since here it is no constant of its own.
    static constexpr int64_t kFewRows = 8, kColumns = 512;

    bool rounds;
    Product product;
};

}  // namespace

const ort::CustomOp* folded_experts() { return registered<FoldedExperts>(); }

}  // namespace seekforge
