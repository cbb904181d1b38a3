/*
The one way to start a kernel:

  FASTPPO_LAUNCH((kernel<T, 256>), grid, block, dynamic_shared_bytes, stream, arguments...);

Arguments convert to the kernel's parameters. Dynamic shared memory beyond CUDA's 48 KB is opted into here; how much
there is, ask device_facts(). A launch that CUDA refuses throws; the emulator aborts. Nothing waits for the device, so a
launch can be captured into a CUDA graph.
*/
#pragma once

#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

#include "cuda/device.cuh"

namespace fastppo::cuda {

struct DeviceFacts {
  int multiprocessors;
  int64_t max_shared; // bytes a block may have
};

#if defined(FASTPPO_EMULATED)

using Stream = void*;

inline DeviceFacts device_facts() { return {4, emulator::machine.max_shared}; }

template <class... Parameters, class... Arguments>
void launch(
    const char* name, emulator::Where where, void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared,
    Stream, Arguments&&... arguments) {
  const std::tuple<Parameters...> values(std::forward<Arguments>(arguments)...);
  emulator::launch({name, where, grid, block, shared, /*opted_in=*/true}, [&] { std::apply(kernel, values); });
}

#define FASTPPO_LAUNCH(kernel, ...) ::fastppo::cuda::launch(#kernel, FASTPPO_HERE, kernel, __VA_ARGS__)

#else

using Stream = cudaStream_t;

inline void check_cuda(cudaError_t status, const char* what) {
  if (status != cudaSuccess) {
    cudaGetLastError(); // forget it: the next call's check must not find this one's error
    throw std::runtime_error(std::string("fastppo: ") + what + ": " + cudaGetErrorString(status));
  }
}

// Of the current device.
inline DeviceFacts device_facts() {
  int device = 0, multiprocessors = 0, shared = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  check_cuda(
      cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
  return {multiprocessors, shared};
}

template <class... Parameters, class... Arguments>
void launch(
    const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared, Stream stream,
    Arguments&&... arguments) {
  if (shared > 32 << 10) { // 48 KB need no opting in, but the kernel's static shared memory counts towards them
    check_cuda(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)), name);
  }
  // Not kernel<<<...>>>(...), which clang-format takes apart.
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared);
  config.stream = stream;
  check_cuda(cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...), name);
}

#define FASTPPO_LAUNCH(kernel, ...) ::fastppo::cuda::launch(#kernel, kernel, __VA_ARGS__)

#endif

} // namespace fastppo::cuda
