// One sound kernel, and one for each fault that test_static.py must see. Never launched.
#include "cuda/memory.cuh"

namespace fastppo::cuda {

constexpr int kThreads = 256;
using Bf16 = __nv_bfloat16;

__device__ __forceinline__ float exp2_of(float x) {
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
}

// out = 2^x over a row, four vectors a thread and turn, all loads before the first use.
template <class Work>
__device__ __forceinline__ void for_row(const Span<const Bf16>& row, const Span<Bf16>& out, const Work& work) {
  constexpr int kStep = kThreads * 8;
  for (int64_t first = threadIdx.x * 8; first + 3 * kStep + 8 <= row.size; first += 4 * kStep) {
    Vector<Bf16> x[4];
#pragma unroll
    for (int v = 0; v < 4; ++v) {
      x[v] = load16(row, first + v * kStep);
    }
#pragma unroll
    for (int v = 0; v < 4; ++v) {
#pragma unroll
      for (Bf16& one : x[v].data) {
        one = from_float<Bf16>(work(to_float(one)));
      }
      store16(out, first + v * kStep, x[v]);
    }
  }
}

extern "C" {

__global__ void __launch_bounds__(kThreads, 4) sound(const Span<const Bf16> row, const Span<Bf16> out) {
  for_row(row, out, [](float x) { return exp2_of(x); });
}

// More live values than 1024 threads have registers for.
__global__ void __launch_bounds__(1024) spills(const float* x, float* out) {
  float held[128];
#pragma unroll
  for (int i = 0; i < 128; ++i) {
    held[i] = x[threadIdx.x + i * 1024];
  }
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 128; ++i) {
    out[threadIdx.x + i * 1024] = held[i] * held[(i * 37 + 11) % 128];
  }
}

// An array in registers cannot be indexed by what is known only at run time.
__global__ void __launch_bounds__(kThreads) indexes_registers(const float* x, float* out, const int* places) {
  float held[32];
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    held[i] = x[threadIdx.x + i * kThreads];
  }
#pragma unroll 1
  for (int i = 0; i < 100; ++i) {
    held[places[i] & 31] += held[places[i + 1] & 31];
  }
  out[threadIdx.x] = held[places[0] & 31];
}

__global__ void __launch_bounds__(kThreads) loads_one_by_one(const Span<const Bf16> row, float* out) {
  float sum = 0;
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < row.size; i += kThreads) {
    sum += to_float(row[i]);
  }
  out[threadIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) stores_one_by_one(const Span<const Bf16> row, const Span<float> out) {
#pragma unroll 1
  for (int64_t i = threadIdx.x * 8; i + 8 <= row.size; i += kThreads * 8) {
    const auto x = load16(row, i);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      out[i + j * 3] = to_float(x.data[j]);
    }
  }
}

__global__ void __launch_bounds__(kThreads, 4) too_many_exponentials(const Span<const Bf16> row, float* out) {
  float sum = 0;
  for (int64_t i = threadIdx.x * 8; i + 8 <= row.size; i += kThreads * 8) {
    const auto x = load16(row, i);
#pragma unroll
    for (const Bf16& one : x.data) {
      sum += exp2_of(exp2_of(exp2_of(to_float(one))));
    }
  }
  out[threadIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads, 4) too_many_instructions(const Span<const Bf16> row, float* out) {
  float sum = 0;
  for (int64_t i = threadIdx.x * 8; i + 8 <= row.size; i += kThreads * 8) {
    const auto x = load16(row, i);
#pragma unroll
    for (const Bf16& one : x.data) {
      float y = to_float(one);
#pragma unroll
      for (int k = 0; k < 16; ++k) {
        y = y * y + 0.5f;
      }
      sum += y;
    }
  }
  out[threadIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads) integers_beyond_memory(const Span<const unsigned> row, unsigned* out) {
  unsigned sum = 0;
  for (int64_t i = threadIdx.x * 4; i + 4 <= row.size; i += kThreads * 4) {
    const auto x = load16(row, i);
#pragma unroll
    for (unsigned y : x.data) {
#pragma unroll
      for (int k = 0; k < 24; ++k) {
        y = (y >> 3 ^ y << 7) + (y & 0x55555555u);
      }
      sum ^= y;
    }
  }
  out[threadIdx.x] = sum;
}

// Five blocks of two warps: each takes a sixth of a multiprocessor's shared memory.
__global__ void __launch_bounds__(64) few_threads(const Span<const Bf16> row, const Span<Bf16> out) {
  __shared__ float held[40 << 8];
  for (int i = threadIdx.x; i < 40 << 8; i += 64) {
    held[i] = static_cast<float>(i);
  }
  __syncthreads();
  for_row(row, out, [&](float x) { return x + held[static_cast<int>(x) & 0xff]; });
}

// One vector a thread, and few threads.
__global__ void __launch_bounds__(128) little_under_way(const Span<const Bf16> row, float* out) {
  __shared__ float held[40 << 8];
  for (int i = threadIdx.x; i < 40 << 8; i += 128) {
    held[i] = static_cast<float>(i);
  }
  __syncthreads();
  float sum = 0;
#pragma unroll 1
  for (int64_t i = threadIdx.x * 8; i + 8 <= row.size; i += 128 * 8) {
    const auto x = load16(row, i);
#pragma unroll
    for (const Bf16& one : x.data) {
      sum += held[static_cast<int>(to_float(one)) & 0xff];
    }
  }
  out[threadIdx.x] = sum;
}

__global__ void no_bounds(const Span<const Bf16> row, const Span<Bf16> out) {
  for_row(row, out, [](float x) { return exp2_of(x); });
}

} // extern "C"

} // namespace fastppo::cuda
