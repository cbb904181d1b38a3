// The loop of adamw_step_, for csrc/cpu/adamw.cpp. The formula is in csrc/adamw.h.
#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"
#include "csrc/adamw.h"

namespace fastppo {

struct AdamwArgs {
  uint16_t* param; // bfloat16
  int16_t* residual;
  Rows grad; // one row
  void* exp_avg;
  DType exp_avg_dtype; // bfloat16 or float32
  void* exp_avg_sq;
  DType exp_avg_sq_dtype; // bfloat16 or float32
  AdamwSettings settings;
};

} // namespace fastppo

// n <= kBlock elements from begin on.
FASTPPO_KERNEL(adamw_block, const AdamwArgs& args, int64_t begin, int64_t n);
