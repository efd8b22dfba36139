// `AddRmsNorm`, `SwiGlu` and `FakeQuantize` for ONNX Runtime on a CPU.
#include "kernels.hpp"
#include "op.hpp"

namespace seekforge {
namespace {

struct AddRmsNorm {
    static constexpr const char* kName = "AddRmsNorm";
    static constexpr ort::Type kInputs[] = {ort::Type::kF32, ort::Type::kF32, ort::Type::kF32};
    static constexpr ort::Type kOutputs[] = {ort::Type::kF32, ort::Type::kF32};

    explicit AddRmsNorm(const Attributes& attributes) : epsilon(attributes.number("epsilon")) {}

    void compute(Call& call) const {
        const Tensor x = call.input(0), residual = call.input(1), weight = call.input(2, 1, "weight is not [N]");
        const int64_t width = weight.count();
        require(x.rank > 0 && x.size(x.rank - 1) == width && x.count() == residual.count() && width > 0,
                "sizes of the inputs do not agree");
        const Tensor norm = call.output(0, residual.sizes, residual.rank);
        const Tensor total = call.output(1, residual.sizes, residual.rank);
        by_rows(call, x.count() / width, width, [&](int64_t first, int64_t last) {
            const Kernels& loops = kernels();
            for (int64_t row = first; row < last; ++row) {
                float* sum = total.f32() + row * width;
                loops.add(x.f32() + row * width, residual.f32() + row * width, width, sum);
                loops.rms_norm(sum, weight.f32(), width, epsilon, norm.f32() + row * width);
            }
        });
    }

    float epsilon;
};

struct SwiGlu {
    static constexpr const char* kName = "SwiGlu";
    static constexpr ort::Type kInputs[] = {ort::Type::kF32};
    static constexpr ort::Type kOutputs[] = {ort::Type::kF32};

    explicit SwiGlu(const Attributes&) {}

    void compute(Call& call) const {
        const Tensor both = call.input(0);
        require(both.rank > 0 && both.rank <= 4 && both.size(both.rank - 1) % 2 == 0, "gate_up is not [..., 2N]");
        const int64_t width = both.size(both.rank - 1) / 2;
        int64_t sizes[4];
        std::memcpy(sizes, both.sizes, both.rank * sizeof(int64_t));
        sizes[both.rank - 1] = width;
        const Tensor act = call.output(0, sizes, both.rank);
        if (act.count() == 0) return;
        by_rows(call, act.count() / width, width, [&](int64_t first, int64_t last) {
            for (int64_t row = first; row < last; ++row) {
                const float* gate = both.f32() + row * 2 * width;
                kernels().swiglu(gate, gate + width, width, act.f32() + row * width);
            }
        });
    }
};

struct FakeQuantize {
    static constexpr const char* kName = "FakeQuantize";
    static constexpr ort::Type kInputs[] = {ort::Type::kF32};
    static constexpr ort::Type kOutputs[] = {ort::Type::kF32};

    explicit FakeQuantize(const Attributes&) {}

    void compute(Call& call) const {
        const Tensor x = call.input(0);
        require(x.rank > 0 && x.size(x.rank - 1) % kFp8Block == 0, "rows have no whole blocks of 128");
        const Tensor y = call.output(0, x.sizes, x.rank);
        by_rows(call, x.count() / kFp8Block, kFp8Block, [&](int64_t first, int64_t last) {
            kernels().fake_quantize(x.f32() + first * kFp8Block, (last - first) * kFp8Block, y.f32() + first * kFp8Block);
        });
    }
};

}  // namespace

const ort::CustomOp* fake_quantize() { return registered<FakeQuantize>(); }
const ort::CustomOp* add_rms_norm() { return registered<AddRmsNorm>(); }
const ort::CustomOp* swiglu() { return registered<SwiGlu>(); }

}  // namespace seekforge
