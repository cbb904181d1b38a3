/*
ppo_loss: loss, every metric and every gradient from one pass over the tokens. csrc/ppo_loss.h has the formulas.
inputs: rows x columns of any of the three dtypes, any distance between rows, and a mask; gradients: contiguous
float32, 0 where masked; loss and stats: float32. Each input is read once and each gradient written once: 37 bytes a
token with a critic and a reference in float32.

A lane takes kPpoGroup neighbouring tokens, a warp 32 of those; warps stride over all (row, part of a row) pairs. The
terms are taken one after the other, the policy's, the KL's, the critic's, the entropy's, so that no more than four
inputs are in registers at once. A lane adds up its few tokens in float32; lanes, warps and blocks are merged in float64
and in order. The grid depends on the shape alone, so the bits are the same on every run and every device.

The normalizer is read from the device, or counted there; a gradient needs it before the first store. Launches: up to
kPpoOneBlockTokens one, in which a single block counts and then does the rest. Above, two: the first counts (where the
normalizer is not given) and sets the counter by which, in the second, the last block to arrive knows that it is: it
adds up the parts of all. Counts are integers, one per block.
*/
#pragma once

#include "csrc/ppo_loss.h"
#include "cuda/ppo_tokens.cuh"

namespace fastppo::cuda {

constexpr int64_t kPpoBlocks = 512;           // at most: each is one part of the sums
constexpr int64_t kPpoOneBlockTokens = 16384; // 32 tokens per thread: about what a second launch costs

enum PpoPhase { kPpoPrepare, kPpoLoss };

struct PpoOutputs {
  Span<float> loss, stats, grad_logprobs, grad_values, grad_entropy; // gradients: without data where not asked for
};

struct PpoArgs {
  Rows new_logprobs, logprobs, advantages;
  Rows new_values, values, returns, entropy, ref_logprobs; // without data where not given
  MaskRows mask;
  PpoSettings settings;
  bool count; // the normalizer is the number of tokens that count
  Number normalizer;
  PpoOutputs out;
  Span<long long> counts; // one per block of the first launch
  Span<PpoSums> parts;    // one per block of the second
  unsigned* counter;
};

// The same in every thread; all must come.
__device__ __forceinline__ double counted_normalizer(const Span<long long>& counts) {
  long long mine = 0;
  for (int64_t i = threadIdx.x; i < counts.size; i += kPpoThreads) {
    mine += counts[i];
  }
  mine = block_reduce<kPpoThreads>(mine, AddCounts(), 0LL);
  return static_cast<double>(mine > 1 ? mine : 1);
}

// One thread's sums, of at most a few dozen tokens.
struct PpoThreadSums {
  float of[kPpoStats] = {};

  __device__ __forceinline__ void add(PpoStat stat, bool counts, float x) { of[stat] += counts ? x : 0.0f; }

  __device__ __forceinline__ PpoSums wide() const {
    PpoSums out;
#pragma unroll
    for (int stat = 0; stat < kPpoStats; ++stat) {
      out.of[stat] = of[stat];
    }
    return out;
  }
};

// What the threads of a block add up to, in thread 0. All must come. Statistic by statistic: as one object of 72 bytes
// (block_reduce) they would take twice the registers, and go through local memory.
__device__ __forceinline__ PpoSums block_ppo_sums(const PpoSums& mine) {
  FASTPPO_SHARED(double, warps, kPpoWarps* kPpoStats);
#pragma unroll
  for (int stat = 0; stat < kPpoStats; ++stat) {
    const double x = stat == kRatioMax ? warp_max(mine.of[stat]) : warp_sum(mine.of[stat]);
    if (lane_id() == 0) {
      warps[warp_id() * kPpoStats + stat] = x;
    }
  }
  __syncthreads();
  PpoSums total;
  if (threadIdx.x == 0) {
#pragma unroll 1
    for (int warp = 0; warp < kPpoWarps; ++warp) {
      PpoSums part;
#pragma unroll
      for (int stat = 0; stat < kPpoStats; ++stat) {
        part.of[stat] = warps[warp * kPpoStats + stat];
      }
      total.merge(part);
    }
  }
  __syncthreads(); // warps may be written again
  return total;
}

__device__ __forceinline__ void ppo_group(
    const PpoArgs& args, const PpoCoefficients& c, int64_t row, int64_t first, PpoThreadSums& sums) {
  const int64_t columns = args.mask.columns, begin = row * columns;
  bool counts[kPpoGroup];
  float new_logprobs[kPpoGroup], slopes[kPpoGroup], x[kPpoGroup], y[kPpoGroup];
  load_mask(args.mask, row, first, counts);
  load_floats(args.new_logprobs, row, first, new_logprobs);
  load_floats(args.logprobs, row, first, x);
  load_floats(args.advantages, row, first, y);
#pragma unroll
  for (int i = 0; i < kPpoGroup; ++i) {
    const float log_ratio = new_logprobs[i] - x[i], ratio = vexp(log_ratio);
    const ClippedTerm<float> term = capped(policy_term(ratio, y[i], c.ratio_low, c.ratio_high), y[i], c.dual_clip);
    slopes[i] = term.slope * c.policy_scale;
    sums.add(kPolicyLoss, counts[i], term.loss);
    sums.add(kApproxKl, counts[i], 0.5f * log_ratio * log_ratio);
    sums.add(kClipped, counts[i], term.clipped);
    sums.add(kRatio, counts[i], ratio);
    sums.of[kRatioMax] = vmax(sums.of[kRatioMax], counts[i] ? ratio : 0.0f);
  }
  if (args.ref_logprobs) {
    load_floats(args.ref_logprobs, row, first, x);
    with_estimator(args.settings.kl_estimator, [&](auto estimator) {
      constexpr KlEstimator kEstimator = decltype(estimator)::value;
#pragma unroll
      for (int i = 0; i < kPpoGroup; ++i) {
        const float d = new_logprobs[i] - x[i];
        sums.add(kKl, counts[i], kl_estimate<kEstimator>(d));
        slopes[i] += c.kl_scale * kl_slope<kEstimator>(d);
      }
    });
  }
#pragma unroll
  for (int i = 0; i < kPpoGroup; ++i) {
    slopes[i] = counts[i] ? slopes[i] : 0.0f;
  }
  if (args.out.grad_logprobs) {
    store_floats(args.out.grad_logprobs.part(begin, columns), first, slopes);
  }

  if (args.new_values) {
    float (&new_values)[kPpoGroup] = new_logprobs; // no longer needed
    load_floats(args.new_values, row, first, new_values);
    load_floats(args.values, row, first, x);
    load_floats(args.returns, row, first, y);
#pragma unroll
    for (int i = 0; i < kPpoGroup; ++i) {
      const ClippedTerm<float> term = value_term(new_values[i], x[i], y[i], c.value_clip_range);
      sums.add(kValueLoss, counts[i], term.loss);
      sums.add(kValueClipped, counts[i], term.clipped);
      slopes[i] = counts[i] ? c.value_scale * term.slope : 0.0f;
    }
    if (args.out.grad_values) {
      store_floats(args.out.grad_values.part(begin, columns), first, slopes);
    }
  }

  if (args.entropy) {
    load_floats(args.entropy, row, first, x);
#pragma unroll
    for (int i = 0; i < kPpoGroup; ++i) {
      sums.add(kEntropy, counts[i], x[i]);
      slopes[i] = counts[i] ? c.entropy_scale : 0.0f;
    }
    if (args.out.grad_entropy) {
      store_floats(args.out.grad_entropy.part(begin, columns), first, slopes);
    }
  }
}

// All threads must come.
__device__ __forceinline__ void ppo_loss_phase(const PpoArgs& args) {
  const double normalizer = args.count ? counted_normalizer(args.counts) : given_normalizer(args.normalizer);
  FASTPPO_SHARED(PpoCoefficients, coefficients, 1); // by one thread: float64 divisions are slow on most devices
  if (threadIdx.x == 0) {
    coefficients[0] = PpoCoefficients(args.settings, normalizer);
  }
  __syncthreads();
  const PpoCoefficients c = coefficients[0];

  PpoThreadSums sums;
  for_ppo_groups(args.mask, [&](int64_t row, int64_t first) { ppo_group(args, c, row, first, sums); });

  PpoSums total = block_ppo_sums(sums.wide());
  if (gridDim.x > 1) {
    if (threadIdx.x == 0) {
      args.parts[blockIdx.x] = total;
    }
    if (!is_last_block(args.counter)) {
      return;
    }
    total = PpoSums();
    for (int64_t i = threadIdx.x; i < args.parts.size; i += kPpoThreads) {
      const PpoSums part = args.parts[i];
      total.merge(part);
    }
    total = block_ppo_sums(total);
  }
  if (threadIdx.x == 0) {
    const PpoResult result = total.result(args.settings, normalizer);
    args.out.loss[0] = result.loss;
#pragma unroll
    for (int stat = 0; stat < kPpoStats; ++stat) {
      args.out.stats[stat] = result.stats[stat];
    }
  }
}

__global__ void __launch_bounds__(kPpoThreads, 1) ppo_loss_kernel(const PpoArgs args, int first_phase, int last_phase) {
  if (first_phase == kPpoPrepare) {
    if (args.count) {
      count_tokens(args.mask, args.counts);
    }
    if (args.counter != nullptr && blockIdx.x == 0 && threadIdx.x == 0) {
      *args.counter = 0;
    }
    __syncthreads(); // where the loss follows in this launch, this block is the only one
  }
  if (last_phase == kPpoLoss) {
    ppo_loss_phase(args);
  }
}

} // namespace fastppo::cuda
