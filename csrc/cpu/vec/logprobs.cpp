/*
The sums of a tile in base 2: t = (logits - reference) log2(e) / temperature, weights 2^t.

A reference a few nats off the maximum gives the same relative precision as the maximum itself, so the quick loop takes
the maximum of the first chunk and looks at no other: a load, and ten instructions for sixteen logits. A tile whose sum
shows that this was not good enough, because a logit is NaN, infinite or far above the first chunk, is gone through once
more by the careful loop, which follows the maximum. The careful loop alone takes 1.35 times as long, and two passes
over a tile in the L1 cache, its maximum first, 2.1 times: the second leaves the memory idle.
*/
#include "cpu/vec/logprobs.h"

#include "cpu/vec/softmax.h"

namespace fastppo::CPU_CAPABILITY {
namespace {

template <class T>
struct Base2Sums {
  Vec sum_low{0.0f}, sum_high{0.0f}, weighted_low{0.0f}, weighted_high{0.0f};

  void add(const Vec& t_low, const Vec& t_high) {
    const Vec low = weight_of<T>(t_low), high = weight_of<T>(t_high);
    sum_low = sum_low + low;
    sum_high = sum_high + high;
    weighted_low = at::vec::fmadd(t_low, low, weighted_low);
    weighted_high = at::vec::fmadd(t_high, high, weighted_high);
  }

  void add(const Base2Sums& other) {
    sum_low = sum_low + other.sum_low;
    sum_high = sum_high + other.sum_high;
    weighted_low = weighted_low + other.weighted_low;
    weighted_high = weighted_high + other.weighted_high;
  }

  float sum() const {
    return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return a + b; }, sum_low + sum_high);
  }

  // Makes the sums relative to a maximum that is higher by -shift in t, factor = 2^shift.
  void rescale(float shift, float factor) {
    if (factor == 0) {
      *this = {}; // shift may be -inf
      return;
    }
    const Vec factors(factor), shifts(shift);
    weighted_low = factors * at::vec::fmadd(shifts, sum_low, weighted_low);
    weighted_high = factors * at::vec::fmadd(shifts, sum_high, weighted_high);
    sum_low = factors * sum_low;
    sum_high = factors * sum_high;
  }

  SoftmaxSums natural(double reference, double inv_temperature, float scale) const {
    const double sum = sum_lanes(sum_low + sum_high), weighted = sum_lanes(weighted_low + weighted_high);
    return sums_in_nats(reference, sum, weighted, inv_temperature, scale);
  }
};

enum class Detail { kNone, kPartSums, kMaxima };

// body(part of x, where it begins, its length).
template <class T, class Body>
void for_each_part(const T* x, int64_t n, const Body& body) {
  for (int64_t begin = 0; begin < n; begin += kPart) {
    body(x + begin, begin, std::min(kPart, n - begin));
  }
}

// details: part sums or maxima, as kDetail says.
template <class T, Detail kDetail>
SoftmaxSums quick_sums(const T* x, int64_t n, double inv_temperature, float scale, float* details) {
  const Scaled scaled(max_of(x, std::min(n, kChunk)), scale);
  Base2Sums<T> total;
  for_each_part(x, n, [&](const T* part, int64_t begin, int64_t count) {
    Base2Sums<T> sums;
    const auto add = [&](const Step& v) { sums.add(scaled(v.low), scaled(v.high)); };
    if constexpr (kDetail == Detail::kMaxima) {
      for_each_chunk(part, count, [&](const T* logits, int64_t index) {
        const Chunk<T> chunk(logits);
        details[begin / kChunk + index] = max_lane(chunk.max());
        for (const Step& v : chunk.steps) {
          add(v);
        }
      });
    } else {
      for_each_step_unordered(part, count, add);
    }
    if constexpr (kDetail == Detail::kPartSums) {
      details[begin / kPart] = sums.sum();
    }
    total.add(sums);
  });
  return total.natural(scaled.reference(), inv_temperature, scale);
}

template <class T, Detail kDetail>
SoftmaxSums careful_sums(const T* x, int64_t n, double inv_temperature, float scale, float* details) {
  const Vec scales(scale);
  float highest = -kInfinity;
  Base2Sums<T> total;
  for_each_part(x, n, [&](const T* part, int64_t begin, int64_t count) {
    const float part_max = max_of(part, count);
    if (part_max > highest) {
      if (highest > -kInfinity) {
        const float shift = (highest - part_max) * scale, factor = std::exp2(shift);
        total.rescale(shift, factor);
        if constexpr (kDetail == Detail::kPartSums) {
          for (int64_t i = 0; i < begin / kPart; ++i) {
            details[i] *= factor;
          }
        }
      }
      highest = part_max;
    }
    const Vec max(finite_or_zero(highest));
    Base2Sums<T> sums;
    for_each_chunk(part, count, [&](const T* logits, int64_t index) {
      const Chunk<T> chunk(logits);
      if constexpr (kDetail == Detail::kMaxima) {
        details[begin / kChunk + index] = max_lane(chunk.max());
      }
      for (const Step& v : chunk.steps) {
        sums.add(at_least_lowest((v.low - max) * scales), at_least_lowest((v.high - max) * scales));
      }
    });
    if constexpr (kDetail == Detail::kPartSums) {
      details[begin / kPart] = sums.sum();
    }
    total.add(sums);
  });
  return total.natural(highest, inv_temperature, scale);
}

template <class T, Detail kDetail>
SoftmaxSums sums(const T* x, int64_t n, double inv_temperature, float* details) {
  const auto scale = static_cast<float>(inv_temperature * kLog2E);
  constexpr double kMostQuick = 0x1p20; // 14 nats above the reference; a multiple of a float32 rounding more
  const SoftmaxSums quick = quick_sums<T, kDetail>(x, n, inv_temperature, scale, details);
  return quick.sum < kMostQuick && std::isfinite(quick.weighted)
             ? quick
             : careful_sums<T, kDetail>(x, n, inv_temperature, scale, details);
}

template <class T>
void grad(const SoftmaxGrad& row, const T* x, int64_t n, T* dx) {
  // In base 2, as above: p = 2^t, log p = t / log2(e).
  const auto in_base_2 = [](float natural) { return Vec(static_cast<float>(natural * kLog2E)); };
  const Vec reference(row.reference), scale = in_base_2(row.inv_temperature), log_sum = in_base_2(row.log_sum);
  const Vec constant(row.constant), slope(static_cast<float>(row.slope / kLog2E));
  const auto lanes = [&](const Vec& v) {
    const Vec t = at_least_lowest((v - reference) * scale - log_sum);
    return exp2_of(t) * at::vec::fmadd(slope, t, constant);
  };
  map_steps(x, dx, n, [&](const Step& v) { return Step{lanes(v.low), lanes(v.high)}; });
}

} // namespace

void softmax_sums(
    const void* x, DType dtype, int64_t n, double inv_temperature, SoftmaxSums& out, const TileDetails* details) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    const T* logits = static_cast<const T*>(x);
    if (details == nullptr) {
      out = sums<T, Detail::kNone>(logits, n, inv_temperature, nullptr);
    } else if (details->part_sums != nullptr) {
      out = sums<T, Detail::kPartSums>(logits, n, inv_temperature, details->part_sums);
    } else {
      out = sums<T, Detail::kMaxima>(logits, n, inv_temperature, details->maxima);
    }
  });
}

void logprobs_grad(const SoftmaxGrad& row, const void* x, DType dtype, int64_t n, void* dx) {
  with_dtype(dtype, [&](auto* type) {
    using T = std::remove_const_t<std::remove_pointer_t<decltype(type)>>;
    grad(row, static_cast<const T*>(x), n, static_cast<T*>(dx));
  });
}

} // namespace fastppo::CPU_CAPABILITY
