#pragma once

#include "cpu/capability.h"
#include "cpu/rows.h"
#include "csrc/softmax.h"

namespace fastppo {

// By-products of the sums over a tile, of which a draw wants one or the other. The last part or chunk may be shorter.
struct TileDetails {
  float* part_sums = nullptr; // for each kPart of the logits, relative to the reference of the tile
  float* maxima = nullptr;    // for each kChunk of them
};

} // namespace fastppo

// The sums over n logits, and what `details` asks for, if anything.
FASTPPO_KERNEL(
    softmax_sums, const void* x, DType dtype, int64_t n, double inv_temperature, SoftmaxSums& out,
    const TileDetails* details);

// dx over n logits of the same type; the term of the picked id is the caller's. dx may be x.
FASTPPO_KERNEL(logprobs_grad, const SoftmaxGrad& row, const void* x, DType dtype, int64_t n, void* dx);
