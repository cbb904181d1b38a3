/*
How rows of float32, bfloat16 and float16 get in and out of registers as float32, 16 bytes at a time.

  load16(span, i), store16(span, i, vector)   16 bytes; the address must be aligned
  load_floats<N>(row, first, out, fill)       N elements of a row as floats, `fill` past its end
  store_floats<N>(row, first, x)              the other way; places past the end are left alone
  Rows                                        a tensor of one of the three dtypes, any distance between rows
  Number                                      a number that may lie on the device, where no host waits for it

Which thread takes which elements never depends on how a row is aligned: a row that does not start on 16 bytes is read
one element at a time by the same threads. So sums are the same bits wherever a row lies.
*/
#pragma once

#include "cuda/device.cuh"
#include "numeric.h"

namespace fastppo::cuda {

enum class DType : int8_t { kFloat32, kBFloat16, kFloat16 };

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    return __float2bfloat16_rn(x);
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(x);
  } else {
    return x;
  }
}

template <class T>
constexpr int kPerVector = static_cast<int>(16 / sizeof(T));

template <class T>
struct alignas(16) Vector {
  T data[kPerVector<T>];
};

__device__ __forceinline__ bool is_aligned(const void* address, int bytes = 16) {
  return reinterpret_cast<uintptr_t>(address) % bytes == 0;
}

template <class T>
__device__ __forceinline__ Vector<std::remove_const_t<T>> load16(const Span<T>& x, int64_t i) {
  using Element = std::remove_const_t<T>;
  FASTPPO_ASSERT(i >= 0 && i + kPerVector<Element> <= x.size, "16-byte load out of range");
  FASTPPO_ASSERT(is_aligned(x.data + i), "misaligned 16-byte load");
#if defined(FASTPPO_EMULATED)
  emulator::count_load(16);
#endif
  const auto* place = reinterpret_cast<const uint4*>(x.data + i);
  uint4 bits;
  if constexpr (std::is_const_v<T>) {
    bits = __ldg(place);
  } else {
    bits = *place;
  }
  Vector<Element> out;
  memcpy(&out, &bits, 16);
  return out;
}

template <class T>
__device__ __forceinline__ void store16(const Span<T>& x, int64_t i, const Vector<T>& vector) {
  FASTPPO_ASSERT(i >= 0 && i + kPerVector<T> <= x.size, "16-byte store out of range");
  FASTPPO_ASSERT(is_aligned(x.data + i), "misaligned 16-byte store");
#if defined(FASTPPO_EMULATED)
  emulator::count_store(16);
#endif
  uint4 bits;
  memcpy(&bits, &vector, 16);
  // Not an assignment: nvcc takes that apart into four floats and does not always put them together again.
  __stwb(reinterpret_cast<uint4*>(x.data + i), bits);
}

template <int N, class T>
__device__ __forceinline__ void load_floats(const Span<T>& row, int64_t first, float (&out)[N], float fill) {
  constexpr int kPer = kPerVector<std::remove_const_t<T>>;
  static_assert(N % kPer == 0, "whole vectors");
  if (is_aligned(row.data) && first + N <= row.size) {
#pragma unroll
    for (int v = 0; v < N / kPer; ++v) {
      const auto vector = load16(row, first + v * kPer);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        out[v * kPer + i] = to_float(vector.data[i]);
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = first + i < row.size ? to_float(row[first + i]) : fill;
    }
  }
}

template <int N, class T>
__device__ __forceinline__ void store_floats(const Span<T>& row, int64_t first, const float (&x)[N]) {
  constexpr int kPer = kPerVector<T>;
  static_assert(N % kPer == 0, "whole vectors");
  if (is_aligned(row.data) && first + N <= row.size) {
#pragma unroll
    for (int v = 0; v < N / kPer; ++v) {
      Vector<T> vector;
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        vector.data[i] = from_float<T>(x[v * kPer + i]);
      }
      store16(row, first + v * kPer, vector);
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (first + i < row.size) {
        row[first + i] = from_float<T>(x[i]);
      }
    }
  }
}

// Where the dtype is not worth an instantiation: ops that take several tensors, each of any dtype, a few bytes per
// token. The choice is the same for all threads, so it costs a branch and no divergence.
struct Rows {
  const void* data = nullptr; // null: an optional tensor that was not given
  int64_t rows = 0, columns = 0, stride = 0;
  DType dtype = DType::kFloat32;

  template <class T>
  __device__ __forceinline__ Span<const T> row(int64_t r) const {
    FASTPPO_ASSERT(r >= 0 && r < rows, "row out of range");
    return {static_cast<const T*>(data) + r * stride, columns};
  }

  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
};

template <int N>
__device__ __forceinline__ void load_floats(
    const Rows& x, int64_t row, int64_t first, float (&out)[N], float fill = 0) {
  switch (x.dtype) {
    case DType::kBFloat16:
      return load_floats<N>(x.row<__nv_bfloat16>(row), first, out, fill);
    case DType::kFloat16:
      return load_floats<N>(x.row<__half>(row), first, out, fill);
    default: // not another case, or the compiler prepares for none of them
      return load_floats<N>(x.row<float>(row), first, out, fill);
  }
}

__device__ __forceinline__ float load_float(const Rows& x, int64_t row, int64_t column) {
  switch (x.dtype) {
    case DType::kBFloat16:
      return to_float(x.row<__nv_bfloat16>(row)[column]);
    case DType::kFloat16:
      return to_float(x.row<__half>(row)[column]);
    default:
      return x.row<float>(row)[column];
  }
}

enum class NumberType : int8_t { kGiven, kFloat, kDouble, kLong };

struct Number {
  const void* data = nullptr;
  NumberType type = NumberType::kGiven;
  double given = 0; // the number itself, where it is not on the device

  __device__ __forceinline__ double value() const {
    switch (type) {
      case NumberType::kFloat:
        return Span<const float>{static_cast<const float*>(data), 1}[0];
      case NumberType::kDouble:
        return Span<const double>{static_cast<const double*>(data), 1}[0];
      case NumberType::kLong:
        return static_cast<double>(Span<const int64_t>{static_cast<const int64_t*>(data), 1}[0]);
      default:
        return given;
    }
  }
};

struct MaskRows {
  const bool* data = nullptr;
  int64_t rows = 0, columns = 0, stride = 0;
};

__device__ __forceinline__ bool mask_at(const MaskRows& mask, int64_t row, int64_t column) {
  FASTPPO_ASSERT(row >= 0 && row < mask.rows, "row out of range");
  return Span<const bool>{mask.data + row * mask.stride, mask.columns}[column];
}

// N places of a mask; false past the end of the row.
template <int N>
__device__ __forceinline__ void load_mask(const MaskRows& mask, int64_t row, int64_t first, bool (&out)[N]) {
  static_assert(N == 8, "one 8-byte load");
  FASTPPO_ASSERT(row >= 0 && row < mask.rows, "row out of range");
  const Span<const bool> places{mask.data + row * mask.stride, mask.columns};
  if (is_aligned(places.data, 8) && first + N <= places.size) {
#if defined(FASTPPO_EMULATED)
    emulator::count_load(8);
#endif
    const uint2 bits = __ldg(reinterpret_cast<const uint2*>(places.data + first));
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = ((i < 4 ? bits.x : bits.y) >> (i % 4 * 8) & 0xff) != 0;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      out[i] = first + i < places.size && places[first + i];
    }
  }
}

} // namespace fastppo::cuda
