// The functions that the library exports, and which processor's loops it uses.
#include <atomic>
#include <cstdlib>

#include "kernels.hpp"
#include "op.hpp"
#include "product.hpp"

namespace seekforge {

extern const Kernels kernels_baseline;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
#endif

const Kernels& kernels() {
    static const Kernels& best = []() -> const Kernels& {
#if defined(__x86_64__)
        __builtin_cpu_init();
        const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
        if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") &&
            __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq")) {
            return kernels_avx512;
        }
        if (avx2) return kernels_avx2;
#endif
        return kernels_baseline;
    }();
    return best;
}

std::atomic<int> asked_for_row_bits{0};

bool rows_keep_their_bits() { return asked_for_row_bits.load(std::memory_order_relaxed) > 0; }

// Each is defined in the file of its operator.
const ort::CustomOp* add_rms_norm();
const ort::CustomOp* dsa_attention();
const ort::CustomOp* dsa_cache_write();
const ort::CustomOp* dsa_indexer();
const ort::CustomOp* fake_quantize();
const ort::CustomOp* folded_experts();
const ort::CustomOp* head_attention();
const ort::CustomOp* head_mla_attention();
const ort::CustomOp* index_query();
const ort::CustomOp* latent_rows();
const ort::CustomOp* mla_attention();
const ort::CustomOp* mla_cache_write();
const ort::CustomOp* moe_route();
const ort::CustomOp* moe_route_all();
const ort::CustomOp* plain_latent_rows();
const ort::CustomOp* query_rows();
const ort::CustomOp* swiglu();

using Make = const ort::CustomOp* (*)();
constexpr Make kOperators[] = {
    add_rms_norm, dsa_attention, dsa_cache_write, dsa_indexer, fake_quantize, folded_experts,
    head_attention, head_mla_attention, index_query, latent_rows, mla_attention, mla_cache_write, moe_route,
    moe_route_all, plain_latent_rows, query_rows, swiglu,
};

}  // namespace seekforge

// Called by SessionOptions.register_custom_ops_library; null for success. ONNX Runtime keeps the domain's pointer as
// long as sessions live, so there is one for the life of the process.
extern "C" __attribute__((visibility("default"))) seekforge::ort::Status* RegisterCustomOps(
    seekforge::ort::SessionOptions* options, const seekforge::ort::ApiBase* base) {
    using namespace seekforge;
    const void* const* table = base->GetApi(ort::kApiVersion);
    if (table == nullptr) {
        // without an API there is no status to make; the oldest one has CreateStatus at the same place
        const void* const* oldest = base->GetApi(1);
        return oldest == nullptr ? nullptr : ort::Api(oldest).create_status("seekforge: ONNX Runtime is too old");
    }
    const ort::Api api(table);
    static ort::CustomOpDomain* domain = nullptr;
    static ort::Status* failed = [&]() -> ort::Status* {
        if (ort::Status* status = api.create_domain("seekforge", &domain)) return status;
        for (const Make make : kOperators) {
            if (ort::Status* status = api.add_op(domain, make())) return status;
        }
        return nullptr;
    }();
    if (failed != nullptr) return api.create_status(api.message(failed));
    return api.add_domain(options, domain);
}

// Called by library.py, with 1 and, when that is over, −1: until then a row gives the same bits among any number of rows
// but one.
extern "C" __attribute__((visibility("default"))) void SeekforgeKeepRowBits(int change) {
    seekforge::asked_for_row_bits += change;
}
