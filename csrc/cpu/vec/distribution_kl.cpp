#include "cpu/vec/distribution_kl.h"

#include "cpu/vec/softmax.h"

namespace fastppo::CPU_CAPABILITY {
namespace {

template <class T>
KlSums sums(const T* x, const T* y, int64_t n, float inv_temperature) {
  KlSums out;
  out.max_p = max_of(x, n);
  out.max_q = max_of(y, n);
  const Vec max_p(finite_or_zero(out.max_p)), max_q(finite_or_zero(out.max_q)), scale(inv_temperature), zero(0.0f);
  Vec sum_p(0.0f), sum_q(0.0f), difference(0.0f);
  const auto lanes = [&](const Vec& p, const Vec& q) {
    const Vec zp = at_least_floor((p - max_p) * scale), zq = (q - max_q) * scale;
    const Vec exp_p = exp_nonpositive(zp);
    sum_p = sum_p + exp_p;
    sum_q = sum_q + exp_nonpositive(at_least_floor(zq));
    // Where p is 0 the factor may be infinite: drop it. zq itself is not clamped, q = 0 under p > 0 is infinite.
    difference = difference + select(exp_p == zero, zero, exp_p * (zp - zq));
  };
  for_each_step(x, y, n, [&](const Step& p, const Step& q) {
    lanes(p.low, q.low);
    lanes(p.high, q.high);
  });
  out.sum_p = sum_lanes(sum_p);
  out.sum_q = sum_lanes(sum_q);
  out.difference = sum_lanes(difference);
  return out;
}

// Writes the gradients of one step; `n` < kStep at the end of a row.
template <class T>
void store_some(const Step& v, int64_t n, T* out) {
  if (n == kStep) {
    store_step(v, out);
  } else {
    T last[kStep];
    store_step(v, last);
    std::copy(last, last + n, out);
  }
}

template <class T>
void grad(const KlGrad& row, const T* x, const T* y, int64_t n, T* dx, T* dy) {
  const Vec max_p(row.max_p), max_q(row.max_q), log_sum_p(row.log_sum_p), log_sum_q(row.log_sum_q);
  const Vec inv_temperature(row.inv_temperature), scale(row.scale), kl(row.kl);
  const auto step = [&](const Step& p, const Step& q, int64_t begin, int64_t count) {
    const auto policy = [&](const Vec& v) { return at_least_floor((v - max_p) * inv_temperature - log_sum_p); };
    const auto reference = [&](const Vec& v) { return at_least_floor((v - max_q) * inv_temperature - log_sum_q); };
    const Step log_p{policy(p.low), policy(p.high)}, log_q{reference(q.low), reference(q.high)};
    const Step prob_p{exp_nonpositive(log_p.low), exp_nonpositive(log_p.high)};
    if (dx != nullptr) {
      store_some(
          Step{scale * prob_p.low * (log_p.low - log_q.low - kl), scale * prob_p.high * (log_p.high - log_q.high - kl)},
          count, dx + begin);
    }
    if (dy != nullptr) {
      store_some(
          Step{scale * (exp_nonpositive(log_q.low) - prob_p.low), scale * (exp_nonpositive(log_q.high) - prob_p.high)},
          count, dy + begin);
    }
  };
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    step(load_step(x + i), load_step(y + i), i, kStep);
  }
  if (i < n) {
    step(load_step(Tail<T>(x + i, n - i).values), load_step(Tail<T>(y + i, n - i).values), i, n - i);
  }
}

} // namespace

void kl_sums(const void* logits, const void* ref_logits, DType dtype, int64_t n, float inv_temperature, KlSums& out) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    out = sums(static_cast<const T*>(logits), static_cast<const T*>(ref_logits), n, inv_temperature);
  });
}

void kl_grad(
    const KlGrad& row, const void* logits, const void* ref_logits, DType dtype, int64_t n, void* dlogits,
    void* dref_logits) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    grad(
        row, static_cast<const T*>(logits), static_cast<const T*>(ref_logits), n, static_cast<T*>(dlogits),
        static_cast<T*>(dref_logits));
  });
}

} // namespace fastppo::CPU_CAPABILITY
