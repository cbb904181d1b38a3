/*
logprobs of a language-model head, without its logits in memory:
  logits = cap(logit_scale * (hidden @ weight^T + bias)),  cap(a) = softcap * tanh(a / softcap), or a without softcap
  logprob, entropy: of softmax(logits / temperature), as in logprobs.h
hidden: (N, H); weight: (V, H) and bias: (V,) of the same dtype; ids: (N,) int64. Results: (N,), float32, nats.

The vocabulary is walked in tiles: a matrix product gives the tile's logits for all rows, which are folded into the
running sums of their row and forgotten. The products are in the dtype of hidden, with float32 sums inside, and the
tile's product is rounded to that dtype, which for bf16 is what a bf16 lm_head returns; all that follows is float32.

Backward walks the same tiles again, with a = the logits before the cap:
  dlogits as in logprobs.h;  da = logit_scale * (1 - (logits / softcap)^2) * dlogits
  dhidden = da @ weight;  dweight = da^T @ hidden;  dbias = sum over rows of da
Rows whose two incoming gradients are 0 (clipped or masked tokens) are left out of every product (on CUDA, where only
the device knows how many they are, they are zeros in it) and get exact zeros. dhidden and dbias are summed over tiles,
and dweight over blocks of rows, in float32.
*/
#pragma once

#include <cstdint>

namespace fastppo {

// The numbers between the matrix product and the logits.
struct Head {
  float logit_scale;
  float softcap; // 0: none
};

} // namespace fastppo

#if defined(TORCH_TARGET_VERSION)
#include "logprobs.h"

namespace fastppo {

inline void check_linear_logprobs(
    const Tensor& hidden, const Tensor& weight, const Tensor& ids, const OptionalTensor& bias, double temperature,
    std::optional<double> softcap, double logit_scale) {
  const char* op = "linear_logprobs";
  check_floating(op, "hidden", hidden);
  check_dim(op, "hidden", hidden, 2, "(N, H)");
  check_dim(op, "weight", weight, 2, "(V, H)");
  check(
      weight.size(1) == hidden.size(1), op, "weight must have shape (V, ", hidden.size(1), ") like hidden ",
      shape_text(hidden.sizes()), ", got ", shape_text(weight.sizes()));
  check(weight.size(0) > 0, op, "weight must have at least one row, got ", shape_text(weight.sizes()));
  check(
      weight.scalar_type() == hidden.scalar_type(), op, "weight must be ", dtype_text(hidden.scalar_type()),
      " like hidden, got ", dtype_text(weight.scalar_type()));
  check_device(op, "weight", weight, hidden, "hidden");
  check_dtype(op, "ids", ids, ScalarType::Long);
  check_shape(op, "ids", ids, Sizes(hidden.sizes().data(), 1), "the rows of hidden");
  check_device(op, "ids", ids, hidden, "hidden");
  if (bias) {
    check_shape(op, "bias", *bias, Sizes(weight.sizes().data(), 1), "the rows of weight");
    check(
        bias->scalar_type() == hidden.scalar_type(), op, "bias must be ", dtype_text(hidden.scalar_type()),
        " like hidden, got ", dtype_text(bias->scalar_type()));
    check_device(op, "bias", *bias, hidden, "hidden");
  }
  check_temperature(op, temperature);
  if (softcap) {
    check_number(op, "softcap", *softcap, *softcap > 0 && std::isfinite(*softcap), "positive and finite, or None");
  }
  check_number(op, "logit_scale", logit_scale, std::isfinite(logit_scale), "finite");
}

} // namespace fastppo
#endif
