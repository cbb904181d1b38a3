/*
One AdamW step on weights that are kept in bfloat16 and nevertheless trained in float32.
  master = the float32 whose bits are (param bits << 16) + residual
param is the master rounded to the nearest bfloat16 (half up in the bits) and residual, an int16, is what the rounding
took: together they are the master, bit for bit, in 4 bytes, and the model computes with param as it lies.
  g = grad * grad_scale
  exp_avg    <- exp_avg + (1 - beta1) (g - exp_avg)
  exp_avg_sq <- beta2 exp_avg_sq + (1 - beta2) g^2
  master     <- master (1 - lr weight_decay)
                - lr / (1 - beta1^step) * exp_avg / (sqrt(exp_avg_sq) / sqrt(1 - beta2^step) + eps)
In float32 throughout, each operation rounded on its own (units of adamw are compiled without fused multiply-adds), so
that every instruction set and every device gives the same bits. A moment kept in bfloat16 is rounded up or down by
chance where it is stored, with the probability that makes its mean exact: exp_avg_sq changes by a thousandth of itself
per step, less than bfloat16 can show, and would stand still if it were rounded to nearest. The chance is a hash of
(step, element), so a repeat gives the same bits on any number of threads.
*/
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "numeric.h"

namespace fastppo {

FASTPPO_HD float join_master(uint16_t param, int16_t residual) {
  const uint32_t bits = (static_cast<uint32_t>(param) << 16) + static_cast<uint32_t>(static_cast<int32_t>(residual));
  float master;
  memcpy(&master, &bits, sizeof(master));
  return master;
}

FASTPPO_HD void split_master(float master, uint16_t& param, int16_t& residual) {
  uint32_t bits;
  memcpy(&bits, &master, sizeof(bits));
  // A NaN with all its low bits set would carry into the sign and come out as a zero: keep its top half as it is.
  const uint32_t high = master != master ? bits >> 16 : (bits + 0x8000u) >> 16;
  param = static_cast<uint16_t>(high);
  residual = static_cast<int16_t>(master != master ? 0 : bits - (high << 16));
}

// 32 well-mixed bits of (step, element): the upper half rounds exp_avg_sq, the lower exp_avg.
FASTPPO_HD uint32_t rounding_bits(uint32_t step, uint32_t element) {
  uint32_t x = element + step * 0x9e3779b9u;
  x ^= x >> 16;
  x *= 0x7feb352du;
  x ^= x >> 15;
  x *= 0x846ca68bu;
  return x ^ (x >> 16);
}

// bfloat16 bits of x, up with the probability that the 16 bits dropped stand for; noise is uniform in [0, 2^16).
FASTPPO_HD uint16_t round_by_chance(float x, uint32_t noise) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const bool finite = (bits & 0x7f800000u) != 0x7f800000u;
  return static_cast<uint16_t>((bits + (finite ? noise : 0u)) >> 16);
}

struct AdamwSettings {
  float grad_scale, decay, one_minus_beta1, beta2, one_minus_beta2, step_size, inverse_sqrt_bias2, eps;
  uint32_t step;
};

// For a grad_scale of 1.
inline AdamwSettings adamw_settings(
    double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step) {
  const auto t = static_cast<double>(step);
  return {
      1,
      static_cast<float>(1 - lr * weight_decay),
      static_cast<float>(1 - beta1),
      static_cast<float>(beta2),
      static_cast<float>(1 - beta2),
      static_cast<float>(lr / (1 - std::pow(beta1, t))),
      static_cast<float>(1 / std::sqrt(1 - std::pow(beta2, t))),
      static_cast<float>(eps),
      static_cast<uint32_t>(step)};
}

FASTPPO_HD float adamw_update(float master, float grad, float& exp_avg, float& exp_avg_sq, const AdamwSettings& s) {
  const float g = grad * s.grad_scale;
  exp_avg += s.one_minus_beta1 * (g - exp_avg);
  exp_avg_sq = s.beta2 * exp_avg_sq + s.one_minus_beta2 * g * g;
  return master * s.decay - s.step_size * exp_avg / (vsqrt(exp_avg_sq) * s.inverse_sqrt_bias2 + s.eps);
}

} // namespace fastppo

#if defined(TORCH_TARGET_VERSION)
#include "check.h"

namespace fastppo {

inline void check_adamw_step_(
    const Tensor& param, const Tensor& residual, const Tensor& grad, const Tensor& exp_avg, const Tensor& exp_avg_sq,
    double lr, double beta1, double beta2, double eps, double weight_decay, int64_t step,
    const OptionalTensor& grad_scale) {
  const char* op = "adamw_step_";
  check_dtype(op, "param", param, ScalarType::BFloat16);
  check_dtype(op, "residual", residual, ScalarType::Short);
  check_floating(op, "grad", grad);
  const auto check_moment = [&](const char* name, const Tensor& x) {
    const auto dtype = x.scalar_type();
    check(
        dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, op, name, " must be bfloat16 or float32, got ",
        dtype_text(dtype));
  };
  check_moment("exp_avg", exp_avg);
  check_moment("exp_avg_sq", exp_avg_sq);
  const auto check_placed = [&](const char* name, const Tensor& x) {
    check_shape(op, name, x, param.sizes(), "param");
    check_device(op, name, x, param, "param");
  };
  check_placed("residual", residual);
  check_placed("grad", grad);
  check_placed("exp_avg", exp_avg);
  check_placed("exp_avg_sq", exp_avg_sq);
  const auto check_contiguous = [&](const char* name, const Tensor& x) {
    check(x.is_contiguous(), op, name, " must be contiguous: it is written in place");
  };
  check_contiguous("param", param);
  check_contiguous("residual", residual);
  check_contiguous("exp_avg", exp_avg);
  check_contiguous("exp_avg_sq", exp_avg_sq);
  check_number(op, "lr", lr, lr >= 0, "at least 0");
  check_number(op, "beta1", beta1, beta1 >= 0 && beta1 < 1, "at least 0 and below 1");
  check_number(op, "beta2", beta2, beta2 >= 0 && beta2 < 1, "at least 0 and below 1");
  check_number(op, "eps", eps, eps >= 0, "at least 0");
  check_number(op, "weight_decay", weight_decay, weight_decay >= 0, "at least 0");
  check(step >= 1, op, "step must be at least 1 (the first step is 1), got ", step);
  if (grad_scale) {
    check_dim(op, "grad_scale", *grad_scale, 0, "()");
    check_device(op, "grad_scale", *grad_scale, param, "param");
  }
}

} // namespace fastppo
#endif
