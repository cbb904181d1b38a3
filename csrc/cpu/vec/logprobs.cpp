/*
Two passes over a tile that sits in the L1 cache: its maximum, then the sums relative to it. An online maximum would
need one pass and a rescale per register; the second pass here costs no memory traffic.
*/
#include "cpu/vec/logprobs.h"

#include "cpu/vec/softmax.h"

namespace fastppo::CPU_CAPABILITY {
namespace {

template <class T>
SoftmaxSums sums(const T* x, int64_t n, float inv_temperature) {
  const float maximum = max_of(x, n);
  const Vec max(finite_or_zero(maximum)), scale(inv_temperature);
  Vec sum_low(0.0f), sum_high(0.0f), weighted_low(0.0f), weighted_high(0.0f);
  for_each_step(x, n, [&](const Step& v) {
    const Vec low = at_least_floor((v.low - max) * scale), high = at_least_floor((v.high - max) * scale);
    const Vec exp_low = exp_nonpositive(low), exp_high = exp_nonpositive(high);
    sum_low = sum_low + exp_low;
    sum_high = sum_high + exp_high;
    weighted_low = at::vec::fmadd(low, exp_low, weighted_low);
    weighted_high = at::vec::fmadd(high, exp_high, weighted_high);
  });
  return {maximum, sum_lanes(sum_low) + sum_lanes(sum_high), sum_lanes(weighted_low) + sum_lanes(weighted_high)};
}

template <class T>
void grad(const SoftmaxGrad& row, const T* x, int64_t n, T* dx) {
  const Vec max(row.max), scale(row.inv_temperature), log_sum(row.log_sum), constant(row.constant), slope(row.slope);
  const auto lanes = [&](const Vec& v) {
    const Vec logprob = at_least_floor((v - max) * scale - log_sum);
    return exp_nonpositive(logprob) * at::vec::fmadd(slope, logprob, constant);
  };
  map_steps(x, dx, n, [&](const Step& v) { return Step{lanes(v.low), lanes(v.high)}; });
}

} // namespace

void softmax_sums(const void* x, DType dtype, int64_t n, float inv_temperature, SoftmaxSums& out) {
  with_dtype(dtype, [&](auto* type) { out = sums(static_cast<decltype(type)>(x), n, inv_temperature); });
}

void logprobs_grad(const SoftmaxGrad& row, const void* x, DType dtype, int64_t n, void* dx) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    grad(row, static_cast<const T*>(x), n, static_cast<T*>(dx));
  });
}

} // namespace fastppo::CPU_CAPABILITY
