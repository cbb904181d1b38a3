/*
CUDA's builtins for g++, on the machine of machine.h. Types and half-precision arithmetic are CUDA's own headers.

There are integer atomics and no floating-point ones: their sums depend on the order of arrival, and no kernel here may
use them. Ones that ordered memory (__threadfence, __syncthreads, __syncwarp) do so here too, and under ThreadSanitizer
nothing else does: an atomic orders memory only for a thread that has called __threadfence.
*/
#pragma once

#include <cuda_runtime_api.h>

// CUDA's own macros for a host compiler are attributes that g++ does not know, or qualify variables.
#undef __global__
#undef __device__
#undef __host__
#undef __forceinline__
#undef __launch_bounds__
#undef __shared__
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "emulator/machine.h"
#include "emulator/memory.h"

#define threadIdx (::fastppo::emulator::current().index)
#define blockIdx (::fastppo::emulator::current().block)
#define blockDim (::fastppo::emulator::current().block_size)
#define gridDim (::fastppo::emulator::current().grid_size)
constexpr int warpSize = 32;

#define FASTPPO_HERE (::fastppo::emulator::Where(__FILE__, __LINE__))

// --- barriers
// -----------------------------------------------------------------------------------------------------------
#define __syncthreads() \
  static_cast<void>(::fastppo::emulator::block_barrier(::fastppo::emulator::Barrier::kPlain, false, FASTPPO_HERE))
#define __syncthreads_or(x) \
  ::fastppo::emulator::block_barrier(::fastppo::emulator::Barrier::kOr, (x) != 0, FASTPPO_HERE)
#define __syncthreads_and(x) \
  ::fastppo::emulator::block_barrier(::fastppo::emulator::Barrier::kAnd, (x) != 0, FASTPPO_HERE)
#define __syncthreads_count(x) \
  ::fastppo::emulator::block_barrier(::fastppo::emulator::Barrier::kCount, (x) != 0, FASTPPO_HERE)

// --- warps
// --------------------------------------------------------------------------------------------------------------
namespace fastppo::emulator {

template <class T>
uint64_t to_bits(T x) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  uint64_t bits = 0;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

template <class T>
T shuffle(Where where, unsigned mask, T x, int source) {
  const uint64_t bits = warp_collective(Collective::kShuffle, mask, to_bits(x), source, where);
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

// The lane that each kind of shuffle reads from; its own where that would leave the segment of `width` lanes.
inline int lane_in_segment(int source, int width) { return (current().lane & ~(width - 1)) | (source & (width - 1)); }
inline int lane_above(unsigned delta, int width) {
  const int lane = current().lane;
  return static_cast<int>((lane & (width - 1)) + delta) < width ? lane + static_cast<int>(delta) : lane;
}
inline int lane_below(unsigned delta, int width) {
  const int lane = current().lane;
  return static_cast<int>(delta) <= (lane & (width - 1)) ? lane - static_cast<int>(delta) : lane;
}
inline int lane_across(int bits, int width) {
  const int lane = current().lane, other = lane ^ bits;
  return other / width <= lane / width ? other : lane;
}

template <class T>
T shuffle_index(Where w, unsigned mask, T x, int source, int width = 32) {
  return shuffle(w, mask, x, lane_in_segment(source, width));
}
template <class T>
T shuffle_down(Where w, unsigned mask, T x, unsigned delta, int width = 32) {
  return shuffle(w, mask, x, lane_above(delta, width));
}
template <class T>
T shuffle_up(Where w, unsigned mask, T x, unsigned delta, int width = 32) {
  return shuffle(w, mask, x, lane_below(delta, width));
}
template <class T>
T shuffle_xor(Where w, unsigned mask, T x, int bits, int width = 32) {
  return shuffle(w, mask, x, lane_across(bits, width));
}
inline unsigned ballot(Where where, unsigned mask, bool x) {
  return static_cast<unsigned>(warp_collective(Collective::kBallot, mask, x, 0, where));
}
inline void sync_warp(Where where, unsigned mask = 0xffffffffu) {
  warp_collective(Collective::kSync, mask, 0, 0, where);
}
template <class T>
unsigned match_any(Where where, unsigned mask, T x) {
  return static_cast<unsigned>(warp_collective(Collective::kMatch, mask, to_bits(x), 0, where));
}

} // namespace fastppo::emulator

#define __shfl_sync(...) ::fastppo::emulator::shuffle_index(FASTPPO_HERE, __VA_ARGS__)
#define __shfl_down_sync(...) ::fastppo::emulator::shuffle_down(FASTPPO_HERE, __VA_ARGS__)
#define __shfl_up_sync(...) ::fastppo::emulator::shuffle_up(FASTPPO_HERE, __VA_ARGS__)
#define __shfl_xor_sync(...) ::fastppo::emulator::shuffle_xor(FASTPPO_HERE, __VA_ARGS__)
#define __ballot_sync(mask, x) ::fastppo::emulator::ballot(FASTPPO_HERE, (mask), (x) != 0)
#define __any_sync(mask, x) (::fastppo::emulator::ballot(FASTPPO_HERE, (mask), (x) != 0) != 0)
#define __all_sync(mask, x) (::fastppo::emulator::ballot(FASTPPO_HERE, (mask), (x) == 0) == 0)
#define __match_any_sync(mask, x) ::fastppo::emulator::match_any(FASTPPO_HERE, (mask), (x))
#define __syncwarp(...) ::fastppo::emulator::sync_warp(FASTPPO_HERE __VA_OPT__(, ) __VA_ARGS__)

// --- atomics and fences
// ---------------------------------------------------------------------------------------------------
namespace fastppo::emulator {

template <class T>
concept AtomicInteger = std::same_as<T, int> || std::same_as<T, unsigned> || std::same_as<T, unsigned long long>;

// Replaces *place by f(*place) and returns what was there. Others go first, so that the order of arrival varies.
template <AtomicInteger T, class Function>
T atomic_update(T* place, const Function& f) {
  give_way();
  const int order = current().fenced ? __ATOMIC_ACQ_REL : __ATOMIC_RELAXED;
  T old = __atomic_load_n(place, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n(
      place, &old, f(old), false, order, order == __ATOMIC_RELAXED ? __ATOMIC_RELAXED : __ATOMIC_ACQUIRE)) {
  }
  return old;
}

template <AtomicInteger T, class Function>
T atomic_update(const SharedArray<T>& place, const Function& f) {
  if (!is_written(place.written(), sizeof(T))) {
    fail("uninitialised atomic on shared memory", {__FILE__, __LINE__});
  }
  return atomic_update(place.data(), f);
}

} // namespace fastppo::emulator

// For a place in global memory, or in shared memory, where & gives a SharedArray. The value converts as under CUDA.
#define FASTPPO_ATOMIC(name, expression)                                                      \
  template <::fastppo::emulator::AtomicInteger T>                                             \
  T name(T* place, std::type_identity_t<T> x) {                                               \
    return ::fastppo::emulator::atomic_update(place, [x](T old) -> T { return expression; }); \
  }                                                                                           \
  template <::fastppo::emulator::AtomicInteger T>                                             \
  T name(const ::fastppo::emulator::SharedArray<T>& place, std::type_identity_t<T> x) {       \
    return ::fastppo::emulator::atomic_update(place, [x](T old) -> T { return expression; }); \
  }
FASTPPO_ATOMIC(atomicAdd, old + x)
FASTPPO_ATOMIC(atomicSub, old - x)
FASTPPO_ATOMIC(atomicMax, old > x ? old : x)
FASTPPO_ATOMIC(atomicMin, old < x ? old : x)
FASTPPO_ATOMIC(atomicOr, old | x)
FASTPPO_ATOMIC(atomicAnd, old& x)
FASTPPO_ATOMIC(atomicExch, x)
#undef FASTPPO_ATOMIC

// Counts up to x and then starts again at 0: a counter that leaves itself ready for the next launch.
inline unsigned atomicInc(unsigned* place, unsigned x) {
  return ::fastppo::emulator::atomic_update(place, [x](unsigned old) { return old >= x ? 0u : old + 1; });
}
template <::fastppo::emulator::AtomicInteger T>
T atomicCAS(T* place, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  return ::fastppo::emulator::atomic_update(place, [=](T old) { return old == expected ? x : old; });
}
template <::fastppo::emulator::AtomicInteger T>
T atomicCAS(
    const ::fastppo::emulator::SharedArray<T>& place, std::type_identity_t<T> expected, std::type_identity_t<T> x) {
  return ::fastppo::emulator::atomic_update(place, [=](T old) { return old == expected ? x : old; });
}

inline void __threadfence() { ::fastppo::emulator::fence(); }
inline void __threadfence_block() { ::fastppo::emulator::fence(); }

// --- numbers
// --------------------------------------------------------------------------------------------------------------
template <class T>
T __ldg(const T* place) {
  return *place;
}
template <class T>
void __stwb(T* place, T value) {
  *place = value;
}

// The fast intrinsics are better here than on a GPU, where they are good to 2 ulp or so: tests allow for that.
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }
inline int __popc(unsigned x) { return std::popcount(x); }
inline int __popcll(unsigned long long x) { return std::popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline int __clzll(long long x) { return std::countl_zero(static_cast<unsigned long long>(x)); }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(a) * b >> 64);
}
template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
[[noreturn]] inline void __trap() { ::fastppo::emulator::fail("__trap", {__FILE__, __LINE__}); }
