// kl_penalty and its gradient on the CPU: checks, threads, registration.
#include "cpu/vec/kl.h"

#include "cpu/tensor.h"

namespace fastppo {
namespace {

Tensor kl_penalty_cpu(const Tensor& logprobs, const Tensor& ref_logprobs, const std::string& estimator) {
  const KlEstimator parsed = check_kl_penalty(logprobs, ref_logprobs, estimator);
  const HeldRows logprob_rows(logprobs), ref_rows(ref_logprobs);
  const KlArgs args{logprob_rows, ref_rows, {}, parsed};
  const Tensor out = empty_float(logprobs);
  const Shape2d shape = shape_2d(logprobs);
  auto* of_block = FASTPPO_PICK(kl_block);
  for_each_block(shape, [&](int64_t row, int64_t first, int64_t n, int64_t) {
    of_block(args, row, first, n, float_data(out) + row * shape.columns + first);
  });
  return out;
}

// The gradient of logprobs; that of ref_logprobs is its negative.
Tensor kl_penalty_backward_cpu(
    const Tensor& grad, const Tensor& logprobs, const Tensor& ref_logprobs, const std::string& estimator) {
  const KlEstimator parsed = check_kl_penalty(logprobs, ref_logprobs, estimator);
  check_like("kl_penalty_backward", "grad", grad, logprobs, "logprobs");
  const HeldRows logprob_rows(logprobs), ref_rows(ref_logprobs), grad_rows(grad);
  const KlArgs args{logprob_rows, ref_rows, grad_rows, parsed};
  const Tensor out = empty_float(logprobs);
  const Shape2d shape = shape_2d(logprobs);
  auto* of_block = FASTPPO_PICK(kl_backward_block);
  for_each_block(shape, [&](int64_t row, int64_t first, int64_t n, int64_t) {
    of_block(args, row, first, n, float_data(out) + row * shape.columns + first);
  });
  return out;
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) {
  m.impl("kl_penalty", TORCH_BOX(&kl_penalty_cpu));
  m.impl("kl_penalty_backward", TORCH_BOX(&kl_penalty_backward_cpu));
}

} // namespace fastppo
