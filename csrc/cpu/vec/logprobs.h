#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"
#include "csrc/softmax.h"

// The sums over n logits.
FASTPPO_KERNEL(softmax_sums, const void* x, DType dtype, int64_t n, float inv_temperature, SoftmaxSums& out);

// dx over n logits of the same type; the term of the picked id is the caller's. dx may be x.
FASTPPO_KERNEL(logprobs_grad, const SoftmaxGrad& row, const void* x, DType dtype, int64_t n, void* dx);
