/*
logprobs and its gradient: csrc/logprobs.h and csrc/softmax.h have the formulas, cuda/softmax.cuh the row loop.
logits: rows x V of one dtype at any distance and alignment; ids: one int64 per row.

Forward, one launch and one read: a block per row, or per part of one where rows are few; then the last block of a row
merges its parts. The picked logit is read once more, by one thread. An id outside [0, V) is found out here and not on
the host, which would have to wait for the device: it gives a logprob of NaN and nothing is read at it.

Backward, one launch, one read and one write. A row whose two incoming gradients are 0 is written as zeros and not read.
In base 2, p = 2^t and log p = t / log2(e): subtract, multiply-add, bound, 2^t, multiply-add, multiply. Where row and
gradient lie alike but not on 16 bytes (an odd V), the first few elements are done one by one and the rest in vectors:
unlike a sum, a gradient does not depend on who computes it. The element of the picked id is written again, in float64.
*/
#pragma once

#include "cuda/softmax.cuh"

namespace fastppo::cuda {

template <class T>
struct LogprobsArgs {
  LogitRows<T> logits;
  PerRow<int64_t> ids;
  double inv_temperature;
  float scale; // base_2_scale()
  RowSplit split;
  Span<SoftmaxSums> parts;
  unsigned* counters;
  Span<float> logprobs, entropy, reference, log_sum;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, kBlocksPerMultiprocessor) logprobs_kernel(const LogprobsArgs<T> args) {
  for_parts(args.split, [&](int64_t row, int64_t part, int64_t first, int64_t columns) {
    const Span<const T> logits = args.logits[row];
    SoftmaxSums sums = softmax_sums(logits.part(first, columns), args.scale, args.inv_temperature);
    const auto merge = [&](SoftmaxSums a, const SoftmaxSums& b) {
      a.merge(b, args.inv_temperature);
      return a;
    };
    if (merge_parts(args.split, row, part, args.parts, args.counters, merge, sums) && threadIdx.x == 0) {
      const int64_t id = args.ids[row];
      double logprob = std::numeric_limits<double>::quiet_NaN();
      if (id >= 0 && id < logits.size) {
        logprob = sums.logprob(to_float(logits[id]), args.inv_temperature);
      }
      args.logprobs[row] = static_cast<float>(logprob);
      args.entropy[row] = static_cast<float>(sums.entropy());
      args.reference[row] = static_cast<float>(sums.reference);
      args.log_sum[row] = static_cast<float>(sums.log_sum_of_rounded(args.inv_temperature));
    }
  });
}

// --- backward
// -------------------------------------------------------------------------------------------------------------

// csrc/softmax.h's SoftmaxGrad in base 2, for the elements that are not the picked one.
struct Base2Grad {
  float reference, scale, log_sum, constant, slope;

  __device__ __forceinline__ explicit Base2Grad(const SoftmaxGrad& grad)
      : reference(grad.reference),
        scale(static_cast<float>(grad.inv_temperature * kLog2E)),
        log_sum(static_cast<float>(grad.log_sum * kLog2E)),
        constant(grad.constant),
        slope(static_cast<float>(grad.slope / kLog2E)) {}

  __device__ __forceinline__ float operator()(float logit, int64_t = 0) const {
    const float t = fmaxf((logit - reference) * scale - log_sum, kLowest);
    return exp2_approx(t) * (slope * t + constant);
  }
};

template <class T>
struct LogprobsBackwardArgs {
  PerRow<float> grad_logprobs, grad_entropy; // null: 0
  LogitRows<T> logits;
  PerRow<int64_t> ids;
  PerRow<float> entropy, reference, log_sum;
  double inv_temperature;
  RowSplit split;
  Span<T> dlogits;
};

template <class T>
__global__ void __launch_bounds__(kRowThreads, kBlocksPerMultiprocessor)
    logprobs_backward_kernel(const LogprobsBackwardArgs<T> args) {
  for_parts(args.split, [&](int64_t row, int64_t, int64_t first, int64_t columns) {
    const int64_t vocabulary = args.split.columns;
    const Span<T> dlogits = args.dlogits.part(row * vocabulary + first, columns);
    const float grad_logprob = args.grad_logprobs[row], grad_entropy = args.grad_entropy[row];
    if (grad_logprob == 0 && grad_entropy == 0) {
      write_zeros(dlogits);
      return;
    }
    const Span<const T> logits = args.logits[row].part(first, columns);
    const SoftmaxGrad grad(
        grad_logprob, grad_entropy, args.entropy[row], args.reference[row], args.log_sum[row], args.inv_temperature);
    map_row(logits, dlogits, Base2Grad(grad));
    const int64_t picked = args.ids[row] - first;
    if (picked >= 0 && picked < columns) { // the same for all threads
      __syncthreads();
      if (threadIdx.x == 0) {
        dlogits[picked] = from_float<T>(static_cast<float>(grad.picked(to_float(logits[picked]), grad_logprob)));
      }
    }
  });
}

} // namespace fastppo::cuda
