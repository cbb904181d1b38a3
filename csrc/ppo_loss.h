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

#include "kl.h"
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

template <class F>
FASTPPO_HD ClippedTerm<F> policy_term(const F& ratio, const F& advantage, const F& low, const F& high) {
  const F zero(0.0f), one(1.0f);
  const F unclipped = zero - advantage * ratio;
  const F clipped = zero - advantage * vclamp(ratio, low, high);
  const auto is_clipped = clipped > unclipped;
  return {select(is_clipped, clipped, unclipped), select(is_clipped, zero, unclipped), select(is_clipped, one, zero)};
}

// The policy's term with the bound of dual_clip; infinity: none.
template <class F>
FASTPPO_HD ClippedTerm<F> capped(const ClippedTerm<F>& term, const F& advantage, float dual_clip) {
  const F zero(0.0f);
  const F cap = select(advantage < zero, zero - F(dual_clip) * advantage, F(std::numeric_limits<float>::infinity()));
  const auto is_capped = term.loss > cap;
  return {select(is_capped, cap, term.loss), select(is_capped, zero, term.slope), term.clipped};
}

template <class F>
FASTPPO_HD ClippedTerm<F> value_term(const F& new_value, const F& value, const F& target, float clip_range) {
  const F zero(0.0f), one(1.0f), half(0.5f), range(clip_range);
  const F error = new_value - target;
  const F clipped_error = vclamp(new_value, value - range, value + range) - target;
  const auto is_clipped = clipped_error * clipped_error > error * error;
  const F larger = select(is_clipped, clipped_error, error);
  return {half * larger * larger, select(is_clipped, zero, error), select(is_clipped, one, zero)};
}

// The numbers of a call, as the schema has them. dual_clip: infinity for none.
struct PpoSettings {
  double clip_range, clip_range_high, dual_clip, value_clip_range, vf_coef, entropy_coef, kl_coef;
  KlEstimator kl_estimator;
};

// The same in the form in which tokens need them. The scales hold the normalizer: a slope times its scale is a
// gradient.
struct PpoCoefficients {
  float ratio_low, ratio_high, dual_clip, value_clip_range;
  float policy_scale, value_scale, entropy_scale, kl_scale;

  FASTPPO_HD PpoCoefficients(const PpoSettings& s, double normalizer)
      : ratio_low(static_cast<float>(1 - s.clip_range)),
        ratio_high(static_cast<float>(1 + s.clip_range_high)),
        dual_clip(static_cast<float>(s.dual_clip)),
        value_clip_range(static_cast<float>(s.value_clip_range)),
        policy_scale(static_cast<float>(1 / normalizer)),
        value_scale(static_cast<float>(s.vf_coef / normalizer)),
        entropy_scale(static_cast<float>(-s.entropy_coef / normalizer)),
        kl_scale(static_cast<float>(s.kl_coef / normalizer)) {}
};

// d loss / d new_logprobs of one token that counts.
FASTPPO_HD float ppo_slope(
    float new_logprob, float logprob, float advantage, bool has_ref, float ref_logprob, KlEstimator estimator,
    const PpoCoefficients& c) {
  const float ratio = vexp(new_logprob - logprob);
  const ClippedTerm<float> term = policy_term(ratio, advantage, c.ratio_low, c.ratio_high);
  float slope = capped(term, advantage, c.dual_clip).slope * c.policy_scale;
  if (has_ref) {
    with_estimator(
        estimator, [&](auto e) { slope += c.kl_scale * kl_slope<decltype(e)::value>(new_logprob - ref_logprob); });
  }
  return slope;
}

// What a call returns beside the gradients.
struct PpoResult {
  float loss;
  float stats[kPpoStats];
};

// Sums over tokens that count; at kRatioMax their maximum.
struct PpoSums {
  double of[kPpoStats] = {};

  FASTPPO_HD void merge(const PpoSums& other) {
#pragma unroll
    for (int stat = 0; stat < kRatioMax; ++stat) {
      of[stat] += other.of[stat];
    }
    double& largest = of[kRatioMax]; // NaN from either side stays
    largest = largest >= other.of[kRatioMax] || largest != largest ? largest : other.of[kRatioMax];
  }

  FASTPPO_HD PpoResult result(const PpoSettings& s, double normalizer) const {
    PpoResult out;
    double mean[kPpoStats];
#pragma unroll
    for (int stat = 0; stat < kPpoStats; ++stat) {
      mean[stat] = stat == kRatioMax ? of[stat] : of[stat] / normalizer;
      out.stats[stat] = static_cast<float>(mean[stat]);
    }
    out.loss = static_cast<float>(
        mean[kPolicyLoss] + s.vf_coef * mean[kValueLoss] - s.entropy_coef * mean[kEntropy] + s.kl_coef * mean[kKl]);
    return out;
  }
};

} // namespace fastppo

#if defined(TORCH_TARGET_VERSION)
#include "check.h"

#include <string>
#include <tuple>
#include <vector>

namespace fastppo {

// What every op with this loss takes, each tensor like the one that `like` names. Returns the call's numbers.
inline PpoSettings check_ppo_terms(
    const char* op, const Tensor& tokens, const char* like, const Tensor& logprobs, const Tensor& advantages,
    const Tensor& response_mask, const OptionalTensor& new_values, const OptionalTensor& values,
    const OptionalTensor& returns, const OptionalTensor& ref_logprobs, const OptionalTensor& normalizer,
    std::optional<double> normalizer_number, double clip_range, double clip_range_high, std::optional<double> dual_clip,
    double value_clip_range, double vf_coef, double entropy_coef, double kl_coef, const std::string& kl_estimator) {
  check_like(op, "logprobs", logprobs, tokens, like);
  check_like(op, "advantages", advantages, tokens, like);
  check_mask(op, response_mask, tokens, like);
  if (new_values) {
    check(values && returns, op, "new_values needs values and returns, got ", values ? "no returns" : "no values");
    check_like(op, "new_values", *new_values, tokens, like);
    check_like(op, "values", *values, tokens, like);
    check_like(op, "returns", *returns, tokens, like);
  }
  if (ref_logprobs) {
    check_like(op, "ref_logprobs", *ref_logprobs, tokens, like);
  }
  check(kl_coef == 0 || ref_logprobs, op, "kl_coef = ", kl_coef, " needs ref_logprobs, got None");
  check_number(op, "clip_range", clip_range, clip_range >= 0, "at least 0");
  check_number(op, "clip_range_high", clip_range_high, clip_range_high >= 0, "at least 0");
  check_number(op, "value_clip_range", value_clip_range, value_clip_range >= 0, "at least 0");
  if (dual_clip) {
    check_number(op, "dual_clip", *dual_clip, *dual_clip > 1, "above 1");
  }
  if (normalizer) {
    check_dim(op, "normalizer", *normalizer, 0, "()");
    check_device(op, "normalizer", *normalizer, tokens, like);
  }
  if (normalizer_number) {
    const double number = *normalizer_number;
    check_number(op, "normalizer", number, number > 0 && std::isfinite(number), "above 0 and finite");
  }
  return {
      clip_range,
      clip_range_high,
      dual_clip.value_or(std::numeric_limits<double>::infinity()),
      value_clip_range,
      vf_coef,
      entropy_coef,
      kl_coef,
      parse_estimator(op, kl_estimator, "kl_estimator")};
}

// Where the gradients of the loss go: contiguous float32, one number per token; null where nobody asks for them.
struct PpoGrads {
  float *new_logprobs = nullptr, *new_values = nullptr, *entropy = nullptr;

  // How many rows of that many tokens an op returns: of new_logprobs, and of what else is given, in that order.
  static int64_t rows(bool has_values, bool has_entropy) { return 1 + has_values + has_entropy; }

  PpoGrads() = default;
  PpoGrads(const Tensor& grads, int64_t tokens, bool has_values, bool has_entropy)
      : new_logprobs(static_cast<float*>(grads.mutable_data_ptr())),
        new_values(has_values ? new_logprobs + tokens : nullptr),
        entropy(has_entropy ? new_logprobs + (has_values ? 2 : 1) * tokens : nullptr) {}
};

// (rows, *shape of like). One tensor: a backward scales it at once, and autograd has one to keep track of.
inline std::vector<int64_t> ppo_grads_sizes(const Tensor& like, bool has_values, bool has_entropy) {
  std::vector<int64_t> sizes{PpoGrads::rows(has_values, has_entropy)};
  for (const int64_t size : like.sizes()) {
    sizes.push_back(size);
  }
  return sizes;
}

// A backend's ppo_loss after the checks, which ppo_loss_from_logits calls for all that is one number per token. Returns
// loss () and stats (9,).
using PpoLossFunction = std::tuple<Tensor, Tensor>(
    const Tensor& new_logprobs, const Tensor& logprobs, const Tensor& advantages, const Tensor& response_mask,
    const OptionalTensor& new_values, const OptionalTensor& values, const OptionalTensor& returns,
    const OptionalTensor& entropy, const OptionalTensor& ref_logprobs, const OptionalTensor& normalizer,
    std::optional<double> normalizer_number, const PpoSettings& settings, const PpoGrads& grads);

inline PpoSettings check_ppo_loss(
    const Tensor& new_logprobs, const Tensor& logprobs, const Tensor& advantages, const Tensor& response_mask,
    const OptionalTensor& new_values, const OptionalTensor& values, const OptionalTensor& returns,
    const OptionalTensor& entropy, const OptionalTensor& ref_logprobs, const OptionalTensor& normalizer,
    std::optional<double> normalizer_number, double clip_range, double clip_range_high, std::optional<double> dual_clip,
    double value_clip_range, double vf_coef, double entropy_coef, double kl_coef, const std::string& kl_estimator) {
  const char *op = "ppo_loss", *like = "new_logprobs";
  check_floating(op, like, new_logprobs);
  if (entropy) {
    check_like(op, "entropy", *entropy, new_logprobs, like);
  }
  check(entropy_coef == 0 || entropy, op, "entropy_coef = ", entropy_coef, " needs entropy, got None");
  return check_ppo_terms(
      op, new_logprobs, like, logprobs, advantages, response_mask, new_values, values, returns, ref_logprobs,
      normalizer, normalizer_number, clip_range, clip_range_high, dual_clip, value_clip_range, vf_coef, entropy_coef,
      kl_coef, kl_estimator);
}

} // namespace fastppo
#endif
