// logprobs and its gradient on CUDA: checks, one launch each, registration.
#include "csrc/logprobs.h"

#include "cuda/logprobs.cuh"
#include "cuda/tensor.h"

namespace fastppo::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor> logprobs_cuda(const Tensor& logits, const Tensor& ids, double temperature) {
  check_logprobs(logits, ids, temperature);
  const Tensor logprobs = empty_float(logits, ids.sizes()), entropy = empty_float(logits, ids.sizes());
  const Tensor reference = empty_float(logits, ids.sizes()), log_sum = empty_float(logits, ids.sizes());
  if (ids.numel() == 0) {
    return {logprobs, entropy, reference, log_sum};
  }
  const OnDevice on(logits);
  const RowSplit split(ids.numel(), logits.size(logits.dim() - 1));
  const HeldParts<SoftmaxSums> held(logits, split, on);
  const HeldPerRow<int64_t> id_rows(ids);
  with_element(logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const HeldLogits<T> rows(logits);
    const LogprobsArgs<T> args{
        rows,
        id_rows,
        1 / temperature,
        base_2_scale(1 / temperature),
        split,
        held.parts,
        held.counters,
        floats(logprobs),
        floats(entropy),
        floats(reference),
        floats(log_sum)};
    FASTPPO_LAUNCH((logprobs_kernel<T>), split.blocks(), kRowThreads, 0, on.stream, args);
  });
  return {logprobs, entropy, reference, log_sum};
}

Tensor logprobs_backward_cuda(
    const OptionalTensor& grad_logprobs, const OptionalTensor& grad_entropy, const Tensor& logits, const Tensor& ids,
    const Tensor& entropy, const Tensor& reference, const Tensor& log_sum, double temperature) {
  const Tensor dlogits = torch::stable::new_empty(logits, logits.sizes());
  if (logits.numel() == 0) {
    return dlogits;
  }
  const OnDevice on(logits);
  const HeldPerRow<float> row_grad_logprobs(grad_logprobs), row_grad_entropy(grad_entropy);
  const HeldPerRow<int64_t> id_rows(ids);
  const HeldPerRow<float> row_entropy(entropy), row_reference(reference), row_log_sum(log_sum);
  const RowSplit split(ids.numel(), logits.size(logits.dim() - 1));
  with_element(logits.scalar_type(), [&](auto type) {
    using T = typename decltype(type)::type;
    const HeldLogits<T> rows(logits);
    const LogprobsBackwardArgs<T> args{row_grad_logprobs,
                                       row_grad_entropy,
                                       rows,
                                       id_rows,
                                       row_entropy,
                                       row_reference,
                                       row_log_sum,
                                       1 / temperature,
                                       split,
                                       elements<T>(dlogits)};
    FASTPPO_LAUNCH((logprobs_backward_kernel<T>), split.blocks(), kRowThreads, 0, on.stream, args);
  });
  return dlogits;
}

} // namespace

FASTPPO_CUDA_IMPL(m) {
  m.impl("logprobs", TORCH_BOX(&logprobs_cuda));
  m.impl("logprobs_backward", TORCH_BOX(&logprobs_backward_cuda));
}

} // namespace fastppo::cuda
