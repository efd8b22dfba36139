// `DsaIndexer` for ONNX Runtime on a CPU, f32: scores of the visible keys where they lie, and a selection without sorting.
//
// A row that sees no more keys than it may choose reads none. Rows are taken some at a time, so that a block of keys is
// read from the cache once for all of them; a row's result depends on that row alone. A step of few rows divides the
// keys among threads instead.
#include "kernels.hpp"
#include "paged.hpp"

namespace seekforge {
namespace {

// Rows that share a pass over the keys, and keys that a thread scores at a time.
constexpr int64_t kRowsOfPass = 8, kKeysOfPiece = 8 * kBlockSize;

// Rises with x, for finite x.
uint32_t rank_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// Writes the positions of the `k` largest of `count` scores, k < count, ascending; equal scores go to the lowest.
//
// The digits of a score's rank, the highest first: counting how often each comes finds that of the k-th largest. The
// first digit has so many bits that hardly more scores than k have it or a higher one; the rest is done with those alone.
void choose(const float* scores, int64_t count, int64_t k, int32_t* out) {
    constexpr int kFirst = 20;  // bits behind the first digit: a sign, an exponent and 3 bits of mantissa are in it
    thread_local std::vector<uint32_t> ranks;
    thread_local std::vector<int32_t> places;
    ranks.resize(count);
    places.resize(count);
    int32_t often[1 << (32 - kFirst)] = {};
    for (int64_t i = 0; i < count; ++i) ranks[i] = rank_of(scores[i]);
    for (int64_t i = 0; i < count; ++i) ++often[ranks[i] >> kFirst];
    int64_t wanted = k;  // of those that begin with `threshold`, so many belong to the largest
    uint32_t digit = (1 << (32 - kFirst)) - 1;
    while (often[digit] < wanted) wanted -= often[digit--];
    uint32_t threshold = digit << kFirst;
    int64_t candidates = 0;
    for (int64_t i = 0; i < count; ++i) {
        const uint32_t rank = ranks[i];
        ranks[candidates] = rank;
        places[candidates] = int32_t(i);
        candidates += rank >= threshold;
    }
    for (int shift = kFirst - 10; shift >= 0; shift -= 10) {
        int32_t counts[1 << 10] = {};
        for (int64_t i = 0; i < candidates; ++i) {
            if ((ranks[i] ^ threshold) >> (shift + 10) == 0) ++counts[ranks[i] >> shift & 1023];
        }
        uint32_t next = 1023;
        while (counts[next] < wanted) wanted -= counts[next--];
        threshold |= next << shift;
    }
    for (int64_t i = 0, at = 0; at < k; ++i) {  // `wanted` of those that are equal to the k-th, the first ones
        if (ranks[i] > threshold || (ranks[i] == threshold && wanted-- > 0)) out[at++] = places[i];
    }
}

struct DsaIndexer {
    static constexpr const char* kName = "DsaIndexer";
    static constexpr ort::Type kInputs[] = {ort::Type::kF32, ort::Type::kF32, ort::Type::kF32, ort::Type::kI32,
                                            ort::Type::kI64};
    static constexpr ort::Type kOutputs[] = {ort::Type::kI32};

    explicit DsaIndexer(const Attributes& attributes)
        : topk(attributes.integer("index_topk")), fp8(attributes.integer("indexer_fp8") != 0) {}

    void compute(Call& call) const {
        const Tensor q = call.input(0, 4, "q is not [B, Q, Hi, D]"), w = call.input(1, 3, "w is not [B, Q, Hi]");
        const Tensor cache = call.input(2, 2, "index_cache is not [NB·64, D]");
        const Tensor table = call.input(3, 2, "block_table is not [B, MB]");
        const Tensor positions = call.input(4, 2, "positions is not [B, Q]");
        const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), dim = q.size(3);
        require(w.count() == batch * queries * heads && cache.size(1) == dim && table.size(0) == batch &&
                    positions.count() == batch * queries,
                "sizes of the inputs do not agree");
        require(topk > 0 && topk < (1 << 30), "index_topk is no number of keys");
        require(!fp8 || dim % 128 == 0, "FP8 takes blocks of 128 values");
        const PagedRows keys(cache, table);
        const Tensor picked = call.output(0, {batch, queries, topk});
        const int64_t tokens = batch * queries;
        std::vector<int64_t> seen(tokens);
        std::vector<int64_t> scored;  // the tokens that have a choice
        for (int64_t token = 0; token < tokens; ++token) {
            const int64_t position = positions.as<int64_t>()[token];
            seen[token] = position < 0 ? 0 : position < keys.positions() ? position + 1 : keys.positions();
            if (seen[token] > topk) {
                scored.push_back(token);
                continue;
            }
            int32_t* out = picked.as<int32_t>() + token * topk;
            for (int64_t i = 0; i < topk; ++i) out[i] = i < seen[token] ? int32_t(i) : -1;
        }
        if (scored.empty()) return;
        const float* query = q.f32();
        std::vector<float> rounded;
        if (fp8) {
            rounded.resize(q.count());
            for (const int64_t token : scored) {
                kernels().fake_quantize(query + token * heads * dim, heads * dim, &rounded[token * heads * dim]);
            }
            query = rounded.data();
        }
        const int32_t* const places = picked.as<int32_t>();
        const auto out_of = [&](int64_t token) { return const_cast<int32_t*>(places) + token * topk; };
        // The tokens of one sequence, a pass at a time; a single pass divides its keys instead.
        std::vector<std::pair<int64_t, int64_t>> passes;  // [first, last) of `scored`
        for (size_t i = 0; i < scored.size();) {
            size_t end = i + 1;
            while (end < scored.size() && end - i < kRowsOfPass && scored[end] / queries == scored[i] / queries) ++end;
            passes.emplace_back(i, end);
            i = end;
        }
        if (passes.size() == 1) {
            const int64_t first = passes[0].first, last = passes[0].second;
            const int64_t length = longest(scored, seen, first, last), rows = last - first;
            std::vector<float> scores(rows * length);
            const int64_t pieces = (length + kKeysOfPiece - 1) / kKeysOfPiece;
            call.parallel(pieces, rows * length * heads * dim > 200000, [&](size_t piece) {
                const int64_t start = piece * kKeysOfPiece;
                const int64_t stop = start + kKeysOfPiece < length ? start + kKeysOfPiece : length;
                score(query, w.f32(), keys, &scored[first], rows, queries, heads, dim, start, stop, scores.data(), length);
            });
            for (int64_t row = 0; row < rows; ++row) {
                choose(&scores[row * length], seen[scored[first + row]], topk, out_of(scored[first + row]));
            }
            return;
        }
        call.parallel(passes.size(), true, [&](size_t pass) {
            const int64_t first = passes[pass].first, last = passes[pass].second;
            const int64_t length = longest(scored, seen, first, last), rows = last - first;
            std::vector<float> scores(rows * length);
            score(query, w.f32(), keys, &scored[first], rows, queries, heads, dim, 0, length, scores.data(), length);
            for (int64_t row = 0; row < rows; ++row) {
                choose(&scores[row * length], seen[scored[first + row]], topk, out_of(scored[first + row]));
            }
        });
    }

    static int64_t longest(const std::vector<int64_t>& scored, const std::vector<int64_t>& seen, int64_t first,
                           int64_t last) {
        int64_t result = 0;
        for (int64_t i = first; i < last; ++i) result = seen[scored[i]] > result ? seen[scored[i]] : result;
        return result;
    }

    // Writes scores[row, start:stop] of the keys of `tokens`, all of one sequence.
    static void score(const float* q, const float* w, const PagedRows& keys, const int64_t* tokens, int64_t rows,
                      int64_t queries, int64_t heads, int64_t dim, int64_t start, int64_t stop, float* scores,
                      int64_t length) {
        const Kernels& loops = kernels();
        float* dots = scratch(heads * kBlockSize);
        const float* block[kBlockSize + kRowsAhead];
        for (int64_t at = start; at < stop; at += kBlockSize) {
            const int64_t here = stop - at < kBlockSize ? stop - at : kBlockSize;
            const int64_t left = stop - at, most = kBlockSize + int64_t(kRowsAhead), known = left < most ? left : most;
            for (int64_t j = 0; j < known; ++j) block[j] = keys.row(tokens[0] / queries, at + j);
            for (int64_t row = 0; row < rows; ++row) {
                const int64_t token = tokens[row];
                loops.dots(q + token * heads * dim, dim, heads, block, here, row ? here : known, dim, dots,
                           kBlockSize);
                loops.head_scores(dots, kBlockSize, heads, w + token * heads, here, scores + row * length + at);
            }
        }
    }

    int64_t topk;
    bool fp8;
};

}  // namespace

const ort::CustomOp* dsa_indexer() { return registered<DsaIndexer>(); }

}  // namespace seekforge
