/*
Warp and block reductions in a fixed order, so that the bits never depend on which warp is fastest.

  warp_sum, warp_max                    float or double, result in every lane
  warp_reduce(x, merge)                 any type; merge(lower lanes, higher lanes), result in every lane
  block_reduce<Threads>(x, merge, none) any type; result in every thread. All threads of the block must come.
  shuffle(x, lane), shuffle_down(x, n)  any type whose size is a multiple of 4
  is_last_block(counter, blocks)        for reductions over blocks in one launch

A reduction over blocks has two sound forms: a second launch (used by gae), or every block writes its part, the last to
arrive adds all parts up in order of block. Floating-point atomics are neither.
*/
#pragma once

#include "cuda/device.cuh"

namespace fastppo::cuda {

template <class T, class Move>
__device__ __forceinline__ T move_words(const T& x, const Move& move) {
  static_assert(sizeof(T) % 4 == 0 && std::is_trivially_copyable_v<T>);
  uint32_t words[sizeof(T) / 4];
  memcpy(words, &x, sizeof(T));
#pragma unroll
  for (auto& word : words) {
    word = move(word);
  }
  T out;
  memcpy(&out, words, sizeof(T));
  return out;
}

template <class T>
__device__ __forceinline__ T shuffle(const T& x, int lane) {
  return move_words(x, [=](uint32_t word) { return __shfl_sync(kFullMask, word, lane); });
}

template <class T>
__device__ __forceinline__ T shuffle_down(const T& x, int lanes) {
  return move_words(x, [=](uint32_t word) { return __shfl_down_sync(kFullMask, word, lanes); });
}

template <class T, class Merge>
__device__ __forceinline__ T warp_reduce(T x, const Merge& merge) {
#pragma unroll
  for (int n = 16; n > 0; n /= 2) {
    x = merge(x, shuffle_down(x, n)); // lanes whose partner is outside make nonsense that lane 0 never sees
  }
  return shuffle(x, 0);
}

// Across, not down: a + b and b + a are the same bits, so all lanes end up equal without a broadcast.
template <class F>
__device__ __forceinline__ F warp_sum(F x) {
#pragma unroll
  for (int n = 16; n > 0; n /= 2) {
    x += __shfl_xor_sync(kFullMask, x, n);
  }
  return x;
}

template <class F>
__device__ __forceinline__ F warp_max(F x) {
#pragma unroll
  for (int n = 16; n > 0; n /= 2) {
    const F other = __shfl_xor_sync(kFullMask, x, n);
    x = x > other || x != x ? x : other; // NaN comes through
  }
  return x;
}

// merge(x, none) must be x.
template <int Threads, class T, class Merge>
__device__ __forceinline__ T block_reduce(T x, const Merge& merge, const T& none) {
  static_assert(Threads % 32 == 0 && Threads <= 1024);
  constexpr int kWarps = Threads / 32;
  x = warp_reduce(x, merge);
  if constexpr (kWarps > 1) {
    FASTPPO_SHARED(T, parts, kWarps);
    if (lane_id() == 0) {
      parts[warp_id()] = x;
    }
    __syncthreads();
    x = none;
    if (lane_id() < kWarps) {
      x = parts[lane_id()];
    }
    x = warp_reduce(x, merge); // every warp for itself: cheaper than one and another barrier
    __syncthreads();           // parts may be written again by the next reduction
  }
  return x;
}

// True in all threads of one block: the last of `blocks`, by default of the launch, to get here with this counter. It
// sees what those wrote before. The counter starts at 0 and is 0 again afterwards. For one-dimensional grids.
__device__ __forceinline__ bool is_last_block(unsigned* counter, unsigned blocks) {
  FASTPPO_SHARED(int, last, 1);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last[0] = atomicInc(counter, blocks - 1) == blocks - 1;
  }
  __syncthreads();
  const bool mine = last[0] != 0;
  __threadfence();
  __syncthreads();
  return mine;
}

__device__ __forceinline__ bool is_last_block(unsigned* counter) { return is_last_block(counter, gridDim.x); }

} // namespace fastppo::cuda
