/*
Per-token estimates of KL(policy || reference) from the log-probs of the sampled token.
  d = logprobs - ref_logprobs
  k1: d    abs: |d|    k2: d^2 / 2    k3: exp(-d) - 1 + d
and their slopes d kl / d logprobs (the slope for ref_logprobs is the negative)
  k1: 1    abs: sign(d)    k2: d    k3: 1 - exp(-d)
k3 is written with expm1, which keeps the leading digits that exp(-d) - 1 loses where policy and reference are close.
*/
#pragma once

#include <type_traits>

#include "numeric.h"

namespace fastppo {

enum class KlEstimator { k1, kAbs, k2, k3 };

template <KlEstimator E, class F>
FASTPPO_HD F kl_estimate(const F& d) {
  if constexpr (E == KlEstimator::k1) {
    return d;
  } else if constexpr (E == KlEstimator::kAbs) {
    return vabs(d);
  } else if constexpr (E == KlEstimator::k2) {
    return F(0.5f) * d * d;
  } else {
    return vexpm1(F(0.0f) - d) + d;
  }
}

template <KlEstimator E, class F>
FASTPPO_HD F kl_slope(const F& d) {
  const F zero(0.0f), one(1.0f);
  if constexpr (E == KlEstimator::k1) {
    return one;
  } else if constexpr (E == KlEstimator::kAbs) {
    return select(d > zero, one, select(d < zero, zero - one, zero));
  } else if constexpr (E == KlEstimator::k2) {
    return d;
  } else {
    return zero - vexpm1(zero - d);
  }
}

// Calls f(std::integral_constant<KlEstimator, ...>): hoists the choice out of the loop.
template <class Function>
FASTPPO_HD void with_estimator(KlEstimator estimator, const Function& f) {
  switch (estimator) {
    case KlEstimator::k1:
      return f(std::integral_constant<KlEstimator, KlEstimator::k1>{});
    case KlEstimator::kAbs:
      return f(std::integral_constant<KlEstimator, KlEstimator::kAbs>{});
    case KlEstimator::k2:
      return f(std::integral_constant<KlEstimator, KlEstimator::k2>{});
    case KlEstimator::k3:
      return f(std::integral_constant<KlEstimator, KlEstimator::k3>{});
  }
}

} // namespace fastppo

#if defined(TORCH_TARGET_VERSION)
#include "check.h"

namespace fastppo {

inline KlEstimator parse_estimator(const char* op, const std::string& name, const char* argument = "estimator") {
  check(
      name == "k1" || name == "abs" || name == "k2" || name == "k3", op, argument,
      " must be one of 'k1', 'abs', 'k2', 'k3', got '", name, "'");
  return name == "k1"    ? KlEstimator::k1
         : name == "abs" ? KlEstimator::kAbs
         : name == "k2"  ? KlEstimator::k2
                         : KlEstimator::k3;
}

inline KlEstimator check_kl_penalty(const Tensor& logprobs, const Tensor& ref_logprobs, const std::string& estimator) {
  const char* op = "kl_penalty";
  check_floating(op, "logprobs", logprobs);
  check_like(op, "ref_logprobs", ref_logprobs, logprobs, "logprobs");
  return parse_estimator(op, estimator);
}

} // namespace fastppo
#endif
