/*
The clipped PPO loss of one token, its parts' slopes, and which metrics it feeds. A loss is the sum over tokens that
count, divided by a normalizer.
  ratio = exp(new_logprobs - logprobs)
  policy loss: max(-A ratio, -A clip(ratio, 1 - clip_range, 1 + clip_range_high)), and for A < 0 at most -dual_clip A
  value loss: max((v - R)^2, (clip(v, old - value_clip_range, old + value_clip_range) - R)^2) / 2
  loss = policy loss + vf_coef value loss - entropy_coef entropy + kl_coef kl
Inside the clip range both branches of a max hold the same number, bit for bit, and the slope is the unclipped one;
outside, the clipped branch is a constant and its slope is 0.
*/
#pragma once

#include <cstdint>
#include <limits>

#include "numeric.h"

namespace fastppo {

// Rows of the stats tensor, in the order of PPOStats.
enum PpoStat {
  kPolicyLoss,
  kValueLoss,
  kEntropy,
  kKl,
  kApproxKl,
  kClipped,
  kValueClipped,
  kRatio,
  kRatioMax,
  kPpoStats
};

template <class F>
struct ClippedTerm {
  F loss;
  F slope;   // d loss / d new_logprobs, or d loss / d new_values
  F clipped; // 1 where the clipped branch was the larger one
};

// dual_clip: infinity for none.
template <class F>
FASTPPO_HD ClippedTerm<F> policy_term(
    const F& ratio, const F& advantage, const F& low, const F& high, float dual_clip) {
  const F zero(0.0f), one(1.0f);
  const F unclipped = zero - advantage * ratio;
  const F clipped = zero - advantage * vmin(vmax(ratio, low), high);
  const auto is_clipped = clipped > unclipped;
  const F loss = select(is_clipped, clipped, unclipped);
  const F cap = select(advantage < zero, zero - F(dual_clip) * advantage, F(std::numeric_limits<float>::infinity()));
  const auto is_capped = loss > cap;
  return {
      select(is_capped, cap, loss), select(is_capped, zero, select(is_clipped, zero, unclipped)),
      select(is_clipped, one, zero)};
}

template <class F>
FASTPPO_HD ClippedTerm<F> value_term(const F& new_value, const F& value, const F& target, float clip_range) {
  const F zero(0.0f), one(1.0f), half(0.5f), range(clip_range);
  const F error = new_value - target;
  const F clipped_error = vmin(vmax(new_value, value - range), value + range) - target;
  const auto is_clipped = clipped_error * clipped_error > error * error;
  const F larger = select(is_clipped, clipped_error, error);
  return {half * larger * larger, select(is_clipped, zero, error), select(is_clipped, one, zero)};
}

} // namespace fastppo

#if defined(TORCH_TARGET_VERSION)
#include "check.h"
#include "kl.h"

namespace fastppo {

// The numbers of a call, as the schema has them.
struct PpoSettings {
  double clip_range, clip_range_high, value_clip_range, vf_coef, entropy_coef, kl_coef;
  std::optional<double> dual_clip;
};

inline KlEstimator check_ppo_loss(
    const Tensor& new_logprobs, const Tensor& logprobs, const Tensor& advantages, const Tensor& response_mask,
    const OptionalTensor& new_values, const OptionalTensor& values, const OptionalTensor& returns,
    const OptionalTensor& entropy, const OptionalTensor& ref_logprobs, const OptionalTensor& normalizer,
    const PpoSettings& s, const std::string& kl_estimator) {
  const char* op = "ppo_loss";
  const char* like = "new_logprobs";
  check_floating(op, "new_logprobs", new_logprobs);
  check_like(op, "logprobs", logprobs, new_logprobs, like);
  check_like(op, "advantages", advantages, new_logprobs, like);
  check_mask(op, response_mask, new_logprobs, like);
  if (new_values) {
    check(values && returns, op, "new_values needs values and returns, got ", values ? "no returns" : "no values");
    check_like(op, "new_values", *new_values, new_logprobs, like);
    check_like(op, "values", *values, new_logprobs, like);
    check_like(op, "returns", *returns, new_logprobs, like);
  }
  if (entropy) {
    check_like(op, "entropy", *entropy, new_logprobs, like);
  }
  if (ref_logprobs) {
    check_like(op, "ref_logprobs", *ref_logprobs, new_logprobs, like);
  }
  check(s.entropy_coef == 0 || entropy, op, "entropy_coef = ", s.entropy_coef, " needs entropy, got None");
  check(s.kl_coef == 0 || ref_logprobs, op, "kl_coef = ", s.kl_coef, " needs ref_logprobs, got None");
  check_number(op, "clip_range", s.clip_range, s.clip_range >= 0, "at least 0");
  check_number(op, "clip_range_high", s.clip_range_high, s.clip_range_high >= 0, "at least 0");
  check_number(op, "value_clip_range", s.value_clip_range, s.value_clip_range >= 0, "at least 0");
  if (s.dual_clip) {
    check_number(op, "dual_clip", *s.dual_clip, *s.dual_clip > 1, "above 1");
  }
  if (normalizer) {
    check_dim(op, "normalizer", *normalizer, 0, "()");
    check_device(op, "normalizer", *normalizer, new_logprobs, like);
  }
  return parse_estimator(op, kl_estimator, "kl_estimator");
}

} // namespace fastppo
#endif
