// `QueryRows`, `IndexQuery`, `LatentRows` and `PlainLatentRows` for ONNX Runtime on a CPU: what lies between the
// projections of an attention and its caches. All work of a token is on values that are in the first cache.
#include "rope.hpp"

#include "kernels.hpp"
#include "paged.hpp"

namespace seekforge {
namespace {

constexpr auto kF32 = ort::Type::kF32;
constexpr auto kI64 = ort::Type::kI64;
constexpr int64_t kTokensOfPiece = 16;

template <class Work>
void by_tokens(Call& call, int64_t tokens, const Work& work) {
    call.parallel((tokens + kTokensOfPiece - 1) / kTokensOfPiece, true, [&](size_t piece) {
        const int64_t first = piece * kTokensOfPiece;
        for (int64_t t = first; t < first + kTokensOfPiece && t < tokens; ++t) work(t);
    });
}

// Whether an attribute can be a part of the last size of `x`; sums and products of such ones do not overflow.
bool is_size(int64_t value, const Tensor& x) { return value > 0 && value <= x.size(x.rank - 1) && value < (1 << 30); }

// cos and sin of every token, [B, Q, R / 2].
struct Angles {
    Angles(const Call& call, size_t index, int64_t tokens, int64_t rope)
        : cos(call.input(index, 3, "cos is not [B, Q, R / 2]")), sin(call.input(index + 1, 3, "sin is not [B, Q, R / 2]")) {
        half = rope / 2;
        require(rope % 2 == 0 && cos.count() == tokens * half && sin.count() == tokens * half,
                "cos and sin have other tokens or sizes");
    }
    void turn(int64_t token, const float* x, bool interleaved, float* out) const {
        rotate(x, cos.f32() + token * half, sin.f32() + token * half, half, interleaved, out);
    }
    Tensor cos, sin;
    int64_t half = 0;
};

struct QueryRows {
    static constexpr const char* kName = "QueryRows";
    static constexpr ort::Type kInputs[] = {kF32, kF32, kF32};
    static constexpr ort::Type kOutputs[] = {kF32, kF32};

    explicit QueryRows(const Attributes& attributes)
        : heads(attributes.integer("heads")), nope(attributes.integer("nope")), rope(attributes.integer("rope")) {}

    void compute(Call& call) const {
        const Tensor q = call.input(0, 3, "q_b is not [B, Q, H · (nope + R)]");
        const int64_t batch = q.size(0), queries = q.size(1), tokens = batch * queries, width = nope + rope;
        require(is_size(heads, q) && is_size(nope, q) && is_size(rope, q) && q.size(2) == heads * width, "q_b has another width");
        const Angles angles(call, 1, tokens, rope);
        const Tensor q_nope = call.output(0, {heads, tokens, nope}), q_pe = call.output(1, {batch, queries, heads, rope});
        by_tokens(call, tokens, [&](int64_t t) {
            for (int64_t h = 0; h < heads; ++h) {
                const float* x = q.f32() + (t * heads + h) * width;
                std::memcpy(q_nope.f32() + (h * tokens + t) * nope, x, nope * sizeof(float));
                angles.turn(t, x + nope, true, q_pe.f32() + (t * heads + h) * rope);
            }
        });
    }

    int64_t heads, nope, rope;
};

// out = x · hadamard, of [D] and [D, D].
void transform(const float* x, const Tensor& hadamard, float* out) {
    const int64_t dim = hadamard.size(0);
    const Kernels& loops = kernels();
    const float* rows[64];
    std::memset(out, 0, dim * sizeof(float));
    for (int64_t start = 0; start < dim; start += 64) {
        const int64_t here = dim - start < 64 ? dim - start : 64;
        for (int64_t i = 0; i < here; ++i) rows[i] = hadamard.f32() + (start + i) * dim;
        loops.add_weighted(x + start, dim, 1, rows, here, dim, out, dim);
    }
}

struct IndexQuery {
    static constexpr const char* kName = "IndexQuery";
    static constexpr ort::Type kInputs[] = {kF32, kF32, kF32, kF32};
    static constexpr ort::Type kOutputs[] = {kF32};
    static constexpr size_t kOptional = 3;

    explicit IndexQuery(const Attributes& attributes)
        : heads(attributes.integer("heads")),
          dim(attributes.integer("dim")),
          rope(attributes.integer("rope")),
          interleaved(attributes.integer("interleaved") != 0),
          has_hadamard(attributes.integer("hadamard") != 0) {}

    void compute(Call& call) const {
        const Tensor q = call.input(0, 3, "wq_b is not [B, Q, Hi · D]");
        const int64_t batch = q.size(0), queries = q.size(1), tokens = batch * queries;
        require(is_size(heads, q) && is_size(dim, q) && rope >= 0 && rope <= dim && q.size(2) == heads * dim,
                "wq_b has another width");
        const Angles angles(call, 1, tokens, rope);
        const Tensor hadamard = has_hadamard ? call.input(3, 2, "hadamard is not [D, D]") : Tensor{};
        require(!has_hadamard || (hadamard.size(0) == dim && hadamard.size(1) == dim), "hadamard is not [D, D]");
        const Tensor out = call.output(0, {batch, queries, heads, dim});
        by_tokens(call, tokens, [&](int64_t t) {
            for (int64_t h = 0; h < heads; ++h) {
                const float* x = q.f32() + (t * heads + h) * dim;
                float* y = out.f32() + (t * heads + h) * dim;
                float* turned = has_hadamard ? scratch(dim) : y;
                angles.turn(t, x, interleaved, turned);
                std::memcpy(turned + rope, x + rope, (dim - rope) * sizeof(float));
                if (has_hadamard) transform(turned, hadamard, y);
            }
        });
    }

    int64_t heads, dim, rope;
    bool interleaved, has_hadamard;
};

struct LatentRows {
    static constexpr const char* kName = "LatentRows";
    static constexpr ort::Type kInputs[] = {kF32, kF32, kF32, kF32, kF32, kF32, kF32, kF32, kF32, kI64, kF32};
    static constexpr ort::Type kOutputs[] = {kF32, kF32, kF32, kF32, kF32, kF32, kF32};
    static constexpr size_t kOptional = 10;

    explicit LatentRows(const Attributes& attributes)
        : q_lora(attributes.integer("q_lora")),
          dim(attributes.integer("dim")),
          latent(attributes.integer("latent")),
          rope(attributes.integer("rope")),
          epsilon(attributes.number("epsilon")),
          key_epsilon(attributes.number("key_epsilon")),
          interleaved(attributes.integer("interleaved") != 0),
          kv_fp8(attributes.integer("kv_fp8") != 0),
          indexer_fp8(attributes.integer("indexer_fp8") != 0),
          has_hadamard(attributes.integer("hadamard") != 0) {}

    void compute(Call& call) const {
        const Tensor qkv = call.input(0, 3, "qkv_a is not [B, Q, q_lora + D + C + R]");
        const Tensor q_weight = call.input(1), kv_weight = call.input(2), key_weight = call.input(3), key_bias = call.input(4);
        const Tensor latent_in = call.input(7, 2, "latent_cache is not [NB·64, C+R]");
        const Tensor index_in = call.input(8, 2, "index_cache is not [NB·64, D]");
        const Tensor slots = call.input(9, 2, "slot_mapping is not [B, Q]");
        const int64_t batch = qkv.size(0), queries = qkv.size(1), tokens = batch * queries, width = qkv.size(2);
        require(is_size(q_lora, qkv) && is_size(latent, qkv) && is_size(dim, qkv) && rope >= 0 && rope <= dim && width == q_lora + dim + latent + rope &&
                    q_weight.count() == q_lora && kv_weight.count() == latent && key_weight.count() == dim &&
                    key_bias.count() == dim && slots.count() == tokens && latent_in.size(1) == latent + rope &&
                    index_in.size(1) == dim,
                "sizes of the inputs do not agree");
        require((!kv_fp8 || latent % 128 == 0) && (!indexer_fp8 || dim % 128 == 0), "FP8 takes blocks of 128 values");
        check_slots(slots, latent_in.size(0));
        check_slots(slots, index_in.size(0));
        const Angles angles(call, 5, tokens, rope);
        const Tensor hadamard = has_hadamard ? call.input(10, 2, "hadamard is not [D, D]") : Tensor{};
        require(!has_hadamard || (hadamard.size(0) == dim && hadamard.size(1) == dim), "hadamard is not [D, D]");
        const Tensor q_norm = call.output(0, {batch, queries, q_lora}), kv = call.output(1, {batch, queries, latent});
        const Tensor k_pe = call.output(2, {batch, queries, rope}), key_norm = call.output(3, {batch, queries, dim});
        const Tensor index_k = call.output(4, {batch, queries, dim});
        const Tensor latent_out = call.output_of(5, latent_in, sizeof(float));
        const Tensor index_out = call.output_of(6, index_in, sizeof(float));
        by_tokens(call, tokens, [&](int64_t t) {
            const Kernels& loops = kernels();
            const float* x = qkv.f32() + t * width;
            loops.rms_norm(x, q_weight.f32(), q_lora, epsilon, q_norm.f32() + t * q_lora);
            x += q_lora;
            float *normed = key_norm.f32() + t * dim, *key = index_k.f32() + t * dim;
            loops.layer_norm(x, key_weight.f32(), key_bias.f32(), dim, key_epsilon, normed);
            float* turned = has_hadamard ? scratch(dim) : key;
            angles.turn(t, normed, interleaved, turned);
            std::memcpy(turned + rope, normed + rope, (dim - rope) * sizeof(float));
            if (has_hadamard) transform(turned, hadamard, key);
            x += dim;
            float *c = kv.f32() + t * latent, *pe = k_pe.f32() + t * rope;
            loops.rms_norm(x, kv_weight.f32(), latent, epsilon, c);
            angles.turn(t, x + latent, true, pe);
            store(slot_row(latent_out, slots, t), c, latent, kv_fp8);
            std::memcpy(slot_row(latent_out, slots, t) + latent, pe, rope * sizeof(float));
            store(slot_row(index_out, slots, t), key, dim, indexer_fp8);
        });
    }

    static void store(float* row, const float* x, int64_t count, bool fp8) {
        if (fp8) kernels().fake_quantize(x, count, row);
        else std::memcpy(row, x, count * sizeof(float));
    }

    int64_t q_lora, dim, latent, rope;
    float epsilon, key_epsilon;
    bool interleaved, kv_fp8, indexer_fp8, has_hadamard;
};

struct PlainLatentRows {
    static constexpr const char* kName = "PlainLatentRows";
    static constexpr ort::Type kInputs[] = {kF32, kF32, kF32, kF32, kF32, kF32, kI64};
    static constexpr ort::Type kOutputs[] = {kF32, kF32, kF32, kF32};

    explicit PlainLatentRows(const Attributes& attributes)
        : q_lora(attributes.integer("q_lora")),
          latent(attributes.integer("latent")),
          rope(attributes.integer("rope")),
          epsilon(attributes.number("epsilon")),
          kv_fp8(attributes.integer("kv_fp8") != 0) {}

    void compute(Call& call) const {
        const Tensor qkv = call.input(0, 3, "qkv_a is not [B, Q, q_lora + C + R]");
        const Tensor q_weight = call.input(1), kv_weight = call.input(2);
        const Tensor cache = call.input(5, 2, "latent_cache is not [NB·64, C+R]");
        const Tensor slots = call.input(6, 2, "slot_mapping is not [B, Q]");
        const int64_t batch = qkv.size(0), queries = qkv.size(1), tokens = batch * queries, width = qkv.size(2);
        require(is_size(q_lora, qkv) && is_size(latent, qkv) && rope >= 0 && rope <= width && width == q_lora + latent + rope && q_weight.count() == q_lora &&
                    kv_weight.count() == latent && slots.count() == tokens && cache.size(1) == latent + rope,
                "sizes of the inputs do not agree");
        require(!kv_fp8 || latent % 128 == 0, "FP8 takes blocks of 128 values");
        check_slots(slots, cache.size(0));
        const Angles angles(call, 3, tokens, rope);
        const Tensor q_norm = call.output(0, {batch, queries, q_lora}), kv = call.output(1, {batch, queries, latent});
        const Tensor k_pe = call.output(2, {batch, queries, rope});
        const Tensor out = call.output_of(3, cache, sizeof(float));
        by_tokens(call, tokens, [&](int64_t t) {
            const Kernels& loops = kernels();
            const float* x = qkv.f32() + t * width;
            loops.rms_norm(x, q_weight.f32(), q_lora, epsilon, q_norm.f32() + t * q_lora);
            float *c = kv.f32() + t * latent, *pe = k_pe.f32() + t * rope;
            loops.rms_norm(x + q_lora, kv_weight.f32(), latent, epsilon, c);
            angles.turn(t, x + q_lora + latent, true, pe);
            LatentRows::store(slot_row(out, slots, t), c, latent, kv_fp8);
            std::memcpy(slot_row(out, slots, t) + latent, pe, rope * sizeof(float));
        });
    }

    int64_t q_lora, latent, rope;
    float epsilon;
    bool kv_fp8;
};

}  // namespace

const ort::CustomOp* query_rows() { return registered<QueryRows>(); }
const ort::CustomOp* index_query() { return registered<IndexQuery>(); }
const ort::CustomOp* latent_rows() { return registered<LatentRows>(); }
const ort::CustomOp* plain_latent_rows() { return registered<PlainLatentRows>(); }

}  // namespace seekforge
