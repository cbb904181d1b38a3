/*
The PPO loss and its gradient from logits in one pass over them: log-prob and entropy of a row, the loss of its token,
and dlogits, while the row is on chip.
  new_logprobs, entropy = logprobs(logits, ids, temperature)      softmax.h
  loss, stats = ppo_loss(new_logprobs, ..., entropy)              ppo_loss.h
  dlogits = d loss / d logits                                     SoftmaxGrad, with
    grad_logprob = ppo_slope(...)    grad_entropy = -entropy_coef / normalizer
logits: (..., V), any row strides, last dimension contiguous. ids and everything else that is per token: (...).

A loss is a sum over tokens whose terms know nothing of each other, but for the normalizer, which is known before: so a
token's slope is known as soon as its row has been read. Read and written once, a row of bfloat16 moves 4 V bytes; the
forward and the backward of logprobs read it twice, 6 V bytes, and leave the logits alive in between.

A row that does not count is written as zeros and not read; so is its id. A row whose slopes are both 0 (clipped, and no
entropy bonus) is written as zeros.
*/
#pragma once

#include "csrc/logprobs.h"
#include "csrc/ppo_loss.h"

namespace fastppo {

inline PpoSettings check_ppo_loss_from_logits(
    const Tensor& logits, const Tensor& ids, const Tensor& logprobs, const Tensor& advantages,
    const Tensor& response_mask, const OptionalTensor& new_values, const OptionalTensor& values,
    const OptionalTensor& returns, const OptionalTensor& ref_logprobs, const OptionalTensor& normalizer,
    double temperature, double clip_range, double clip_range_high, std::optional<double> dual_clip,
    double value_clip_range, double vf_coef, double entropy_coef, double kl_coef, const std::string& kl_estimator,
    std::optional<double> normalizer_number) {
  const char* op = "ppo_loss_from_logits";
  check_row_ids(op, logits, ids);
  check_temperature(op, temperature);
  return check_ppo_terms(
      op, ids, "ids", logprobs, advantages, response_mask, new_values, values, returns, ref_logprobs, normalizer,
      normalizer_number, clip_range, clip_range_high, dual_clip, value_clip_range, vf_coef, entropy_coef, kl_coef,
      kl_estimator);
}

inline void check_scale_(const Tensor& x, const Tensor& factor) {
  check_floating("scale_", "x", x);
  check(x.is_contiguous(), "scale_", "x must be contiguous: it is written in place");
  check_floating("scale_", "factor", factor);
  check_dim("scale_", "factor", factor, 0, "()");
  check_device("scale_", "factor", factor, x, "x");
}

} // namespace fastppo
