/*
Row loops over logits: 16-bit loads, tails, maxima and the exponential. Only for units in this folder.

A step is two registers of floats: one load of a 16-bit type, two of float32. The last step of a row is padded with
-inf: a tail read as 0 would be a token of weight 1.
*/
#pragma once

#include "cpu/vec/vec.h"
#include "csrc/softmax.h"

#include <bit>
#include <limits>

namespace fastppo {
namespace CPU_CAPABILITY {

constexpr int64_t kStep = 2 * kLanes;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Step {
  Vec low, high;
};

template <class T>
Step load_step(const T* x) {
  if constexpr (std::is_same_v<T, float>) {
    return {Vec::loadu(x), Vec::loadu(x + kLanes)};
  } else {
    const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(x));
    return {low, high};
  }
}

template <class T>
void store_step(const Step& v, T* x) {
  if constexpr (std::is_same_v<T, float>) {
    v.low.store(x);
    v.high.store(x + kLanes);
  } else {
    at::vec::convert_from_float<T>(v.low, v.high).store(x);
  }
}

// The last n < kStep elements of a row, then -inf.
template <class T>
struct Tail {
  T values[kStep];

  Tail(const T* x, int64_t n) {
    for (int64_t i = 0; i < kStep; ++i) {
      values[i] = i < n ? x[i] : static_cast<T>(-kInfinity);
    }
  }
};

// The larger of the two; a NaN in x is passed over, so that a row's maximum stays usable. The sum reports the NaN.
inline Vec running_max(const Vec& maximum, const Vec& x) { return at::vec::clamp_min(maximum, x); }

inline float max_lane(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return running_max(a, b); }, v);
}

// A step in an order of its own: for sums and maxima, where the order of lanes means nothing. A bfloat16 is the upper
// half of a float32, so even and odd elements come out of one register by a shift and a mask, half the work of
// widening.
template <class T>
Step load_unordered(const T* x) {
  if constexpr (std::is_same_v<T, c10::BFloat16> && std::endian::native == std::endian::little) {
    using Ints = at::vec::Vectorized<int32_t>;
    const Ints both = Ints::loadu(x);
    return {
        at::vec::cast<float, int32_t>(both << Ints(16)),
        at::vec::cast<float, int32_t>(both & Ints(static_cast<int32_t>(0xffff0000)))};
  } else {
    return load_step(x);
  }
}

// A run of logits short enough to stay in registers between looking for its maximum and summing it.
constexpr int64_t kStepsPerChunk = kChunk / kStep;

template <class T>
struct Chunk {
  Step steps[kStepsPerChunk];

  explicit Chunk(const T* x) {
    for (int64_t i = 0; i < kStepsPerChunk; ++i) {
      steps[i] = load_unordered(x + i * kStep);
    }
  }

  Vec max() const {
    Vec low = steps[0].low, high = steps[0].high;
    for (int64_t i = 1; i < kStepsPerChunk; ++i) {
      low = running_max(low, steps[i].low);
      high = running_max(high, steps[i].high);
    }
    return running_max(low, high);
  }
};

// body(pointer to kChunk logits, index of the chunk) over n logits; the last chunk is filled up with -inf.
template <class T, class Body>
void for_each_chunk(const T* x, int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kChunk <= n; i += kChunk) {
    body(x + i, i / kChunk);
  }
  if (i < n) {
    T last[kChunk];
    std::fill(std::copy(x + i, x + n, last), last + kChunk, static_cast<T>(-kInfinity));
    body(static_cast<const T*>(last), i / kChunk);
  }
}

// body(Step) over n logits.
template <class T, class Body>
void for_each_step(const T* x, int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    body(load_step(x + i));
  }
  if (i < n) {
    body(load_step(Tail<T>(x + i, n - i).values));
  }
}

// As for_each_step, with the lanes of a step in an order of their own. Asking for the memory 4 KB ahead, across the
// ends of pages, lost: rows of 49152 took 11.8 -> 14.4 µs in float32, 8.6 -> 8.2 in bfloat16 (EPYC 9004, one core, from
// memory).
template <class T, class Body>
void for_each_step_unordered(const T* x, int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    body(load_unordered(x + i));
  }
  if (i < n) {
    body(load_unordered(Tail<T>(x + i, n - i).values));
  }
}

// The same over two rows.
template <class T, class Body>
void for_each_step_unordered(const T* x, const T* y, int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    body(load_unordered(x + i), load_unordered(y + i));
  }
  if (i < n) {
    body(load_unordered(Tail<T>(x + i, n - i).values), load_unordered(Tail<T>(y + i, n - i).values));
  }
}

// body(Step, Step) over two rows of n logits.
template <class T, class Body>
void for_each_step(const T* x, const T* y, int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    body(load_step(x + i), load_step(y + i));
  }
  if (i < n) {
    body(load_step(Tail<T>(x + i, n - i).values), load_step(Tail<T>(y + i, n - i).values));
  }
}

// out[i] = body(x[i]) over n logits; out may be x.
template <class In, class Out, class Body>
void map_steps(const In* x, Out* out, int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kStep <= n; i += kStep) {
    store_step(body(load_step(x + i)), out + i);
  }
  if (i < n) {
    Out last[kStep];
    store_step(body(load_step(Tail<In>(x + i, n - i).values)), last);
    std::copy(last, last + (n - i), out + i);
  }
}

template <class T>
float max_of(const T* x, int64_t n) {
  Vec low(-kInfinity), high(-kInfinity);
  for_each_step(x, n, [&](const Step& v) {
    low = running_max(low, v.low);
    high = running_max(high, v.high);
  });
  return max_lane(running_max(low, high));
}

// What to subtract from logits with this maximum: -inf - -inf must not be formed.
inline float finite_or_zero(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// c[0] + c[1] r + c[2] r^2 + ...
template <size_t kCount>
inline Vec polynomial(const Vec& r, const float (&c)[kCount]) {
  Vec p(c[kCount - 1]);
  for (size_t i = kCount - 1; i-- > 0;) {
    p = at::vec::fmadd(p, r, Vec(c[i]));
  }
  return p;
}

/*
2^t within 2e-7 of it; 2^0 is exactly 1. Below kLowest, at -inf too, it is exactly 0, from 128 on infinite; NaN stays
NaN.

t = n + r with n an integer; 2^r is a polynomial of degree 5, within 9e-8 (degree 6 costs an instruction of eleven and
gains less than float32 rounding loses). AVX-512 has one instruction that leaves r in [0, 1) and one that multiplies by
2^n. Elsewhere adding 1.5 * 2^23 rounds t to an integer in the low bits of the mantissa; 127 more turns that integer
into the exponent field of 2^n, and n = -127 into the exponent field of the float 0.
*/
#if defined(CPU_CAPABILITY_AVX512)
constexpr float kLowest = -150.0f;

inline Vec exp2_of(const Vec& t) {
  const Vec r = _mm512_reduce_ps(t, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  const Vec p = polynomial(r, {1.0f, 0x1.62e4bap-1f, 0x1.ebdb56p-3f, 0x1.c91ce6p-5f, 0x1.277856p-7f, 0x1.e974fap-10f});
  return _mm512_scalef_ps(p, t);
}
#else
constexpr float kLowest = -127.0f;

inline Vec exp2_of(const Vec& t) {
  using Ints = at::vec::Vectorized<int32_t>;
  const Vec bounded = at::vec::clamp(t, Vec(kLowest), Vec(128.0f)); // an exponent field past 255 would wrap around
  const Vec shift(0x1.8p23f + 127.0f);
  const Vec shifted = bounded + shift;
  const Vec p = polynomial(
      bounded - (shifted - shift),
      {1.0f, 0x1.62e42ap-1f, 0x1.ebf9bcp-3f, 0x1.c6b752p-5f, 0x1.3cea88p-7f, 0x1.5bba14p-10f});
  return p * at::vec::cast<float, int32_t>(at::vec::cast<int32_t, float>(shifted) << Ints(23));
}
#endif

/*
2^t within 1.1e-6 of it, for sums over logits that come in bfloat16, which are themselves off by up to 2e-3: those are
bound by arithmetic, where sums over float32 wait for memory. As exp2_of, but NaN at -inf.

t = n + k / 16 + r with |r| <= 1/32. Adding 1.5 * 2^19 rounds t to sixteenths, with k in the low four bits, which is all
that a lookup in sixteen lanes looks at. The parabola of 2^r is c ((r + 23/16)^2 + kRest): one multiply-add, because
sixteenths can be shifted by 23/16 at no cost. c and the shift's power of two are in the table.

On an AMD EPYC (Zen 4) the loop of vec/logprobs.cpp is bound by the two ports that multiply: t, weight and sums take 8
of their cycles for 16 logits with exp2_of, 7 with a polynomial of degree 4 (within 3e-6: entropies were off by more
than 1e-5) and this. 32 entries and |r| <= 1/64 (within 3.4e-7) take 7.3, 2^n by a shift of the rounded t and an integer
addition, whose range must then be watched, 7.7.
*/
template <class T>
Vec weight_of(const Vec& t) {
#if defined(CPU_CAPABILITY_AVX512)
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    constexpr float kShift = 23.0f / 16, kRest = 0x1.0a5f52p+1f;
    alignas(64) static constexpr float kPowers[16] = {0x1.edcc70p-1f, 0x1.01d49ap+0f, 0x1.0d3edep+0f, 0x1.192a86p+0f,
                                                      0x1.259d4ap+0f, 0x1.329d24p+0f, 0x1.403054p+0f, 0x1.4e5d60p-1f,
                                                      0x1.5d2b18p-1f, 0x1.6ca098p-1f, 0x1.7cc550p-1f, 0x1.8da102p-1f,
                                                      0x1.9f3bc4p-1f, 0x1.b19e10p-1f, 0x1.c4d0b8p-1f, 0x1.d8dcf8p-1f};
    const Vec to_sixteenths(0x1.8p19f), rounded = t + to_sixteenths;
    const Vec shifted = rounded - (to_sixteenths + Vec(kShift));
    const Vec power = _mm512_permutexvar_ps(_mm512_castps_si512(rounded), _mm512_load_ps(kPowers));
    const Vec u = _mm512_fnmadd_ps(shifted, Vec(1.0f), t); // t - shifted, on a port that is less busy
    return Vec(_mm512_scalef_ps(power, shifted)) * at::vec::fmadd(u, u, Vec(kRest));
  }
#endif
  return exp2_of(t);
}

// Where 2^t is 0, -inf too, but finite: t 2^t is 0 as well, without a branch.
inline Vec at_least_lowest(const Vec& t) { return at::vec::clamp_min(t, Vec(kLowest)); }

/*
(x - reference) scale. With a fused multiply-add it is one instruction, exact but for its own rounding; the reference is
then the one nearby whose product with the scale is a float32. Without one the product of a large logit would be rounded
by more than the difference can bear.
*/
class Scaled {
 public:
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  Scaled(float reference, float scale)
      : reference_(static_cast<double>(reference * scale) / scale), scale_(scale), offset_(-(reference * scale)) {}

  Vec operator()(const Vec& x) const { return at::vec::fmadd(x, scale_, offset_); }
#else
  Scaled(float reference, float scale) : reference_(reference), scale_(scale), offset_(reference) {}

  Vec operator()(const Vec& x) const { return (x - offset_) * scale_; }
#endif

  double reference() const { return reference_; }

 private:
  double reference_;
  Vec scale_, offset_;
};

// Calls body with a null pointer of the element type.
template <class Body>
void with_dtype(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kFloat32:
      return body(static_cast<const float*>(nullptr));
    case DType::kBFloat16:
      return body(static_cast<const c10::BFloat16*>(nullptr));
    case DType::kFloat16:
      return body(static_cast<const c10::Half*>(nullptr));
  }
}

} // namespace CPU_CAPABILITY
} // namespace fastppo
