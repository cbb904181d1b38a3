/*
Generalized advantage estimation, whitening, and the two with the KL-shaped rewards in front: csrc/gae.h has the
formulas. inputs: rows x columns (one row per response) of any of the three dtypes, any distance between rows, and a
mask; results: contiguous float32, 0 where masked.

The recursion. One warp per row, from the end: a lane takes kGaeGroup neighbouring tokens, the warp 256 of them, so
T = 4096 is 16 steps. A token is a map a -> delta + gamma lam a of the advantage after it; a lane composes its own, a
suffix scan of 5 shuffles composes the lanes', and then each lane runs csrc/gae.h's own recursion from what comes in.
The value of the next token that counts, which may lie any number of masked lanes away, is found with a ballot.

The statistics. Count, sum and sum of squares per lane in float64 (2 of those operations per token: nothing beside the
memory traffic, and exact enough for any float32 input, see test_whitening_survives_a_mean_far_from_zero), then Moments,
merged lane by lane, warp by warp, block by block, always in the same order. The grid depends on the shape alone, so the
bits are the same on every run and every device.

How many launches. Whitening needs the statistics of all rows before it can change the first, and a grid can only wait
for itself when all its blocks are resident, which without a cooperative launch nobody promises (two such grids on two
streams can starve each other). So a kernel is a list of phases with a statistic between them: up to kOneBlockTokens,
one block does them all in one launch; above, each phase is a launch, and every block of the next one merges the parts
of the one before for itself. Without whitening it is always one launch, with one of the two whitenings at most two.
*/
#pragma once

#include "csrc/gae.h"
#include "csrc/kl.h"
#include "cuda/memory.cuh"
#include "cuda/reduce.cuh"

namespace fastppo::cuda {

constexpr int kGaeThreads = 256;
constexpr int kGaeWarps = kGaeThreads / 32;
// __launch_bounds__ name how many blocks a multiprocessor holds at least. Left to itself, ptxas takes fewer registers
// than it needs on one architecture or another and spills the rest (tests/cuda/test_static.py).
constexpr int kGaeGroup = 8;                  // tokens per lane: one 16-byte load of bfloat16, two of float32
constexpr int64_t kGaeChunk = 32 * kGaeGroup; // tokens per warp and step
constexpr int64_t kGaeBlocks = 512;           // at most: each is one part of a statistic
constexpr int64_t kOneBlockTokens = 16384;    // 16 tokens per thread and phase: about what a second launch costs

// --- the recursion
// --------------------------------------------------------------------------------------------------------

// One chunk of a row. The carry is the same in all lanes and comes from the chunk after this one.
__device__ __forceinline__ void gae_chunk(
    const bool (&counts)[kGaeGroup], const float (&rewards)[kGaeGroup], const float (&values)[kGaeGroup], float gamma,
    float gamma_lam, GaeCarry& carry, float (&advantages)[kGaeGroup]) {
  const int lane = lane_id();
  bool any = false;
  float first_value = 0;
#pragma unroll
  for (int i = kGaeGroup - 1; i >= 0; --i) {
    any = any || counts[i];
    first_value = counts[i] ? values[i] : first_value;
  }
  const unsigned above = __ballot_sync(kFullMask, any) & ~(kFullMask >> (31 - lane));
  const float above_value = __shfl_sync(kFullMask, first_value, above != 0 ? __ffs(static_cast<int>(above)) - 1 : lane);
  const float next_value = above != 0 ? above_value : carry.next_value;

  // This lane's tokens as one map a -> add + scale * a, then the maps of this lane and all above.
  GaeCarry own{0, next_value};
  float scale = 1;
#pragma unroll
  for (int i = kGaeGroup - 1; i >= 0; --i) {
    if (counts[i]) {
      gae_step(own, rewards[i], values[i], gamma, gamma_lam);
      scale *= gamma_lam;
    }
  }
  float add = own.advantage;
#pragma unroll
  for (int n = 1; n < 32; n *= 2) {
    const float add_above = __shfl_down_sync(kFullMask, add, n), scale_above = __shfl_down_sync(kFullMask, scale, n);
    if (lane + n < 32) {
      add += scale * add_above;
      scale *= scale_above;
    }
  }
  const float incoming = __shfl_down_sync(kFullMask, add + scale * carry.advantage, 1);

  GaeCarry running{lane < 31 ? incoming : carry.advantage, next_value};
#pragma unroll
  for (int i = kGaeGroup - 1; i >= 0; --i) {
    advantages[i] = counts[i] ? gae_step(running, rewards[i], values[i], gamma, gamma_lam) : 0.0f;
  }
  carry.advantage = __shfl_sync(kFullMask, running.advantage, 0);
  carry.next_value = __shfl_sync(kFullMask, running.next_value, 0);
}

// Runs body(row, first column of this lane's group, whether this chunk is the row's last) over the rows of this warp,
// each from its end. All lanes come along, also those past the end of the row.
template <class Start, class Body>
__device__ __forceinline__ void for_chunks_from_the_end(
    int64_t rows, int64_t columns, const Start& start, const Body& body) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kGaeWarps;
  for (int64_t row = blockIdx.x * int64_t{kGaeWarps} + warp_id(); row < rows; row += warps) {
    start(row);
    for (int64_t chunk = (columns - 1) / kGaeChunk; chunk >= 0; --chunk) {
      body(row, chunk * kGaeChunk + lane_id() * kGaeGroup);
    }
  }
}

// --- statistics
// -----------------------------------------------------------------------------------------------------------

struct MomentSums {
  double count = 0, sum = 0, squares = 0;

  __device__ __forceinline__ void add(float x) {
    const double wide = x;
    count += 1;
    sum += wide;
    squares += wide * wide;
  }

  __device__ __forceinline__ Moments moments() const {
    if (count == 0) {
      return {};
    }
    const double mean = sum / count, m2 = squares - sum * mean;
    return {count, mean, m2 < 0 ? 0 : m2}; // NaN stays NaN
  }
};

struct MergeMoments {
  __device__ __forceinline__ Moments operator()(const Moments& a, const Moments& b) const { return merge(a, b); }
};

// This block's part, from those of its threads. All threads must come.
__device__ __forceinline__ void write_part(const MomentSums& sums, const Span<Moments>& parts) {
  const Moments part = block_reduce<kGaeThreads>(sums.moments(), MergeMoments(), Moments());
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = part;
  }
}

// The parts of all blocks, in every thread. All threads must come.
__device__ __forceinline__ Standardize merge_parts(const Span<Moments>& parts, bool keep_mean) {
  Moments mine;
  for (int64_t i = threadIdx.x; i < parts.size; i += kGaeThreads) {
    const Moments part = parts[i];
    mine = merge(mine, part);
  }
  return standardize_by(block_reduce<kGaeThreads>(mine, MergeMoments(), Moments()), keep_mean);
}

__device__ __forceinline__ float standardized(float x, const Standardize& by) {
  return (x - by.shift) * by.scale + by.offset;
}

// Runs body(row, first column) for every group of columns; lanes past the end of a row stay away.
template <class Body>
__device__ __forceinline__ void for_groups(int64_t rows, int64_t columns, const Body& body) {
  const int64_t parts = (columns + kGaeChunk - 1) / kGaeChunk;
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kGaeWarps;
  for (int64_t task = blockIdx.x * int64_t{kGaeWarps} + warp_id(); task < rows * parts; task += warps) {
    const int64_t first = task % parts * kGaeChunk + lane_id() * kGaeGroup;
    if (first < columns) {
      body(task / parts, first);
    }
  }
}

// --- gae
// ------------------------------------------------------------------------------------------------------------------

struct GaeArgs {
  Rows rewards, values;
  MaskRows mask;
  Rows bootstrap_values; // a column, or null
  float gamma, gamma_lam;
  Span<float> advantages, returns;
};

__device__ __forceinline__ GaeCarry carry_at_end(const Rows& bootstrap_values, int64_t row) {
  return {0, bootstrap_values ? load_float(bootstrap_values, row, 0) : 0.0f};
}

__device__ __forceinline__ void store_returns(
    const bool (&counts)[kGaeGroup], const float (&advantages)[kGaeGroup], const float (&values)[kGaeGroup],
    const Span<float>& row, int64_t first) {
  float returns[kGaeGroup];
#pragma unroll
  for (int i = 0; i < kGaeGroup; ++i) {
    returns[i] = counts[i] ? advantages[i] + values[i] : 0.0f;
  }
  store_floats(row, first, returns);
}

__global__ void __launch_bounds__(kGaeThreads, 4) gae_kernel(const GaeArgs args) {
  const int64_t columns = args.rewards.columns;
  GaeCarry carry;
  for_chunks_from_the_end(
      args.rewards.rows, columns, [&](int64_t row) { carry = carry_at_end(args.bootstrap_values, row); },
      [&](int64_t row, int64_t first) {
        bool counts[kGaeGroup];
        float rewards[kGaeGroup], values[kGaeGroup], advantages[kGaeGroup];
        load_mask(args.mask, row, first, counts);
        load_floats(args.rewards, row, first, rewards);
        load_floats(args.values, row, first, values);
        gae_chunk(counts, rewards, values, args.gamma, args.gamma_lam, carry, advantages);
        store_floats(args.advantages.part(row * columns, columns), first, advantages);
        store_returns(counts, advantages, values, args.returns.part(row * columns, columns), first);
      });
}

// --- whiten, scale_to_unit_std
// ----------------------------------------------------------------------------------------------

struct StandardizeArgs {
  Rows x;
  MaskRows mask;
  bool keep_mean;
  Span<float> out;
  Span<Moments> parts; // one per block
};

enum StandardizePhase { kMeasure, kStandardize };

__global__ void __launch_bounds__(kGaeThreads, 4)
    standardize_kernel(const StandardizeArgs args, int first_phase, int last_phase) {
  const int64_t columns = args.x.columns;
  for (int phase = first_phase; phase <= last_phase; ++phase) {
    if (phase == kMeasure) {
      MomentSums sums;
      for_groups(args.x.rows, columns, [&](int64_t row, int64_t first) {
        bool counts[kGaeGroup];
        float x[kGaeGroup];
        load_mask(args.mask, row, first, counts);
        load_floats(args.x, row, first, x);
#pragma unroll
        for (int i = 0; i < kGaeGroup; ++i) {
          if (counts[i]) {
            sums.add(x[i]);
          }
        }
      });
      write_part(sums, args.parts);
      __syncthreads(); // where the next phase follows in this launch, this block is the only one
    } else {
      const Standardize by = merge_parts(args.parts, args.keep_mean);
      for_groups(args.x.rows, columns, [&](int64_t row, int64_t first) {
        bool counts[kGaeGroup];
        float x[kGaeGroup];
        load_mask(args.mask, row, first, counts);
        load_floats(args.x, row, first, x);
#pragma unroll
        for (int i = 0; i < kGaeGroup; ++i) {
          x[i] = counts[i] ? standardized(x[i], by) : 0.0f;
        }
        store_floats(args.out.part(row * columns, columns), first, x);
      });
    }
  }
}

// --- rewards_and_advantages
// -------------------------------------------------------------------------------------------------

struct RewardsAndAdvantagesArgs {
  Rows scores; // a column
  Rows logprobs, ref_logprobs, values;
  MaskRows mask;
  Rows bootstrap_values; // a column, or null
  KlEstimator estimator;
  float kl_coef, reward_clip; // reward_clip: infinity for none
  bool whiten_rewards, whiten_advantages;
  float gamma, gamma_lam;
  Span<float> rewards, kl, advantages, returns;
  Span<Moments> reward_parts, advantage_parts; // one per block
};

// kShapeRewards only where rewards are whitened; else kAdvantages shapes them on its way.
enum RewardsPhase { kShapeRewards, kAdvantages, kWhitenAdvantages };

// KL and rewards of one chunk, stored; the score goes to the row's last token that counts, which is the first one met.
__device__ __forceinline__ void shape_rewards(
    const RewardsAndAdvantagesArgs& args, int64_t row, int64_t first, const bool (&counts)[kGaeGroup], bool& has_score,
    float (&rewards)[kGaeGroup]) {
  const int64_t columns = args.logprobs.columns;
  float logprobs[kGaeGroup], ref_logprobs[kGaeGroup], kl[kGaeGroup];
  load_floats(args.logprobs, row, first, logprobs);
  load_floats(args.ref_logprobs, row, first, ref_logprobs);
  with_estimator(args.estimator, [&](auto estimator) {
#pragma unroll
    for (int i = 0; i < kGaeGroup; ++i) {
      kl[i] = counts[i] ? kl_estimate<decltype(estimator)::value>(logprobs[i] - ref_logprobs[i]) : 0.0f;
    }
  });
  int last = -1;
#pragma unroll
  for (int i = 0; i < kGaeGroup; ++i) {
    rewards[i] = counts[i] ? -args.kl_coef * kl[i] : 0.0f;
    last = counts[i] ? i : last;
  }
  const unsigned lanes = __ballot_sync(kFullMask, last >= 0);
  if (!has_score && lanes != 0) {
    has_score = true;
    if (lane_id() == 31 - __clz(static_cast<int>(lanes))) {
      const float score = load_float(args.scores, row, 0);
      const float clipped = vmax(-args.reward_clip, vmin(score, args.reward_clip));
#pragma unroll
      for (int i = 0; i < kGaeGroup; ++i) {
        rewards[i] += i == last ? clipped : 0.0f;
      }
    }
  }
  store_floats(args.kl.part(row * columns, columns), first, kl);
}

__device__ __forceinline__ void add_counted(
    MomentSums& sums, const bool (&counts)[kGaeGroup], const float (&x)[kGaeGroup]) {
#pragma unroll
  for (int i = 0; i < kGaeGroup; ++i) {
    if (counts[i]) {
      sums.add(x[i]);
    }
  }
}

__device__ __forceinline__ void rewards_phase(const RewardsAndAdvantagesArgs& args) {
  const int64_t columns = args.logprobs.columns;
  MomentSums sums;
  bool has_score = false;
  for_chunks_from_the_end(
      args.logprobs.rows, columns, [&](int64_t) { has_score = false; },
      [&](int64_t row, int64_t first) {
        bool counts[kGaeGroup];
        float rewards[kGaeGroup];
        load_mask(args.mask, row, first, counts);
        shape_rewards(args, row, first, counts, has_score, rewards);
        store_floats(args.rewards.part(row * columns, columns), first, rewards);
        add_counted(sums, counts, rewards);
      });
  write_part(sums, args.reward_parts);
}

__device__ __forceinline__ void advantages_phase(const RewardsAndAdvantagesArgs& args) {
  const int64_t columns = args.logprobs.columns;
  const Standardize by = args.whiten_rewards ? merge_parts(args.reward_parts, /*keep_mean=*/true) : Standardize{};
  MomentSums sums;
  bool has_score = false;
  GaeCarry carry;
  for_chunks_from_the_end(
      args.logprobs.rows, columns,
      [&](int64_t row) {
        has_score = false;
        carry = carry_at_end(args.bootstrap_values, row);
      },
      [&](int64_t row, int64_t first) {
        bool counts[kGaeGroup];
        float rewards[kGaeGroup], values[kGaeGroup], advantages[kGaeGroup];
        const Span<float> reward_row = args.rewards.part(row * columns, columns);
        load_mask(args.mask, row, first, counts);
        load_floats(args.values, row, first, values);
        if (args.whiten_rewards) {
          load_floats(reward_row, first, rewards, 0.0f);
#pragma unroll
          for (int i = 0; i < kGaeGroup; ++i) {
            rewards[i] = counts[i] ? standardized(rewards[i], by) : 0.0f;
          }
        } else {
          shape_rewards(args, row, first, counts, has_score, rewards);
        }
        store_floats(reward_row, first, rewards);
        gae_chunk(counts, rewards, values, args.gamma, args.gamma_lam, carry, advantages);
        store_floats(args.advantages.part(row * columns, columns), first, advantages);
        store_returns(counts, advantages, values, args.returns.part(row * columns, columns), first);
        add_counted(sums, counts, advantages);
      });
  if (args.whiten_advantages) {
    write_part(sums, args.advantage_parts);
  }
}

__device__ __forceinline__ void whiten_phase(const RewardsAndAdvantagesArgs& args) {
  const int64_t columns = args.logprobs.columns;
  const Standardize by = merge_parts(args.advantage_parts, /*keep_mean=*/false);
  for_groups(args.logprobs.rows, columns, [&](int64_t row, int64_t first) {
    bool counts[kGaeGroup];
    float x[kGaeGroup];
    const Span<float> advantage_row = args.advantages.part(row * columns, columns);
    load_mask(args.mask, row, first, counts);
    load_floats(advantage_row, first, x, 0.0f);
#pragma unroll
    for (int i = 0; i < kGaeGroup; ++i) {
      x[i] = counts[i] ? standardized(x[i], by) : 0.0f;
    }
    store_floats(advantage_row, first, x);
  });
}

__global__ void __launch_bounds__(kGaeThreads, 2)
    rewards_and_advantages_kernel(const RewardsAndAdvantagesArgs args, int first_phase, int last_phase) {
  for (int phase = first_phase; phase <= last_phase; ++phase) {
    if (phase == kShapeRewards) {
      rewards_phase(args);
    } else if (phase == kAdvantages) {
      advantages_phase(args);
    } else {
      whiten_phase(args);
    }
    __syncthreads(); // where another phase follows in this launch, this block is the only one
  }
}

} // namespace fastppo::cuda
