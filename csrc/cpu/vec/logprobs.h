#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"
#include "csrc/softmax.h"

// The sums over n logits, and the maximum of each kChunk of them where `maxima` is not null (the last may be shorter).
FASTPPO_KERNEL(
    softmax_sums, const void* x, DType dtype, int64_t n, double inv_temperature, SoftmaxSums& out, float* maxima);

// dx over n logits of the same type; the term of the picked id is the caller's. dx may be x.
FASTPPO_KERNEL(logprobs_grad, const SoftmaxGrad& row, const void* x, DType dtype, int64_t n, void* dx);
