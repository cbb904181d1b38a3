// The vector loops of sample, for csrc/cpu/sample.cpp.
#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"

namespace fastppo {

// Maxima are kept for blocks of this many logits, so that a truncation looks only where kept tokens can be.
constexpr int64_t kMaximaBlock = 64;

} // namespace fastppo

// weights[i] = e^((x[i] - max) / temperature) over n logits, x[i] <= max; exactly 0 for -inf.
FASTPPO_KERNEL(
    softmax_weights, const void* x, DType dtype, int64_t n, float max, float inv_temperature, float* weights);

// The maximum of every kMaximaBlock logits, the last block may be shorter.
FASTPPO_KERNEL(block_maxima, const void* x, DType dtype, int64_t n, float* maxima);

// out[i] = x[i].
FASTPPO_KERNEL(to_float32, const void* x, DType dtype, int64_t n, float* out);
