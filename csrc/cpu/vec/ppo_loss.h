// The vector loop of ppo_loss, for csrc/cpu/ppo_loss.cpp. The formulas are in csrc/ppo_loss.h.
#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"
#include "csrc/kl.h"
#include "csrc/ppo_loss.h"

namespace fastppo {

struct PpoArgs {
  Rows new_logprobs, logprobs, advantages;
  Rows new_values, values, returns, entropy, ref_logprobs; // without data where not given
  MaskRows mask;
  int64_t columns;
  KlEstimator kl_estimator;
  float ratio_low, ratio_high, dual_clip, value_clip_range;
  // Already divided by the normalizer: what one token's slope is multiplied by.
  float policy_scale, value_scale, entropy_scale, kl_scale;
  float *grad_logprobs, *grad_values, *grad_entropy; // contiguous
};

struct PpoSums {
  double of[kPpoStats] = {}; // sums over the block's tokens that count; kRatioMax: their maximum
};

} // namespace fastppo

// n <= kBlock columns of one row.
FASTPPO_KERNEL(ppo_loss_block, const PpoArgs& args, int64_t row, int64_t begin, int64_t n, PpoSums& sums);
