/*
What the kernels of ppo_loss and ppo_loss_from_logits share: the walk over tokens, their count, the normalizer.
A lane takes kPpoGroup neighbouring tokens, a warp 32 of those; warps stride over all (row, part of a row) pairs.
*/
#pragma once

#include "cuda/memory.cuh"
#include "cuda/reduce.cuh"

namespace fastppo::cuda {

constexpr int kPpoThreads = 512;
constexpr int kPpoWarps = kPpoThreads / 32;
constexpr int kPpoGroup = 8;                 // tokens per lane: one 16-byte load of bfloat16, two of float32
constexpr int64_t kPpoPart = 32 * kPpoGroup; // tokens per warp and step

// Runs body(row, first column) for every group of tokens; lanes past the end of a row stay away.
template <class Body>
__device__ __forceinline__ void for_ppo_groups(const MaskRows& shape, const Body& body) {
  const int64_t parts = (shape.columns + kPpoPart - 1) / kPpoPart;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kPpoWarps;
  for (int64_t task = blockIdx.x * int64_t{kPpoWarps} + warp_id(); task < shape.rows * parts; task += warps) {
    const int64_t first = task % parts * kPpoPart + lane_id() * kPpoGroup;
    if (first < shape.columns) {
      body(task / parts, first);
    }
  }
}

struct AddCounts {
  __device__ __forceinline__ long long operator()(long long a, long long b) const { return a + b; }
};

// Writes this block's share of the tokens that count. All threads must come.
__device__ __forceinline__ void count_tokens(const MaskRows& mask, const Span<long long>& counts) {
  long long mine = 0;
  for_ppo_groups(mask, [&](int64_t row, int64_t first) {
    bool places[kPpoGroup];
    load_mask(mask, row, first, places);
#pragma unroll
    for (int i = 0; i < kPpoGroup; ++i) {
      mine += places[i];
    }
  });
  mine = block_reduce<kPpoThreads>(mine, AddCounts(), 0LL);
  if (threadIdx.x == 0) {
    counts[blockIdx.x] = mine;
  }
}

// NaN where the number given cannot be divided by: nobody is there to be told.
__device__ __forceinline__ double given_normalizer(const Number& given) {
  const double number = given.value();
  const bool divides = number > 0 && number < std::numeric_limits<double>::infinity();
  return divides ? number : std::numeric_limits<double>::quiet_NaN();
}

} // namespace fastppo::cuda
