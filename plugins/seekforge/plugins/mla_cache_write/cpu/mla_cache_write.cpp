// `MlaCacheWrite` for ONNX Runtime on a CPU, f32: rows are written into the cache's own memory where it is bound so.
#include "kernels.hpp"
#include "paged.hpp"

namespace seekforge {
namespace {

struct MlaCacheWrite {
    static constexpr const char* kName = "MlaCacheWrite";
    static constexpr ort::Type kInputs[] = {ort::Type::kF32, ort::Type::kF32, ort::Type::kF32, ort::Type::kI64};
    static constexpr ort::Type kOutputs[] = {ort::Type::kF32};

    explicit MlaCacheWrite(const Attributes& attributes) : kv_fp8(attributes.integer("kv_fp8") != 0) {}

    void compute(Call& call) const {
        const Tensor cache = call.input(0, 2, "latent_cache is not [NB·64, C+R]");
        const Tensor c = call.input(1, 3, "c is not [B, Q, C]"), k_pe = call.input(2, 3, "k_pe is not [B, Q, R]");
        const Tensor slots = call.input(3, 2, "slot_mapping is not [B, Q]");
        const int64_t latent = c.size(2), rope = k_pe.size(2), tokens = slots.count();
        require(cache.size(1) == latent + rope && c.count() == tokens * latent && k_pe.count() == tokens * rope,
                "sizes of the inputs do not agree");
        require(!kv_fp8 || latent % 128 == 0, "FP8 takes blocks of 128 values");
        check_slots(slots, cache.size(0));
        const Tensor out = call.output_of(0, cache, sizeof(float));
        for (int64_t token = 0; token < tokens; ++token) {
            float* row = slot_row(out, slots, token);
            const float* from = c.f32() + token * latent;
            if (kv_fp8) kernels().fake_quantize(from, latent, row);
            else std::memcpy(row, from, latent * sizeof(float));
            std::memcpy(row + latent, k_pe.f32() + token * rope, rope * sizeof(float));
        }
    }

    bool kv_fp8;
};

}  // namespace

const ort::CustomOp* mla_cache_write() { return registered<MlaCacheWrite>(); }

}  // namespace seekforge
