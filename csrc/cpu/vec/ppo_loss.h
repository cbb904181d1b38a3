// The vector loop of ppo_loss, for csrc/cpu/ppo_loss.cpp. The formulas are in csrc/ppo_loss.h.
#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"
#include "csrc/ppo_loss.h"

namespace fastppo {

struct PpoArgs {
  Rows new_logprobs, logprobs, advantages;
  Rows new_values, values, returns, entropy, ref_logprobs; // without data where not given
  MaskRows mask;
  int64_t columns;
  KlEstimator kl_estimator;
  PpoCoefficients coefficients;
  float *grad_logprobs, *grad_values, *grad_entropy; // contiguous; null where nobody asks for them
};

} // namespace fastppo

// n <= kBlock columns of one row.
FASTPPO_KERNEL(ppo_loss_block, const PpoArgs& args, int64_t row, int64_t begin, int64_t n, PpoSums& sums);
