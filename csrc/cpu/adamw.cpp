// adamw_step_ on the CPU: checks, threads, registration.
#include "cpu/vec/adamw.h"

#include "cpu/tensor.h"

namespace fastppo {
namespace {

void adamw_step_cpu_(
    const Tensor& param, const Tensor& residual, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
    double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step, double grad_scale,
    const OptionalTensor& grad_scale_tensor) {
  check_adamw_step_(
      param, residual, grad, exp_avg, exp_avg_sq, lr, beta1, beta2, eps, weight_decay, step, grad_scale_tensor);
  const Tensor dense_grad = torch::stable::contiguous(grad);
  const double scale = grad_scale * (grad_scale_tensor ? number_in(*grad_scale_tensor) : 1.0);
  AdamwSettings settings = adamw_settings(lr, beta1, beta2, eps, weight_decay, step);
  settings.grad_scale = static_cast<float>(scale);
  const AdamwArgs args{
      static_cast<uint16_t*>(param.mutable_data_ptr()),
      static_cast<int16_t*>(residual.mutable_data_ptr()),
      Rows{dense_grad.const_data_ptr(), 0, dtype_of(dense_grad)},
      exp_avg.mutable_data_ptr(),
      dtype_of(exp_avg),
      exp_avg_sq.mutable_data_ptr(),
      dtype_of(exp_avg_sq),
      settings};
  auto* of_block = FASTPPO_PICK(adamw_block);
  for_each_block({1, param.numel()}, [&](int64_t, int64_t first, int64_t n, int64_t) { of_block(args, first, n); });
}

} // namespace

STABLE_TORCH_LIBRARY_IMPL(fastppo, CPU, m) { m.impl("adamw_step_", TORCH_BOX(&adamw_step_cpu_)); }

} // namespace fastppo
