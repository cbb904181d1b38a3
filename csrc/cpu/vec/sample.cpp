#include "cpu/vec/sample.h"

#include "cpu/vec/softmax.h"

namespace fastppo::CPU_CAPABILITY {
namespace {

// One bit for each lane in which v >= bound; never for NaN.
inline uint32_t lanes_at_least(const Vec& v, const Vec& bound) {
#if defined(CPU_CAPABILITY_AVX512)
  return _mm512_cmp_ps_mask(v, bound, _CMP_GE_OQ);
#else
  constexpr uint32_t kAllLanes = (1u << kLanes) - 1;
  return ~static_cast<uint32_t>((v >= bound).zero_mask()) & kAllLanes;
#endif
}

} // namespace

void softmax_weights(const void* x, DType dtype, int64_t n, float reference, double inv_temperature, float* weights) {
  with_dtype(dtype, [&](auto* type) {
    const Vec references(reference), scale(static_cast<float>(inv_temperature * kLog2E));
    const auto lanes = [&](const Vec& v) { return exp2_of((v - references) * scale); };
    map_steps(
        static_cast<decltype(type)>(x), weights, n, [&](const Step& v) { return Step{lanes(v.low), lanes(v.high)}; });
  });
}

void chunk_weights(
    const void* x, DType dtype, int64_t n, float reference, double inv_temperature, float* weights,
    double* chunk_sums) {
  softmax_weights(x, dtype, n, reference, inv_temperature, weights);
  for (int64_t begin = 0; begin < n; begin += kChunk) {
    const int64_t count = std::min(kChunk, n - begin);
    Vec sum(0.0f);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
      sum = sum + Vec::loadu(weights + begin + i);
    }
    double total = sum_lanes(sum);
    for (; i < count; ++i) {
      total += weights[begin + i];
    }
    chunk_sums[begin / kChunk] = total;
  }
}

void count_at_least(const float* x, int64_t n, float bound, int64_t& count) {
  const Vec bounds(bound);
  count = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    count += std::popcount(lanes_at_least(Vec::loadu(x + i), bounds));
  }
  for (; i < n; ++i) {
    count += x[i] >= bound;
  }
}

void select_at_least(
    const void* x, DType dtype, int64_t n, float bound, int64_t* places, float* values, int64_t& count) {
  const Vec bounds(bound);
  count = 0;
  with_dtype(dtype, [&](auto* type) {
    int64_t begin = 0;
    for_each_step(static_cast<decltype(type)>(x), n, [&](const Step& v) {
      for (const Vec& lanes : {v.low, v.high}) {
        uint32_t found = lanes_at_least(lanes, bounds);
        if (found != 0) {
          float lane[kLanes];
          lanes.store(lane);
          for (; found != 0; found &= found - 1) {
            const int place = std::countr_zero(found);
            places[count] = begin + place;
            values[count] = lane[place];
            ++count;
          }
        }
        begin += kLanes;
      }
    });
  });
}

} // namespace fastppo::CPU_CAPABILITY
