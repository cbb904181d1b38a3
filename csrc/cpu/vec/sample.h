// The vector loops of sample, for csrc/cpu/sample.cpp.
#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"

// weights[i] = e^((x[i] - reference) / temperature) over n logits; exactly 0 for -inf.
FASTPPO_KERNEL(
    softmax_weights, const void* x, DType dtype, int64_t n, float reference, double inv_temperature, float* weights);

// The same, and the sum of the weights of each kChunk of them (the last may be shorter).
FASTPPO_KERNEL(
    chunk_weights, const void* x, DType dtype, int64_t n, float reference, double inv_temperature, float* weights,
    double* chunk_sums);

// How many x[i] >= bound.
FASTPPO_KERNEL(count_at_least, const float* x, int64_t n, float bound, int64_t& count);

// The places i with x[i] >= bound, and x[i], in order. There must be room for n of them.
FASTPPO_KERNEL(
    select_at_least, const void* x, DType dtype, int64_t n, float bound, int64_t* places, float* values,
    int64_t& count);
