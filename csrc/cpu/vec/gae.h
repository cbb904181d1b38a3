// The vector loops of gae, for csrc/cpu/gae.cpp. The formulas are in csrc/gae.h.
#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"
#include "csrc/gae.h"
#include "csrc/kl.h"

namespace fastppo {

struct GaeArgs {
  Rows rewards, values;
  MaskRows mask;
  const float* bootstrap_values; // one per row, or null
  int64_t columns;
  float gamma, gamma_lam;
  float *advantages, *returns; // contiguous
};

struct RewardArgs {
  Rows logprobs, ref_logprobs;
  MaskRows mask;
  const float* scores; // one per row
  int64_t columns;
  KlEstimator estimator;
  float kl_coef, reward_clip; // reward_clip: infinity for none
  float *rewards, *kl;        // contiguous
};

} // namespace fastppo

// Rows [begin, end).
FASTPPO_KERNEL(gae_rows, const GaeArgs& args, int64_t begin, int64_t end);
FASTPPO_KERNEL(reward_rows, const RewardArgs& args, int64_t begin, int64_t end);
// n <= kBlock columns of one row.
FASTPPO_KERNEL(
    moments_of_block, const Rows& x, const MaskRows& mask, int64_t row, int64_t begin, int64_t n, Moments& out);
FASTPPO_KERNEL(
    standardize_block, const Rows& x, const MaskRows& mask, int64_t row, int64_t begin, int64_t n,
    const Standardize& by, float* out);
