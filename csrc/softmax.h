/*
The sums that a softmax, its entropy and its log-probabilities are made of, for one row or a part of one:
  z[i] = (logits[i] - max) / temperature      sum = sum_i e^z[i]      weighted = sum_i z[i] e^z[i]

Each part is summed relative to its own maximum and merged here. The maximum is subtracted before the division by the
temperature and `weighted` uses z, not logits, so a shift of all logits changes nothing: at V = 131072 the entropy is
off by 2e-6 where a sum of x e^x is off by 3e-5. A logit of -inf has e^z = 0 and z e^z = 0.
*/
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "numeric.h"

namespace fastppo {

struct SoftmaxSums {
  double max = -std::numeric_limits<double>::infinity();
  double sum = 0;
  double weighted = 0;

  FASTPPO_HD void merge(SoftmaxSums other, double inv_temperature) {
    // Nothing but -inf adds nothing, and -inf - -inf must not be formed. A NaN sits in the sum and has to get through.
    if (other.max == -std::numeric_limits<double>::infinity() && other.sum == 0) {
      return;
    }
    if (other.max > max) {
      rescale((max - other.max) * inv_temperature);
      max = other.max;
    } else {
      other.rescale((other.max - max) * inv_temperature);
    }
    sum += other.sum;
    weighted += other.weighted;
  }

  FASTPPO_HD double log_sum() const { return std::log(sum); }
  FASTPPO_HD double entropy() const { return log_sum() - weighted / sum; }
  FASTPPO_HD double logprob(double logit, double inv_temperature) const {
    return (logit - max) * inv_temperature - log_sum();
  }

 private:
  // Makes the sums relative to a maximum that is higher by -shift in z.
  FASTPPO_HD void rescale(double shift) {
    if (sum == 0) {
      return; // shift may be -inf
    }
    const double factor = std::exp(shift);
    weighted = factor == 0 ? 0 : factor * (weighted + shift * sum);
    sum *= factor;
  }
};

/*
The gradient of one row's log-probability and entropy, with log p = z - log(sum):
  dlogits[i] = p[i] * (constant + slope * log p[i]) + (grad_logprob / temperature at the picked id)
*/
struct SoftmaxGrad {
  float max;
  float log_sum;
  float inv_temperature;
  float constant; // -(grad_logprob + grad_entropy * entropy) / temperature
  float slope;    // -grad_entropy / temperature

  FASTPPO_HD SoftmaxGrad(
      double grad_logprob, double grad_entropy, double entropy, float max, float log_sum, double inv_temperature)
      : max(max),
        log_sum(log_sum),
        inv_temperature(static_cast<float>(inv_temperature)),
        constant(static_cast<float>(-(grad_logprob + grad_entropy * entropy) * inv_temperature)),
        slope(static_cast<float>(-grad_entropy * inv_temperature)) {}

  // dlogits at the picked id. Without rounding in between: 1 - p of a likely token is a small difference.
  FASTPPO_HD double picked(double logit, double grad_logprob) const {
    if (logit == -std::numeric_limits<double>::infinity()) {
      return 0;
    }
    const double logprob = (logit - max) * inv_temperature - log_sum;
    return grad_logprob * inv_temperature + std::exp(logprob) * (constant + slope * logprob);
  }
};

// What a row must hold to be a distribution: the same words in every op that insists on it.
inline const char* not_a_distribution(const SoftmaxSums& row) {
  if (row.max == std::numeric_limits<double>::infinity()) {
    return "holds +inf";
  }
  if (std::isnan(row.sum)) {
    return "holds NaN";
  }
  return row.sum > 0 ? nullptr : "is -inf everywhere";
}

} // namespace fastppo
