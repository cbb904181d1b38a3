// distribution_kl and its gradient on CUDA: checks, one launch each, registration.
#include "cuda/distribution_kl.cuh"

#include "cuda/tensor.h"

#include <vector>

namespace fastppo::cuda {
namespace {

// kl (...) and what its backward needs of each row, (..., 4).
std::tuple<Tensor, Tensor> distribution_kl_cuda(const Tensor& logits, const Tensor& ref_logits, double temperature) {
  check_distribution_kl(logits, ref_logits, temperature);
  std::vector<int64_t> sizes(logits.sizes().begin(), logits.sizes().end());
  const int64_t vocabulary = sizes.back();
  sizes.back() = kKlStats;
  const Tensor kl = empty_float(logits, Sizes(sizes.data(), sizes.size() - 1));
  const Tensor stats = empty_float(logits, sizes);
  if (kl.numel() == 0) {
    return {kl, stats};
  }
  const OnDevice on(logits);
  const RowSplit split(kl.numel(), vocabulary);
  const HeldParts<KlSums> held(logits, split, on);
  with_element(logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const HeldLogits<T> rows(logits), ref_rows(ref_logits);
    const DistributionKlArgs<T> args{rows,         ref_rows,   1 / temperature, base_2_scale(1 / temperature),
                                     split,        held.parts, held.counters,   floats(kl),
                                     floats(stats)};
    FASTPPO_LAUNCH((distribution_kl_kernel<T>), split.blocks(), kRowThreads, 0, on.stream, args);
  });
  return {kl, stats};
}

std::tuple<Tensor, Tensor> distribution_kl_backward_cuda(
    const Tensor& grad_kl, const Tensor& logits, const Tensor& ref_logits, const Tensor& kl, const Tensor& stats,
    double temperature, bool needs_logits, bool needs_ref_logits) {
  const Tensor dlogits = empty_if(needs_logits, logits), dref_logits = empty_if(needs_ref_logits, ref_logits);
  if (logits.numel() == 0 || !(needs_logits || needs_ref_logits)) {
    return {dlogits, dref_logits};
  }
  const OnDevice on(logits);
  const HeldPerRow<float> row_grad(grad_kl), row_kl(kl);
  const Tensor held_stats = torch::stable::contiguous(stats);
  const RowSplit split(kl.numel(), logits.size(logits.dim() - 1));
  with_element(logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const HeldLogits<T> rows(logits), ref_rows(ref_logits);
    const DistributionKlBackwardArgs<T> args{
        row_grad,
        rows,
        ref_rows,
        row_kl,
        {static_cast<const float*>(held_stats.const_data_ptr()), held_stats.numel()},
        1 / temperature,
        split,
        needs_logits ? elements<T>(dlogits) : Span<T>(),
        needs_ref_logits ? elements<T>(dref_logits) : Span<T>()};
    FASTPPO_LAUNCH((distribution_kl_backward_kernel<T>), split.blocks(), kRowThreads, 0, on.stream, args);
  });
  return {dlogits, dref_logits};
}

} // namespace

FASTPPO_CUDA_IMPL(m) {
  m.impl("distribution_kl", TORCH_BOX(&distribution_kl_cuda));
  m.impl("distribution_kl_backward", TORCH_BOX(&distribution_kl_backward_cuda));
}

} // namespace fastppo::cuda
