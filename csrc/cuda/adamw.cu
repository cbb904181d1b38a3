// adamw_step_ on CUDA: checks, one launch, registration.
#include "cuda/adamw.cuh"

#include "cuda/tensor.h"

#include <algorithm>

namespace fastppo::cuda {
namespace {

template <class T>
Span<T> whole(const Tensor& x) {
  return {static_cast<T*>(x.mutable_data_ptr()), x.numel()};
}

Moment moment_of(const Tensor& x) {
  return x.scalar_type() == ScalarType::BFloat16 ? Moment{whole<uint16_t>(x), {}} : Moment{{}, whole<float>(x)};
}

void adamw_step_cuda_(
    const Tensor& param, const Tensor& residual, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
    double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step, double grad_scale,
    const OptionalTensor& grad_scale_tensor) {
  check_adamw_step_(
      param, residual, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step, grad_scale_tensor);
  const int64_t count = param.numel();
  if (count == 0) {
    return;
  }
  const OnDevice on(param);
  const Tensor dense_grad = torch::stable::contiguous(grad);
  const auto scale = grad_scale_tensor ? std::make_optional<HeldNumber>(*grad_scale_tensor) : std::nullopt;
  const AdamwArgs args{
      whole<uint16_t>(param),
      whole<int16_t>(residual),
      Rows{dense_grad.const_data_ptr(), 1, count, count, dtype_of(dense_grad)},
      moment_of(exp_avg),
      moment_of(exp_avg_sq),
      adamw_settings(lr, beta1, beta2, eps, weight_decay, step),
      grad_scale,
      scale ? static_cast<Number>(*scale) : number(1)};
  const int64_t groups = (count + kAdamwGroup - 1) / kAdamwGroup;
  const auto blocks =
      static_cast<unsigned>(std::min<int64_t>((groups + kAdamwThreads - 1) / kAdamwThreads, kAdamwBlocks));
  FASTPPO_LAUNCH(adamw_kernel, blocks, kAdamwThreads, 0, on.stream, args);
}

} // namespace

FASTPPO_CUDA_IMPL(m) { m.impl("adamw_step_", TORCH_BOX(&adamw_step_cuda_)); }

} // namespace fastppo::cuda
