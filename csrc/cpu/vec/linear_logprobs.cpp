#include "cpu/vec/linear_logprobs.h"

#include "cpu/vec/softmax.h"

namespace fastppo::CPU_CAPABILITY {
namespace {

// Near 0 the odd series (its next term is 2e-8 of the value at 0.35), elsewhere (1 - e^-2|y|) / (1 + e^-2|y|), which
// near 0 would lose to cancellation what softcap then multiplies.
Vec tanh_of(const Vec& y) {
  using at::vec::fmadd;
  const Vec square = y * y, one(1.0f), zero(0.0f);
  Vec series(-1382.0f / 155925.0f);
  series = fmadd(series, square, Vec(62.0f / 2835.0f));
  series = fmadd(series, square, Vec(-17.0f / 315.0f));
  series = fmadd(series, square, Vec(2.0f / 15.0f));
  series = fmadd(series, square, Vec(-1.0f / 3.0f));
  series = fmadd(series * square, y, y);
  const Vec magnitude = y.abs();
  const Vec decay = exp2_of(magnitude * Vec(static_cast<float>(-2 * kLog2E)));
  const Vec ratio = (one - decay) / (one + decay);
  return select(magnitude < Vec(0.35f), series, select(y < zero, zero - ratio, ratio));
}

} // namespace

void head_logits(const Head& head, const void* x, DType dtype, const float* bias, int64_t n, float* logits) {
  with_dtype(dtype, [&](auto* type) { widen(static_cast<decltype(type)>(x), n, logits); });
  if (bias == nullptr && head.logit_scale == 1.0f && head.softcap == 0.0f) {
    return;
  }
  if (bias != nullptr) {
    for (int64_t i = 0; i < n; ++i) {
      logits[i] += bias[i];
    }
  }
  const Vec scale(head.logit_scale), cap(head.softcap), to_cap(head.logit_scale / head.softcap);
  const auto lanes = [&](const Vec& v) { return head.softcap == 0.0f ? v * scale : cap * tanh_of(v * to_cap); };
  map_steps(logits, logits, n, [&](const Step& v) { return Step{lanes(v.low), lanes(v.high)}; });
}

void head_grad(const Head& head, const float* logits, const float* dlogits, int64_t n, void* grad, DType dtype) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const bool capped = head.softcap != 0.0f;
    const Vec scale(head.logit_scale), by_cap(1.0f / head.softcap), one(1.0f);
    // Without a cap the logits are not looked at: they may be -inf.
    const auto lanes = [&](const Vec& x, const Vec& d) {
      return capped ? scale * d * (one - (x * by_cap) * (x * by_cap)) : scale * d;
    };
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      const Step x = load_step(logits + i), d = load_step(dlogits + i);
      store_step(Step{lanes(x.low, d.low), lanes(x.high, d.high)}, static_cast<T*>(grad) + i);
    }
    for (; i < n; ++i) {
      const float x = logits[i] / head.softcap;
      static_cast<T*>(grad)[i] = static_cast<T>(head.logit_scale * dlogits[i] * (capped ? 1.0f - x * x : 1.0f));
    }
  });
}

void add_to(const void* x, DType dtype, int64_t n, float* sum) {
  with_dtype(dtype, [&](auto* type) {
    const auto* from = static_cast<decltype(type)>(x);
    int64_t i = 0;
    for (; i + kStep <= n; i += kStep) {
      const Step a = load_step(sum + i), b = load_step(from + i);
      store_step(Step{a.low + b.low, a.high + b.high}, sum + i);
    }
    for (; i < n; ++i) {
      sum[i] += static_cast<float>(from[i]);
    }
  });
}

void from_float32(const float* x, int64_t n, void* out, DType dtype) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    narrow(x, n, static_cast<T*>(out));
  });
}

} // namespace fastppo::CPU_CAPABILITY
