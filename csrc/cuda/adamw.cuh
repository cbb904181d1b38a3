/*
One AdamW step, element by element, in place: csrc/adamw.h has the formula and the rounding by chance.
param, residual: n elements of 2 bytes each; grad: float32, bfloat16 or float16; moments: bfloat16 or float32. All of
them contiguous; 18 bytes move per weight where grad and moments are bfloat16.
A thread takes kAdamwGroup neighbouring elements of every tensor, 16 or 32 bytes of each, and steps over the grid. The
dtypes are chosen at run time: the memory leaves the arithmetic idle. One launch.

Compiled without fused multiply-adds (CMakeLists.txt), as the CPU's loop is: divisions and square roots are rounded
correctly on both, so every instruction set and every device gives the same bits.
*/
#pragma once

#include "csrc/adamw.h"
#include "cuda/memory.cuh"

namespace fastppo::cuda {

constexpr int kAdamwThreads = 256;
constexpr int kAdamwGroup = 8;
constexpr int64_t kAdamwBlocks = 1 << 16; // at most

// A moment: n elements, bfloat16 where `half` has them, else float32.
struct Moment {
  Span<uint16_t> half;
  Span<float> full;
};

struct AdamwArgs {
  Span<uint16_t> param;
  Span<int16_t> residual;
  Rows grad; // one row
  Moment exp_avg, exp_avg_sq;
  AdamwSettings settings; // but for grad_scale
  double grad_scale;
  Number grad_scale_number; // multiplies it
};

// Elements [first, first + kAdamwGroup) as they lie; past the end 0 is read and nothing written.
template <class T>
__device__ __forceinline__ void load_group(const Span<T>& x, int64_t first, T (&out)[kAdamwGroup]) {
  constexpr int kPer = kPerVector<T>;
  if (is_aligned(x.data) && first + kAdamwGroup <= x.size) {
#pragma unroll
    for (int v = 0; v < kAdamwGroup / kPer; ++v) {
      const Vector<T> vector = load16(x, first + v * kPer);
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        out[v * kPer + i] = vector.data[i];
      }
    }
  } else {
#pragma unroll
    for (int i = 0; i < kAdamwGroup; ++i) {
      out[i] = 0;
      if (first + i < x.size) {
        out[i] = x[first + i];
      }
    }
  }
}

template <class T>
__device__ __forceinline__ void store_group(const Span<T>& x, int64_t first, const T (&in)[kAdamwGroup]) {
  constexpr int kPer = kPerVector<T>;
  if (is_aligned(x.data) && first + kAdamwGroup <= x.size) {
#pragma unroll
    for (int v = 0; v < kAdamwGroup / kPer; ++v) {
      Vector<T> vector;
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        vector.data[i] = in[v * kPer + i];
      }
      store16(x, first + v * kPer, vector);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kAdamwGroup; ++i) {
      if (first + i < x.size) {
        x[first + i] = in[i];
      }
    }
  }
}

__device__ __forceinline__ void load_moment(const Moment& moment, int64_t first, float (&out)[kAdamwGroup]) {
  if (!moment.half) {
    return load_group(moment.full, first, out);
  }
  uint16_t bits[kAdamwGroup];
  load_group(moment.half, first, bits);
#pragma unroll
  for (int i = 0; i < kAdamwGroup; ++i) {
    out[i] = __uint_as_float(static_cast<uint32_t>(bits[i]) << 16);
  }
}

// The noise of an element is its hash, shifted right.
__device__ __forceinline__ void store_moment(
    const Moment& moment, int64_t first, const float (&x)[kAdamwGroup], const uint32_t (&hash)[kAdamwGroup],
    int shift) {
  if (!moment.half) {
    return store_group(moment.full, first, x);
  }
  uint16_t bits[kAdamwGroup];
#pragma unroll
  for (int i = 0; i < kAdamwGroup; ++i) {
    bits[i] = round_by_chance(x[i], hash[i] >> shift & 0xffffu);
  }
  store_group(moment.half, first, bits);
}

__global__ void __launch_bounds__(kAdamwThreads, 3) adamw_kernel(const AdamwArgs args) {
  AdamwSettings settings = args.settings;
  settings.grad_scale = static_cast<float>(args.grad_scale * args.grad_scale_number.value());
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kAdamwThreads;
  for (int64_t group = blockIdx.x * int64_t{kAdamwThreads} + threadIdx.x; group * kAdamwGroup < args.param.size;
       group += threads) {
    const int64_t first = group * kAdamwGroup;
    uint16_t param[kAdamwGroup];
    int16_t residual[kAdamwGroup];
    float grad[kAdamwGroup], exp_avg[kAdamwGroup], exp_avg_sq[kAdamwGroup];
    uint32_t hash[kAdamwGroup];
    load_group(args.param, first, param);
    load_group(args.residual, first, residual);
    load_floats(args.grad, 0, first, grad);
    load_moment(args.exp_avg, first, exp_avg);
    load_moment(args.exp_avg_sq, first, exp_avg_sq);
#pragma unroll
    for (int i = 0; i < kAdamwGroup; ++i) {
      const float master = join_master(param[i], residual[i]);
      split_master(adamw_update(master, grad[i], exp_avg[i], exp_avg_sq[i], settings), param[i], residual[i]);
      hash[i] = rounding_bits(settings.step, static_cast<uint32_t>(first + i));
    }
    store_group(args.param, first, param);
    store_group(args.residual, first, residual);
    store_moment(args.exp_avg, first, exp_avg, hash, 0);
    store_moment(args.exp_avg_sq, first, exp_avg_sq, hash, 16);
  }
}

} // namespace fastppo::cuda
