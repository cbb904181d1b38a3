/*
What every kernel file includes: the CUDA builtins, or the emulator's where FASTPPO_EMULATED is defined, and the few
wrappers that both compilers accept. Under nvcc each is the plain thing; under the emulator it is checked.

  FASTPPO_SHARED(T, name, n)          a __shared__ array of n elements; `name` is a Shared<T>
  FASTPPO_DYNAMIC_SHARED(T, name)     the launch's dynamic shared memory; 16-byte aligned
  Shared<T>                           T*, to pass shared memory to a function; shared_as<U>(name) reinterprets it
  Span<T>                             global memory and its length; span[i], span.part(begin, size)
  FASTPPO_ASSERT(condition, "text")   for the emulator's eyes only; nothing under nvcc
  kFullMask, lane_id(), warp_id()     of a one-dimensional block

Write the type of what is read (`const float x = span[i]`): under the emulator `auto` would hold a reference object.
Shared types must be trivially copyable and are read and written whole.
*/
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(FASTPPO_EMULATED)
#include "emulator/builtins.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

namespace fastppo::cuda {

#if defined(FASTPPO_EMULATED)

using Index = emulator::Index;
template <class T>
using Shared = emulator::SharedArray<T>;
template <class U, class T>
Shared<U> shared_as(const Shared<T>& x) {
  return x.template as<U>();
}
template <class T>
Shared<T> dynamic_shared() {
  int64_t bytes = 0;
  const emulator::SharedMemory memory = emulator::dynamic_shared(bytes);
  return {memory, bytes / static_cast<int64_t>(sizeof(T))};
}

#define FASTPPO_ASSERT(condition, text) \
  ((condition) ? static_cast<void>(0) : ::fastppo::emulator::fail(text, FASTPPO_HERE))
// The address of the static is the declaration's identity, one per instantiation, as under CUDA.
#define FASTPPO_SHARED(T, name, n)                                                                               \
  static const char name##_site = 0;                                                                             \
  const ::fastppo::cuda::Shared<T> name(                                                                         \
      ::fastppo::emulator::static_shared(                                                                        \
          &name##_site, static_cast<int64_t>(sizeof(T)) * (n), alignof(T) < 16 ? 16 : alignof(T), FASTPPO_HERE), \
      (n))
#define FASTPPO_DYNAMIC_SHARED(T, name) const ::fastppo::cuda::Shared<T> name = ::fastppo::cuda::dynamic_shared<T>()

#else

using Index = int64_t;
template <class T>
using Shared = T*;
template <class U, class T>
__device__ __forceinline__ U* shared_as(T* x) {
  return reinterpret_cast<U*>(x);
}

#define FASTPPO_ASSERT(condition, text) static_cast<void>(0)
// As bytes, because CUDA refuses __shared__ objects of types with default member values.
#define FASTPPO_SHARED(T, name, n)                                      \
  __shared__ __align__(16) unsigned char name##_bytes[sizeof(T) * (n)]; \
  T* const name = reinterpret_cast<T*>(name##_bytes)
#define FASTPPO_DYNAMIC_SHARED(T, name)                                   \
  extern __shared__ __align__(16) unsigned char fastppo_dynamic_shared[]; \
  T* const name = reinterpret_cast<T*>(fastppo_dynamic_shared)

#endif

constexpr unsigned kFullMask = 0xffffffffu;

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) & 31; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) >> 5; }

// Span<const T> is memory that no thread of the launch writes (16-byte loads go through the read-only path);
// memory that the launch itself writes is a Span<T>, also where it is read.
template <class T>
struct Span {
  T* data = nullptr;
  int64_t size = 0;

#if defined(FASTPPO_EMULATED)
  auto operator[](Index i) const {
    if (i.value < 0 || i.value >= size) {
      emulator::fail_index("global memory", i.value, size, i.where);
    }
    if constexpr (std::is_const_v<T>) {
      emulator::count_load(sizeof(T));
      return static_cast<std::remove_const_t<T>>(data[i.value]);
    } else {
      return emulator::GlobalRef<T>(data + i.value);
    }
  }
#else
  __device__ __forceinline__ T& operator[](int64_t i) const { return data[i]; }
#endif

  __device__ __forceinline__ Span part(int64_t begin, int64_t length) const {
    FASTPPO_ASSERT(begin >= 0 && length >= 0 && begin + length <= size, "part of a span out of range");
    return {data + begin, length};
  }

  __device__ __forceinline__ explicit operator bool() const { return data != nullptr; }
};

} // namespace fastppo::cuda
