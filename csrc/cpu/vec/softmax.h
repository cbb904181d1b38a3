/*
Row loops over logits: 16-bit loads, tails, maxima and the exponential. Only for units in this folder.

A step is two registers of floats: one load of a 16-bit type, two of float32. The last step of a row is padded with
-inf: a tail read as 0 would be a token of weight 1.
*/
#pragma once

#include "cpu/vec/vec.h"

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

// The larger of the two; a NaN in x is passed over, so that a row's maximum stays usable. The sum reports the NaN.
inline Vec running_max(const Vec& maximum, const Vec& x) { return at::vec::clamp_min(maximum, x); }

inline float max_lane(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](Vec& a, Vec& b) { return running_max(a, b); }, v);
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

/*
e^z for z in [-88, 0]. At -88 it is exactly 0, and at_least_floor brings everything below there, -inf too, so a token
that cannot occur needs no branch: e^z and z e^z are both 0. NaN stays NaN.

e^z = 2^n e^r with n = round(z / ln 2) and |r| <= ln(2) / 2; the polynomial is within 3e-9, the result within about
1 ulp. Adding 1.5 * 2^23 rounds z / ln 2 to an integer in the low bits of the mantissa; 127 more turns that integer into
the exponent field of 2^n, and n = -127 into the exponent field of the float 0. ATen's own exp costs twice as much.
*/
inline Vec at_least_floor(const Vec& z) { return at::vec::clamp_min(z, Vec(-88.0f)); }

inline Vec exp_nonpositive(const Vec& z) {
  using at::vec::fmadd;
  using Ints = at::vec::Vectorized<int32_t>;
  const Vec shift(0x1.8p23f + 127.0f);
  const Vec shifted = fmadd(z, Vec(1.44269504f), shift);
  const Vec n = shifted - shift;
  const Vec r = fmadd(n, Vec(-1.42860677e-6f), fmadd(n, Vec(-0x1.62e4p-1f), z));
  Vec p(0x1.6a244cp-10f);
  p = fmadd(p, r, Vec(0x1.1239d4p-7f));
  p = fmadd(p, r, Vec(0x1.5558f2p-5f));
  p = fmadd(p, r, Vec(0x1.555492p-3f));
  p = fmadd(p, r, Vec(0x1.fffffcp-2f));
  p = fmadd(p, r, Vec(1.0f));
  p = fmadd(p, r, Vec(1.0f));
  return p * at::vec::cast<float, int32_t>(at::vec::cast<int32_t, float>(shifted) << Ints(23));
}

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
