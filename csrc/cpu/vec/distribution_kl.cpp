/*
As in vec/logprobs.cpp: a quick loop relative to the maxima of the first chunk, and, where the sums show that this was
not good enough, a careful one relative to the maxima of the tile. The careful loop also has the test, on every token,
for tokens that are impossible under the policy, the reference or both.
*/
#include "cpu/vec/distribution_kl.h"

#include "cpu/vec/softmax.h"

namespace fastppo::CPU_CAPABILITY {
namespace {

// In base 2, t = (logits - reference) scale; `unit` takes a difference of two t back to natural units.
struct Base2KlSums {
  Vec sum_p{0.0f}, sum_q{0.0f}, difference{0.0f};

  KlSums natural(double reference_p, double reference_q, double unit) const {
    return {reference_p, sum_lanes(sum_p), reference_q, sum_lanes(sum_q), sum_lanes(difference) * unit};
  }
};

template <class T>
KlSums quick_sums(const T* x, const T* y, int64_t n, float scale, double unit) {
  const Scaled scaled_p(max_of(x, std::min(n, kChunk)), scale), scaled_q(max_of(y, std::min(n, kChunk)), scale);
  Base2KlSums low, high;
  const auto add = [&](Base2KlSums& sums, const Vec& p, const Vec& q) {
    const Vec tp = scaled_p(p), tq = scaled_q(q);
    const Vec exp_p = weight_of<T>(tp);
    sums.sum_p = sums.sum_p + exp_p;
    sums.sum_q = sums.sum_q + weight_of<T>(tq);
    sums.difference = at::vec::fmadd(exp_p, tp - tq, sums.difference);
  };
  for_each_step_unordered(x, y, n, [&](const Step& p, const Step& q) {
    add(low, p.low, q.low);
    add(high, p.high, q.high);
  });
  low.sum_p = low.sum_p + high.sum_p;
  low.sum_q = low.sum_q + high.sum_q;
  low.difference = low.difference + high.difference;
  return low.natural(scaled_p.reference(), scaled_q.reference(), unit);
}

template <class T>
KlSums careful_sums(const T* x, const T* y, int64_t n, float scale, double unit) {
  const float highest_p = max_of(x, n), highest_q = max_of(y, n);
  const Vec max_p(finite_or_zero(highest_p)), max_q(finite_or_zero(highest_q)), scales(scale), zero(0.0f);
  Base2KlSums sums;
  const auto add = [&](const Vec& p, const Vec& q) {
    const Vec tp = at_least_lowest((p - max_p) * scales), tq = (q - max_q) * scales;
    const Vec exp_p = exp2_of(tp);
    sums.sum_p = sums.sum_p + exp_p;
    sums.sum_q = sums.sum_q + exp2_of(tq);
    // Where p is 0 the factor may be infinite: drop it. tq itself is not clamped, q = 0 under p > 0 is infinite.
    sums.difference = sums.difference + select(exp_p == zero, zero, exp_p * (tp - tq));
  };
  for_each_step(x, y, n, [&](const Step& p, const Step& q) {
    add(p.low, q.low);
    add(p.high, q.high);
  });
  return sums.natural(highest_p, highest_q, unit);
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
  // In base 2: p = 2^log_p. `scale` takes the difference of two such logarithms back to natural units.
  const auto in_base_2 = [](float natural) { return Vec(static_cast<float>(natural * kLog2E)); };
  const Vec reference_p(row.reference_p), reference_q(row.reference_q), log_sum_p = in_base_2(row.log_sum_p),
                                                                        log_sum_q = in_base_2(row.log_sum_q);
  const Vec inv_temperature = in_base_2(row.inv_temperature), kl = in_base_2(row.kl);
  const Vec scale(row.scale), natural_scale(static_cast<float>(row.scale / kLog2E));
  const auto step = [&](const Step& p, const Step& q, int64_t begin, int64_t count) {
    const auto policy = [&](const Vec& v) { return at_least_lowest((v - reference_p) * inv_temperature - log_sum_p); };
    const auto reference = [&](const Vec& v) {
      return at_least_lowest((v - reference_q) * inv_temperature - log_sum_q);
    };
    const Step log_p{policy(p.low), policy(p.high)}, log_q{reference(q.low), reference(q.high)};
    const Step prob_p{exp2_of(log_p.low), exp2_of(log_p.high)};
    if (dx != nullptr) {
      store_some(
          Step{
              natural_scale * prob_p.low * (log_p.low - log_q.low - kl),
              natural_scale * prob_p.high * (log_p.high - log_q.high - kl)},
          count, dx + begin);
    }
    if (dy != nullptr) {
      store_some(
          Step{scale * (exp2_of(log_q.low) - prob_p.low), scale * (exp2_of(log_q.high) - prob_p.high)}, count,
          dy + begin);
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

void kl_sums(const void* logits, const void* ref_logits, DType dtype, int64_t n, double inv_temperature, KlSums& out) {
  const auto scale = static_cast<float>(inv_temperature * kLog2E);
  const double unit = inv_temperature / scale;
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const auto *x = static_cast<const T*>(logits), *y = static_cast<const T*>(ref_logits);
    constexpr double kMostQuick = 0x1p20; // as in vec/logprobs.cpp
    out = quick_sums(x, y, n, scale, unit);
    if (!(out.sum_p < kMostQuick && out.sum_q < kMostQuick && std::isfinite(out.difference))) {
      out = careful_sums(x, y, n, scale, unit);
    }
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
