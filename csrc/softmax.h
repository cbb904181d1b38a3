/*
The sums that a softmax, its entropy and its log-probabilities are made of, for one row or a part of one:
  z[i] = (logits[i] - reference) / temperature      sum = sum_i e^z[i]      weighted = sum_i z[i] e^z[i]

Each part is summed relative to a reference of its own, its maximum or a number near it, and merged here. `weighted`
uses z, not logits, so a shift of all logits changes nothing: at V = 131072 the entropy is off by 2e-6 where a sum of x
e^x is off by 3e-5. A logit of -inf has e^z = 0 and z e^z = 0.
*/
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>

#include "numeric.h"

namespace fastppo {

struct SoftmaxSums {
  double reference = -std::numeric_limits<double>::infinity();
  double sum = 0;
  double weighted = 0;

  FASTPPO_HD void merge(SoftmaxSums other, double inv_temperature) {
    // Nothing but -inf adds nothing, and -inf - -inf must not be formed. A NaN sits in the sum and has to get through.
    if (other.reference == -std::numeric_limits<double>::infinity() && other.sum == 0) {
      return;
    }
    if (other.reference > reference) {
      rescale((reference - other.reference) * inv_temperature);
      reference = other.reference;
    } else {
      other.rescale((other.reference - reference) * inv_temperature);
    }
    sum += other.sum;
    weighted += other.weighted;
  }

  FASTPPO_HD double log_sum() const { return std::log(sum); }
  // log_sum() relative to the reference rounded to float32, which is how a backward gets them.
  FASTPPO_HD double log_sum_of_rounded(double inv_temperature) const {
    return log_sum() + (reference - static_cast<float>(reference)) * inv_temperature;
  }
  FASTPPO_HD double entropy() const { return log_sum() - weighted / sum; }
  FASTPPO_HD double logprob(double logit, double inv_temperature) const {
    return (logit - reference) * inv_temperature - log_sum();
  }

 private:
  // Makes the sums relative to a reference that is higher by -shift in z.
  FASTPPO_HD void rescale(double shift) {
    if (sum == 0) {
      return; // shift may be -inf
    }
    const double factor = std::exp(shift);
    weighted = factor == 0 ? 0 : factor * (weighted + shift * sum);
    sum *= factor;
  }
};

constexpr double kLog2E = 1.4426950408889634;

/*
Sums in base 2, t = (logits - reference) scale and weights 2^t, in nats. `scale` is log2(e) / temperature rounded to
float32, by up to 6e-8 of it, which made the weights those of a temperature a little off. To first order that is put
back: a factor on both sums, with the mean of t in it. What stays of it in the entropy is 6e-8 of the variance of z.
*/
FASTPPO_HD SoftmaxSums
sums_in_nats(double reference, double sum, double weighted, double inv_temperature, float scale) {
  const double unit = inv_temperature / scale;
  const double correction = sum == 0 ? 1 : 1 + weighted / sum * (unit - 1 / kLog2E);
  return {reference, sum * correction, weighted * unit * correction};
}

/*
The gradient of one row's log-probability and entropy, with log p = z - log(sum):
  dlogits[i] = p[i] * (constant + slope * log p[i]) + (grad_logprob / temperature at the picked id)
*/
struct SoftmaxGrad {
  float reference;
  float log_sum;
  float inv_temperature;
  float constant; // -(grad_logprob + grad_entropy * entropy) / temperature
  float slope;    // -grad_entropy / temperature

  FASTPPO_HD SoftmaxGrad(
      double grad_logprob, double grad_entropy, double entropy, float reference, float log_sum, double inv_temperature)
      : reference(reference),
        log_sum(log_sum),
        inv_temperature(static_cast<float>(inv_temperature)),
        constant(static_cast<float>(-(grad_logprob + grad_entropy * entropy) * inv_temperature)),
        slope(static_cast<float>(-grad_entropy * inv_temperature)) {}

  // dlogits at the picked id. Without rounding in between: 1 - p of a likely token is a small difference.
  FASTPPO_HD double picked(double logit, double grad_logprob) const {
    if (logit == -std::numeric_limits<double>::infinity()) {
      return 0;
    }
    const double logprob = (logit - reference) * inv_temperature - log_sum;
    return grad_logprob * inv_temperature + std::exp(logprob) * (constant + slope * logprob);
  }
};

// What a row must hold to be a distribution: the same words in every op that insists on it.
inline const char* not_a_distribution(const SoftmaxSums& row) {
  if (row.reference == std::numeric_limits<double>::infinity()) {
    return "holds +inf";
  }
  if (std::isnan(row.sum)) {
    return "holds NaN";
  }
  return row.sum > 0 ? nullptr : "is -inf everywhere";
}

} // namespace fastppo
