#include "cpu/vec/sample.h"

#include "cpu/vec/softmax.h"

namespace fastppo::CPU_CAPABILITY {

void softmax_weights(const void* x, DType dtype, int64_t n, float max, float inv_temperature, float* weights) {
  with_dtype(dtype, [&](auto* type) {
    const Vec maximum(max), scale(inv_temperature);
    const auto lanes = [&](const Vec& v) { return exp_nonpositive(at_least_floor((v - maximum) * scale)); };
    map_steps(
        static_cast<decltype(type)>(x), weights, n, [&](const Step& v) { return Step{lanes(v.low), lanes(v.high)}; });
  });
}

void block_maxima(const void* x, DType dtype, int64_t n, float* maxima) {
  with_dtype(dtype, [&](auto* type) {
    const auto* logits = static_cast<decltype(type)>(x);
    for (int64_t begin = 0; begin < n; begin += kMaximaBlock) {
      maxima[begin / kMaximaBlock] = max_of(logits + begin, std::min(kMaximaBlock, n - begin));
    }
  });
}

void to_float32(const void* x, DType dtype, int64_t n, float* out) {
  with_dtype(dtype, [&](auto* type) { widen(static_cast<decltype(type)>(x), n, out); });
}

} // namespace fastppo::CPU_CAPABILITY
