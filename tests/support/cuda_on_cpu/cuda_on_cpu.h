// As much of CUDA C++ as a kernel without shared memory needs, on a CPU: the lanes of a warp are coroutines that take
// turns, and whatever exchanges values between lanes waits for all 32. Blocks run one after another.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct Place {
  unsigned x = 0, y = 0, z = 0;
};
inline Place threadIdx, blockIdx;

namespace cuda_on_cpu {

constexpr int LANES = 32;
constexpr size_t STACK = 256 << 10;

struct Warp {
  ucontext_t caller, lanes[LANES];
  bool ended[LANES];
  int running = 0, first_thread = 0;
  uint64_t given[LANES];
  long rounds[LANES];  // how many exchanges a lane has taken part in
  std::unique_ptr<char[]> stacks{new char[STACK * LANES]};
  std::function<void()> body;
};
inline Warp warp;

inline void lane_entry() {
  warp.body();
  warp.ended[warp.running] = true;
  swapcontext(&warp.lanes[warp.running], &warp.caller);
}

// Return when all lanes have come here.
inline void wait() {
  const int lane = warp.running;
  ++warp.rounds[lane];
  swapcontext(&warp.lanes[lane], &warp.caller);
}

// Give a value, and return when all lanes gave theirs. They may be read until the next `wait`.
inline void give(uint64_t value) {
  warp.given[warp.running] = value;
  wait();
}

inline void run_warp(int first_thread, const std::function<void()>& body) {
  warp.body = body;
  warp.first_thread = first_thread;
  for (int lane = 0; lane < LANES; ++lane) {
    getcontext(&warp.lanes[lane]);
    warp.lanes[lane].uc_stack.ss_sp = warp.stacks.get() + STACK * lane;
    warp.lanes[lane].uc_stack.ss_size = STACK;
    warp.lanes[lane].uc_link = nullptr;
    makecontext(&warp.lanes[lane], lane_entry, 0);
    warp.ended[lane] = false;
    warp.rounds[lane] = 0;
  }
  for (;;) {
    int left = 0;
    for (int lane = 0; lane < LANES; ++lane) {
      if (warp.ended[lane]) continue;
      warp.running = lane;
      threadIdx.x = first_thread + lane;
      swapcontext(&warp.caller, &warp.lanes[lane]);
      left += !warp.ended[lane];
    }
    for (int lane = 1; lane < LANES; ++lane) {
      if (warp.ended[lane] != warp.ended[0] || warp.rounds[lane] != warp.rounds[0]) {
        std::fprintf(stderr, "lane %d left its warp\n", lane);
        std::abort();
      }
    }
    if (!left) return;
  }
}

// Run a kernel: all blocks of a grid in x, each of so many warps.
template <typename Kernel, typename... Arguments>
void launch(Kernel kernel, int blocks, int warps, Arguments... arguments) {
  for (int block = 0; block < blocks; ++block) {
    for (int one = 0; one < warps; ++one) {
      blockIdx.x = block;
      run_warp(one * LANES, [&] { kernel(arguments...); });
    }
  }
}

}  // namespace cuda_on_cpu

template <typename T>
T __shfl_sync(unsigned, T value, int lane) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  cuda_on_cpu::give(bits);
  std::memcpy(&value, &cuda_on_cpu::warp.given[lane & 31], sizeof(T));
  cuda_on_cpu::wait();  // nobody gives again before all have read
  return value;
}

using std::max;
using std::min;

namespace cooperative_groups {

struct thread_block {};
inline thread_block this_thread_block() { return {}; }

template <int N>
struct thread_block_tile {
  static_assert(N == cuda_on_cpu::LANES);
};
template <int N>
thread_block_tile<N> tiled_partition(const thread_block&) {
  return {};
}

template <typename T>
struct greater {
  T operator()(T a, T b) const { return a > b ? a : b; }
};

template <int N, typename T, typename Choose>
T reduce(const thread_block_tile<N>&, T value, Choose choose) {
  cuda_on_cpu::give(static_cast<uint64_t>(value));
  T result = static_cast<T>(cuda_on_cpu::warp.given[0]);
  for (int lane = 1; lane < N; ++lane) result = choose(result, static_cast<T>(cuda_on_cpu::warp.given[lane]));
  cuda_on_cpu::wait();
  return result;
}

}  // namespace cooperative_groups

struct half {};
struct __nv_bfloat16 {};

namespace cub {

// Bits of a float as a number that sorts as it does (radix sort's trick).
template <typename T>
struct Traits;
template <>
struct Traits<float> {
  using UnsignedBits = uint32_t;
  static UnsignedBits TwiddleIn(UnsignedBits bits) { return bits >> 31 ? ~bits : bits | 0x80000000u; }
  static UnsignedBits TwiddleOut(UnsignedBits bits) { return bits >> 31 ? bits & 0x7fffffffu : ~bits; }
};

}  // namespace cub
