// Router with FlashInfer's top-k of a warp: one warp per token, a token's experts in its registers.
//
// logits f32 [T, E], bias f32 [E] -> ids i32 [T, TOP_K], weights f32 [T, TOP_K]. Bound by launch latency, as kernel.py.
// The library picks (falling score, ties to the lowest index); what it is given and what becomes of it is
// the operator's: sigmoid with all its digits, where the library's own router for DeepSeek-V3 takes 0.5 tanh(x / 2) + 0.5 and has none
// left below -17, and weights of scores without bias, summed in the order of the picks. A score that is NaN counts as
// the lowest, so a row of NaN still gives TOP_K experts that exist. No shared memory, no barrier. sm80 and later.
//
// The build defines the sizes: SEEKFORGE_E and the like, SEEKFORGE_NORM 0 or 1.

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <type_traits>

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "flashinfer/trtllm/fused_moe/RoutingKernelTopK.cuh"

namespace topk = moe::dev::routing::topk;

constexpr int E = SEEKFORGE_E, GROUPS = SEEKFORGE_GROUPS, TOPK_GROUPS = SEEKFORGE_TOPK_GROUPS;
constexpr int TOP_K = SEEKFORGE_TOP_K, WARPS = SEEKFORGE_WARPS;
constexpr int LANES = 32;
constexpr int SIZE = E / GROUPS;                       // experts of a group
constexpr int HELD = SIZE < LANES ? 1 : SIZE / LANES;  // of each group, by one lane
constexpr unsigned ALL = 0xffffffff;
static_assert(E % GROUPS == 0 && (SIZE <= LANES || SIZE % LANES == 0) && GROUPS <= LANES && TOP_K <= LANES);

// Return the sum of the two best of a group, in all lanes.
__device__ __forceinline__ float two_best(const cooperative_groups::thread_block_tile<LANES>& warp,
                                          float (&values)[HELD], int32_t (&places)[HELD], int lane) {
  if constexpr (HELD == 1) {
    float best[2];
    int32_t best_at[2];
    topk::reduceTopK(warp, best, best_at, values[0], places[0], -INFINITY);
    return best[0] + best[1];
  } else {
    float best;
    int32_t best_at;
    topk::reduceTopKForLane<2>(warp, best, best_at, values, places, -INFINITY, lane);
    return __shfl_sync(ALL, best, 0) + __shfl_sync(ALL, best, 1);
  }
}

extern "C" __global__ void __launch_bounds__(LANES* WARPS)
    route_by_flashinfer(const float* __restrict__ logits, const float* __restrict__ bias, int32_t* __restrict__ ids,
                        float* __restrict__ weights, int32_t num_tokens, float scale) {
  const int64_t token = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / LANES;
  if (token >= num_tokens) return;  // all lanes of the warp
  const int lane = threadIdx.x % LANES;
  const auto warp = cooperative_groups::tiled_partition<LANES>(cooperative_groups::this_thread_block());
  const float* row = logits + token * E;
  const auto score_of = [row](int expert) { return 1.0f / (1.0f + expf(-row[expert])); };

  // slot g * HELD + i of a lane is the expert lane + 32 i of group g
  float score[GROUPS * HELD];
  int32_t expert[GROUPS * HELD];
  float group_score = -INFINITY;  // of the group whose number is the lane's
#pragma unroll
  for (int group = 0; group < GROUPS; ++group) {
    float values[HELD];
    int32_t places[HELD];
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int slot = group * HELD + i, place = lane + i * LANES, one = group * SIZE + place;
      const bool real = place < SIZE;
      expert[slot] = real ? one : group * SIZE;
      score[slot] = real ? fmaxf(score_of(one) + bias[one], -FLT_MAX) : -INFINITY;  // fmaxf: of a NaN the other one
      values[i] = score[slot];
      places[i] = place;
    }
    const float both = fmaxf(two_best(warp, values, places, lane), -FLT_MAX);
    if (lane == group) group_score = both;
  }

  float kept_score[TOPK_GROUPS];
  int32_t kept[TOPK_GROUPS];
  topk::reduceTopK(warp, kept_score, kept, group_score, lane, -INFINITY);
  uint32_t is_kept = 0;
#pragma unroll
  for (int i = 0; i < TOPK_GROUPS; ++i) is_kept |= 1u << kept[i];
#pragma unroll
  for (int slot = 0; slot < GROUPS * HELD; ++slot) {
    if (!(is_kept >> (slot / HELD) & 1)) score[slot] = -INFINITY;
  }

  float picked_score;
  int32_t picked;  // of lane k the pick k
  topk::reduceTopKForLane<TOP_K>(warp, picked_score, picked, score, expert, -INFINITY, lane);

  float weight = lane < TOP_K ? score_of(picked) : 0.0f, total = 0.0f;
#pragma unroll
  for (int k = 0; k < TOP_K; ++k) total += __shfl_sync(ALL, weight, k);
  if (SEEKFORGE_NORM) weight = weight / (total + 1e-20f);
  if (lane < TOP_K) {
    ids[token * TOP_K + lane] = picked;
    weights[token * TOP_K + lane] = weight * scale;
  }
}
