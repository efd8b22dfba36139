// `AddRmsNorm` and `SwiGlu` for ONNX Runtime on a CPU.
#include "kernels.hpp"
#include "op.hpp"

namespace seekforge {
namespace {

constexpr int64_t kValuesOfPiece = 16384;  // what a thread takes at a time

// work(first, last) of rows, in pieces of so many values.
template <class Work>
void by_rows(Call& call, int64_t rows, int64_t width, const Work& work) {
    const int64_t some = kValuesOfPiece / width > 0 ? kValuesOfPiece / width : 1;
    call.parallel((rows + some - 1) / some, true, [&](size_t piece) {
        const int64_t first = piece * some, last = first + some < rows ? first + some : rows;
        work(first, last);
    });
}

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

}  // namespace

const ort::CustomOp* add_rms_norm() { return registered<AddRmsNorm>(); }
const ort::CustomOp* swiglu() { return registered<SwiGlu>(); }

}  // namespace seekforge
