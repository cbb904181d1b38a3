/*
Generalized advantage estimation over responses, and the whitening that goes with it.
  delta[t] = rewards[t] + gamma * values[next(t)] - values[t]
  advantages[t] = delta[t] + gamma * lam * advantages[next(t)]
  returns[t] = advantages[t] + values[t]
rewards, values: (B, T); response_mask: (B, T), True = counts. next(t) is the next token that counts: observation tokens
between two of the policy's own neither decay the sum nor lend it their value. After the last token that counts the
value is bootstrap_values (B,), 0 where not given, and the advantage 0. Masked places are 0.

  whiten(x) = (x - mean) / sqrt(variance + 1e-8)        scale_to_unit_std(x) = the same + mean
Mean and variance (population: divided by the count) are over the places that count, in float64.
*/
#pragma once

#include <cstdint>

#include "numeric.h"

namespace fastppo {

constexpr double kWhitenEps = 1e-8;

// What passes from a token to the one before it that counts.
struct GaeCarry {
  float advantage;
  float next_value;
};

// Takes one token that counts, moves the carry, returns its advantage.
FASTPPO_HD float gae_step(GaeCarry& carry, float reward, float value, float gamma, float gamma_lam) {
  const float delta = reward + gamma * carry.next_value - value;
  carry.advantage = delta + gamma_lam * carry.advantage;
  carry.next_value = value;
  return carry.advantage;
}

// Count, mean and sum of squared distances from it, so that parts merge without the cancellation of E[x^2] - E[x]^2.
struct Moments {
  double count = 0;
  double mean = 0;
  double m2 = 0;
};

FASTPPO_HD Moments merge(const Moments& a, const Moments& b) {
  const double count = a.count + b.count;
  if (count == 0) {
    return {};
  }
  const double distance = b.mean - a.mean;
  return {count, a.mean + distance * b.count / count, a.m2 + b.m2 + distance * distance * a.count * b.count / count};
}

// Standardizing is (x - shift) * scale + offset.
struct Standardize {
  float shift;
  float scale;
  float offset;
};

FASTPPO_HD Standardize standardize_by(const Moments& moments, bool keep_mean) {
  const double variance = moments.count > 0 ? moments.m2 / moments.count : 0.0;
  const auto mean = static_cast<float>(moments.mean);
  return {mean, static_cast<float>(1.0 / std::sqrt(variance + kWhitenEps)), keep_mean ? mean : 0.0f};
}

} // namespace fastppo

#if defined(TORCH_TARGET_VERSION)
#include "check.h"
#include "kl.h"

namespace fastppo {

inline void check_gamma_lam(const char* op, double gamma, double lam) {
  check_number(op, "gamma", gamma, gamma >= 0 && gamma <= 1, "between 0 and 1");
  check_number(op, "lam", lam, lam >= 0 && lam <= 1, "between 0 and 1");
}

// One floating number per row of a (B, T) tensor.
inline void check_per_row(const char* op, const char* name, const Tensor& x, const Tensor& other, const char* like) {
  check_floating(op, name, x);
  check(
      x.dim() == 1 && x.size(0) == other.size(0), op, name, " must have shape (", other.size(0),
      ",), one for each row of ", like, ", got ", shape_text(x.sizes()));
  check_device(op, name, x, other, like);
}

inline void check_gae(
    const Tensor& rewards, const Tensor& values, const Tensor& response_mask, double gamma, double lam,
    const OptionalTensor& bootstrap_values) {
  const char* op = "gae";
  check_floating(op, "rewards", rewards);
  check_dim(op, "rewards", rewards, 2, "(B, T)");
  check_like(op, "values", values, rewards, "rewards");
  check_mask(op, response_mask, rewards, "rewards");
  check_gamma_lam(op, gamma, lam);
  if (bootstrap_values) {
    check_per_row(op, "bootstrap_values", *bootstrap_values, rewards, "rewards");
  }
}

inline void check_standardize(const char* op, const Tensor& x, const Tensor& mask) {
  check_floating(op, "x", x);
  check_mask(op, mask, x, "x", "mask");
}

inline KlEstimator check_rewards_and_advantages(
    const Tensor& scores, const Tensor& logprobs, const Tensor& ref_logprobs, const Tensor& values,
    const Tensor& response_mask, double kl_coef, const std::string& estimator, std::optional<double> reward_clip,
    double gamma, double lam, const OptionalTensor& bootstrap_values) {
  const char* op = "rewards_and_advantages";
  check_floating(op, "logprobs", logprobs);
  check_dim(op, "logprobs", logprobs, 2, "(B, T)");
  check_per_row(op, "scores", scores, logprobs, "logprobs");
  check_like(op, "ref_logprobs", ref_logprobs, logprobs, "logprobs");
  check_like(op, "values", values, logprobs, "logprobs");
  check_mask(op, response_mask, logprobs, "logprobs");
  check_number(op, "kl_coef", kl_coef, std::isfinite(kl_coef), "finite");
  if (reward_clip) {
    check_number(op, "reward_clip", *reward_clip, *reward_clip > 0, "above 0");
  }
  check_gamma_lam(op, gamma, lam);
  if (bootstrap_values) {
    check_per_row(op, "bootstrap_values", *bootstrap_values, logprobs, "logprobs");
  }
  return parse_estimator(op, estimator);
}

} // namespace fastppo
#endif
