// `DsaCacheWrite` for ONNX Runtime on a CPU, f32: rows are written into the caches' own memory where it is bound so.
#include "kernels.hpp"
#include "paged.hpp"

namespace seekforge {
namespace {

struct DsaCacheWrite {
    static constexpr const char* kName = "DsaCacheWrite";
    static constexpr ort::Type kInputs[] = {ort::Type::kF32, ort::Type::kF32, ort::Type::kF32,
                                            ort::Type::kF32, ort::Type::kF32, ort::Type::kI64};
    static constexpr ort::Type kOutputs[] = {ort::Type::kF32, ort::Type::kF32};

    explicit DsaCacheWrite(const Attributes& attributes)
        : kv_fp8(attributes.integer("kv_fp8") != 0), indexer_fp8(attributes.integer("indexer_fp8") != 0) {}

    void compute(Call& call) const {
        const Tensor latent_in = call.input(0, 2, "latent_cache is not [NB·64, C+R]");
        const Tensor index_in = call.input(1, 2, "index_cache is not [NB·64, D]");
        const Tensor c = call.input(2, 3, "c is not [B, Q, C]"), k_pe = call.input(3, 3, "k_pe is not [B, Q, R]");
        const Tensor index_k = call.input(4, 3, "index_k is not [B, Q, D]");
        const Tensor slots = call.input(5, 2, "slot_mapping is not [B, Q]");
        const int64_t latent = c.size(2), rope = k_pe.size(2), dim = index_k.size(2), tokens = slots.count();
        require(latent_in.size(1) == latent + rope && index_in.size(1) == dim && c.count() == tokens * latent &&
                    k_pe.count() == tokens * rope && index_k.count() == tokens * dim,
                "sizes of the inputs do not agree");
        require((!kv_fp8 || latent % 128 == 0) && (!indexer_fp8 || dim % 128 == 0), "FP8 takes blocks of 128 values");
        check_slots(slots, latent_in.size(0));
        check_slots(slots, index_in.size(0));
        const Tensor latent_out = call.output_of(0, latent_in, sizeof(float));
        const Tensor index_out = call.output_of(1, index_in, sizeof(float));
        const Kernels& loops = kernels();
        for (int64_t token = 0; token < tokens; ++token) {
            float* row = slot_row(latent_out, slots, token);
            const float* from = c.f32() + token * latent;
            if (kv_fp8) loops.fake_quantize(from, latent, row);
            else std::memcpy(row, from, latent * sizeof(float));
            std::memcpy(row + latent, k_pe.f32() + token * rope, rope * sizeof(float));
            float* key = slot_row(index_out, slots, token);
            const float* raw = index_k.f32() + token * dim;
            if (indexer_fp8) loops.fake_quantize(raw, dim, key);
            else std::memcpy(key, raw, dim * sizeof(float));
        }
    }

    bool kv_fp8, indexer_fp8;
};

}  // namespace

const ort::CustomOp* dsa_cache_write() { return registered<DsaCacheWrite>(); }

}  // namespace seekforge
