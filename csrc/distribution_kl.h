/*
Exact KL divergence between two next-token distributions p = softmax(logits / temperature), the policy, and
q = softmax(ref_logits / temperature), the reference:
  kl = sum_i p[i] (log p[i] - log q[i]) = difference / sum_p - log sum_p + log sum_q
  difference = sum_i e^zp[i] (zp[i] - zq[i]),  sum_p = sum_i e^zp[i],  sum_q = sum_i e^zq[i]   (z as in softmax.h)
logits, ref_logits: (..., V), the same dtype and shape, any row strides. kl: (...), float32, nats, never below 0.
One read of both. A token that the policy cannot produce (-inf) adds nothing whatever the reference holds there; a token
that only the policy can produce makes kl infinite.

Backward:
  dlogits[i]     = grad p[i] (log p[i] - log q[i] - kl) / temperature
  dref_logits[i] = grad (q[i] - p[i]) / temperature
*/
#pragma once

#include <cmath>
#include <limits>

#include "numeric.h"

namespace fastppo {

struct KlSums {
  double reference_p = -std::numeric_limits<double>::infinity();
  double sum_p = 0;
  double reference_q = -std::numeric_limits<double>::infinity();
  double sum_q = 0;
  double difference = 0;

  // Adds the sums of further logits of the same row.
  FASTPPO_HD void merge(KlSums other, double inv_temperature) {
    const double p = other.reference_p > reference_p ? other.reference_p : reference_p,
                 q = other.reference_q > reference_q ? other.reference_q : reference_q;
    rescale(p, q, inv_temperature);
    other.rescale(p, q, inv_temperature);
    sum_p += other.sum_p;
    sum_q += other.sum_q;
    difference += other.difference;
  }

  FASTPPO_HD double kl() const {
    const double value = difference / sum_p - std::log(sum_p) + std::log(sum_q);
    return value < 0 ? 0 : value; // by rounding only; NaN passes
  }

 private:
  // Makes the sums relative to higher references. A part without mass (-inf everywhere) has nothing to shift.
  FASTPPO_HD void rescale(double p, double q, double inv_temperature) {
    if (sum_q != 0) {
      const double shift = (reference_q - q) * inv_temperature;
      sum_q *= std::exp(shift);
      difference -= sum_p == 0 ? 0 : shift * sum_p;
    }
    if (sum_p != 0) {
      const double shift = (reference_p - p) * inv_temperature, factor = std::exp(shift);
      difference = factor == 0 ? 0 : factor * (difference + shift * sum_p);
      sum_p *= factor;
    }
    reference_p = p;
    reference_q = q;
  }
};

// What the backward needs of one row.
struct KlGrad {
  float reference_p, log_sum_p, reference_q, log_sum_q;
  float kl;
  float inv_temperature;
  float scale; // grad / temperature
};

} // namespace fastppo

#if defined(TORCH_TARGET_VERSION)
#include "logprobs.h"

namespace fastppo {

inline void check_distribution_kl(const Tensor& logits, const Tensor& ref_logits, double temperature) {
  const char* op = "distribution_kl";
  check_logits(op, "logits", logits);
  check_shape(op, "ref_logits", ref_logits, logits.sizes(), "logits");
  check(
      ref_logits.scalar_type() == logits.scalar_type(), op, "ref_logits must be ", dtype_text(logits.scalar_type()),
      " like logits, got ", dtype_text(ref_logits.scalar_type()));
  check_logits(op, "ref_logits", ref_logits);
  check_device(op, "ref_logits", ref_logits, logits, "logits");
  check_temperature(op, temperature);
}

} // namespace fastppo
#endif
