/*
kl_penalty and its gradient, element by element: csrc/kl.h has the formulas.
  out = kl(logprobs - ref_logprobs)        out = grad * slope(logprobs - ref_logprobs)
inputs: rows x columns of any of the three dtypes, any distance between rows; out: contiguous float32.
A lane takes kGroup neighbouring columns, a warp 32 of those; warps stride over all (row, part of a row) pairs. The
estimator and the dtypes are chosen at run time: 2 to 4 bytes per input and element leave the arithmetic idle.
*/
#pragma once

#include "csrc/kl.h"
#include "cuda/memory.cuh"

namespace fastppo::cuda {

constexpr int kKlThreads = 256;
constexpr int kKlGroup = 8; // one 16-byte load of bfloat16, two of float32

struct KlArgs {
  Rows logprobs, ref_logprobs, grad; // no grad: the value
  KlEstimator estimator;
  Span<float> out;
};

// 4 blocks a multiprocessor at least: see gae.cuh.
__global__ void __launch_bounds__(kKlThreads, 4) kl_kernel(const KlArgs args) {
  const int64_t columns = args.logprobs.columns;
  const int64_t parts = (columns + 32 * kKlGroup - 1) / (32 * kKlGroup);
  const int64_t warps = static_cast<int64_t>(gridDim.x) * (kKlThreads / 32);
  for (int64_t task = blockIdx.x * int64_t{kKlThreads / 32} + warp_id(); task < args.logprobs.rows * parts;
       task += warps) {
    const int64_t row = task / parts, first = (task % parts * 32 + lane_id()) * kKlGroup;
    if (first >= columns) {
      continue;
    }
    float logprobs[kKlGroup], ref_logprobs[kKlGroup], grad[kKlGroup], out[kKlGroup];
    load_floats(args.logprobs, row, first, logprobs);
    load_floats(args.ref_logprobs, row, first, ref_logprobs);
    if (args.grad) {
      load_floats(args.grad, row, first, grad);
    }
    with_estimator(args.estimator, [&](auto estimator) {
      constexpr KlEstimator kEstimator = decltype(estimator)::value;
#pragma unroll
      for (int i = 0; i < kKlGroup; ++i) {
        const float distance = logprobs[i] - ref_logprobs[i];
        out[i] = args.grad ? grad[i] * kl_slope<kEstimator>(distance) : kl_estimate<kEstimator>(distance);
      }
    });
    store_floats(args.out.part(row * columns, columns), first, out);
  }
}

} // namespace fastppo::cuda
