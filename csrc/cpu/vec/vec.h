/*
ATen's vector classes, the functions of numeric.h on them, and the way a block of a row gets in and out of float32.
Only for units in this folder, which are compiled once per instruction set.
*/
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <cstring>

#include "cpu/rows.h"
#include "numeric.h"

// In ATen's namespace so that they are found by argument: formulas are templates in headers that know only numeric.h.
namespace at::vec {
inline namespace CPU_CAPABILITY {

// A comparison of two vectors is a vector whose lanes are all ones or all zeros.
inline Vectorized<float> select(
    const Vectorized<float>& condition, const Vectorized<float>& a, const Vectorized<float>& b) {
  return Vectorized<float>::blendv(b, a, condition);
}

/*
e^x - 1 = 2^n (e^r - 1) + (2^n - 1), with n = round(x / ln 2) and |r| <= ln(2) / 2, where the series to r^7 is within
2e-8 of it. Half of 2^n is used, and doubled at the end, so that n = 128 does not overflow before the result does. Below
2^-126, e^x is 0. ATen's exp takes 3 times as long, and its expm1 30 times.
*/
struct ExpParts {
  Vectorized<float> half; // 2^(n - 1)
  Vectorized<float> expm1_of_rest;

  explicit ExpParts(const Vectorized<float>& x) {
    using Floats = Vectorized<float>;
    using Ints = Vectorized<int32_t>;
    const Floats bounded = clamp(x, Floats(-87.4f), Floats(89.0f));
    const Floats shift(0x1.8p23f + 126.0f); // rounds to an integer, and makes it the exponent field of 2^(n - 1)
    const Floats shifted = fmadd(bounded, Floats(1.44269504f), shift);
    const Floats n = shifted - shift;
    const Floats r = fmadd(n, Floats(-1.42860677e-6f), fmadd(n, Floats(-0x1.62e4p-1f), bounded));
    half = cast<float, int32_t>(cast<int32_t, float>(shifted) << Ints(23));
    Floats p(1.0f / 5040);
    p = fmadd(p, r, Floats(1.0f / 720));
    p = fmadd(p, r, Floats(1.0f / 120));
    p = fmadd(p, r, Floats(1.0f / 24));
    p = fmadd(p, r, Floats(1.0f / 6));
    p = fmadd(p, r, Floats(0.5f));
    expm1_of_rest = fmadd(p * r, r, r);
  }
};

inline Vectorized<float> vexp(const Vectorized<float>& x) {
  const ExpParts parts(x);
  return fmadd(parts.half, parts.expm1_of_rest, parts.half) * Vectorized<float>(2.0f);
}
inline Vectorized<float> vexpm1(const Vectorized<float>& x) {
  const ExpParts parts(x);
  return fmadd(parts.half, parts.expm1_of_rest, parts.half - Vectorized<float>(0.5f)) * Vectorized<float>(2.0f);
}
inline Vectorized<float> vsqrt(const Vectorized<float>& x) { return x.sqrt(); }
inline Vectorized<float> vabs(const Vectorized<float>& x) { return x.abs(); }
inline Vectorized<float> vmin(const Vectorized<float>& a, const Vectorized<float>& b) { return minimum(a, b); }
inline Vectorized<float> vmax(const Vectorized<float>& a, const Vectorized<float>& b) { return maximum(a, b); }
inline Vectorized<float> vclamp(
    const Vectorized<float>& x, const Vectorized<float>& low, const Vectorized<float>& high) {
  return clamp(x, low, high);
}

} // namespace CPU_CAPABILITY
} // namespace at::vec

namespace fastppo {
namespace CPU_CAPABILITY {

using Vec = at::vec::Vectorized<float>;
constexpr int64_t kLanes = Vec::size();
static_assert(kBlock % kLanes == 0);

// One block of a row in float32, zero past its end, so that loops run over whole registers.
struct alignas(64) Block {
  float data[kBlock];

  Vec get(int64_t i) const { return Vec::loadu(data + i); }
  void set(int64_t i, const Vec& x) { x.store(data + i); }
};

// How many of the lanes from i on are inside n.
inline int64_t lanes_left(int64_t n, int64_t i) { return std::min<int64_t>(kLanes, n - i); }

inline int64_t round_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class T>
void widen(const T* source, int64_t n, float* out) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(out, source, n * sizeof(float));
    i = n;
  } else {
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      const auto [low, high] = at::vec::convert_to_float<T>(at::vec::Vectorized<T>::loadu(source + i));
      low.store(out + i);
      high.store(out + i + kLanes);
    }
    for (; i < n; ++i) {
      out[i] = static_cast<float>(source[i]);
    }
  }
}

template <class T>
void narrow(const float* source, int64_t n, T* out) {
  int64_t i = 0;
  if constexpr (std::is_same_v<T, float>) {
    std::memcpy(out, source, n * sizeof(float));
    i = n;
  } else {
    for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
      at::vec::convert_from_float<T>(Vec::loadu(source + i), Vec::loadu(source + i + kLanes)).store(out + i);
    }
    for (; i < n; ++i) {
      out[i] = static_cast<T>(source[i]);
    }
  }
}

// Columns [begin, begin + n) of a row, n <= kBlock; zeros up to a whole register.
inline void load(const Rows& rows, int64_t row, int64_t begin, int64_t n, float* out) {
  const int64_t offset = row * rows.stride + begin;
  switch (rows.dtype) {
    case DType::kFloat32:
      widen(static_cast<const float*>(rows.data) + offset, n, out);
      break;
    case DType::kBFloat16:
      widen(static_cast<const c10::BFloat16*>(rows.data) + offset, n, out);
      break;
    case DType::kFloat16:
      widen(static_cast<const c10::Half*>(rows.data) + offset, n, out);
      break;
  }
  std::fill(out + n, out + round_up(n), 0.0f);
}

// n numbers, rounded to the dtype, into out[offset, ...).
inline void store(const float* source, int64_t n, DType dtype, void* out, int64_t offset) {
  switch (dtype) {
    case DType::kFloat32:
      return narrow(source, n, static_cast<float*>(out) + offset);
    case DType::kBFloat16:
      return narrow(source, n, static_cast<c10::BFloat16*>(out) + offset);
    case DType::kFloat16:
      return narrow(source, n, static_cast<c10::Half*>(out) + offset);
  }
}

inline void load(const Rows& rows, int64_t row, int64_t begin, int64_t n, Block& out) {
  load(rows, row, begin, n, out.data);
}

// 1 where the token counts, 0 elsewhere and past the end.
inline void load_mask(const MaskRows& mask, int64_t row, int64_t begin, int64_t n, Block& out) {
  // As bytes, which compilers turn into vector code; a bool they test one by one.
  const auto* source = reinterpret_cast<const uint8_t*>(mask.row(row) + begin);
  for (int64_t i = 0; i < n; ++i) {
    out.data[i] = static_cast<float>(source[i] != 0);
  }
  std::fill(out.data + n, out.data + round_up(n), 0.0f);
}

// As load, with masked places emptied before any arithmetic sees them.
inline void load_selected(const Rows& rows, int64_t row, int64_t begin, int64_t n, const Block& mask, Block& out) {
  load(rows, row, begin, n, out);
  const Vec zero(0.0f);
  for (int64_t i = 0; i < n; i += kLanes) {
    out.set(i, select(mask.get(i) > zero, out.get(i), zero));
  }
}

// The lanes of x added up in a fixed order, in float64: halves onto halves, which takes a quarter of the time of one
// lane after the other.
inline double sum_lanes(const Vec& x) {
  float lanes[kLanes];
  x.store(lanes);
  double sums[kLanes / 2];
  for (int64_t i = 0; i < kLanes / 2; ++i) {
    sums[i] = static_cast<double>(lanes[i]) + static_cast<double>(lanes[i + kLanes / 2]);
  }
  for (int64_t half = kLanes / 4; half > 0; half /= 2) {
    for (int64_t i = 0; i < half; ++i) {
      sums[i] += sums[i + half];
    }
  }
  return sums[0];
}

} // namespace CPU_CAPABILITY
} // namespace fastppo
