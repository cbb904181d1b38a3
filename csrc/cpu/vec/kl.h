// The vector loops of kl_penalty, for csrc/cpu/kl.cpp. The formulas are in csrc/kl.h.
#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"
#include "csrc/kl.h"

namespace fastppo {

struct KlArgs {
  Rows logprobs, ref_logprobs;
  Rows grad; // backward only
  KlEstimator estimator;
};

} // namespace fastppo

// n <= kBlock columns of one row; out has room for n.
FASTPPO_KERNEL(kl_block, const KlArgs& args, int64_t row, int64_t begin, int64_t n, float* out);
FASTPPO_KERNEL(kl_backward_block, const KlArgs& args, int64_t row, int64_t begin, int64_t n, float* out);
