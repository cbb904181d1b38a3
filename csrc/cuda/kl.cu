// kl_penalty and its gradient on CUDA: checks, one launch, registration.
#include "cuda/kl.cuh"

#include "cuda/tensor.h"

#include <algorithm>

namespace fastppo::cuda {
namespace {

Tensor launch_kl(const Tensor& logprobs, const Tensor& ref_logprobs, const Tensor* grad, KlEstimator estimator) {
  const Tensor out = empty_float(logprobs);
  const Shape2d shape(logprobs);
  if (shape.count() == 0) {
    return out;
  }
  const OnDevice on(logprobs);
  const HeldRows logprob_rows(logprobs), ref_rows(ref_logprobs);
  const auto grad_rows = grad != nullptr ? std::make_optional<HeldRows>(*grad) : std::nullopt;
  const KlArgs args{
      logprob_rows, ref_rows, grad_rows ? static_cast<const Rows&>(*grad_rows) : Rows{}, estimator, floats(out)};
  constexpr int64_t kPerWarp = 32 * kKlGroup, kWarps = kKlThreads / 32;
  const int64_t tasks = shape.rows * ((shape.columns + kPerWarp - 1) / kPerWarp);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((tasks + kWarps - 1) / kWarps, 2048));
  FASTPPO_LAUNCH(kl_kernel, blocks, kKlThreads, 0, on.stream, args);
  return out;
}

Tensor kl_penalty_cuda(const Tensor& logprobs, const Tensor& ref_logprobs, const std::string& estimator) {
  const KlEstimator parsed = check_kl_penalty(logprobs, ref_logprobs, estimator);
  return launch_kl(logprobs, ref_logprobs, nullptr, parsed);
}

// The gradient of logprobs; that of ref_logprobs is its negative.
Tensor kl_penalty_backward_cuda(
    const Tensor& grad, const Tensor& logprobs, const Tensor& ref_logprobs, const std::string& estimator) {
  const KlEstimator parsed = check_kl_penalty(logprobs, ref_logprobs, estimator);
  check_like("kl_penalty_backward", "grad", grad, logprobs, "logprobs");
  return launch_kl(logprobs, ref_logprobs, &grad, parsed);
}

} // namespace

FASTPPO_CUDA_IMPL(m) {
  m.impl("kl_penalty", TORCH_BOX(&kl_penalty_cuda));
  m.impl("kl_penalty_backward", TORCH_BOX(&kl_penalty_backward_cuda));
}

} // namespace fastppo::cuda
