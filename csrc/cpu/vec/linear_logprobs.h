// The vector loops of linear_logprobs, for csrc/cpu/linear_logprobs.cpp.
#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"
#include "csrc/linear_logprobs.h"

// logits[i] = cap(logit_scale * (x[i] + bias[i])) over n products x; bias may be null.
FASTPPO_KERNEL(head_logits, const Head& head, const void* x, DType dtype, const float* bias, int64_t n, float* logits);

// grad[i] = logit_scale * (1 - (logits[i] / softcap)^2) * dlogits[i], in the dtype of the products.
FASTPPO_KERNEL(
    head_grad, const Head& head, const float* logits, const float* dlogits, int64_t n, void* grad, DType dtype);

// sum[i] += x[i]. Rounded to float32 at each addition, in the order of the calls.
FASTPPO_KERNEL(add_to, const void* x, DType dtype, int64_t n, float* sum);

// out[i] = x[i] rounded to dtype.
FASTPPO_KERNEL(from_float32, const float* x, int64_t n, void* out, DType dtype);
