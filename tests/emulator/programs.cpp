/*
Small kernels for test_emulator.py: `programs NAME` runs one. Those under "right" must run through and print "ok"; each
of the others plants one fault that the emulator, or the sanitizer it was built with, must name.
*/
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "cuda/launch.cuh"
#include "cuda/memory.cuh"
#include "cuda/reduce.cuh"

namespace fastppo::cuda {
namespace {

void require(bool condition, const char* what) {
  if (!condition) {
    std::printf("wrong result: %s\n", what);
    std::exit(1);
  }
}

// --- right
// ------------------------------------------------------------------------------------------------------------

struct Add {
  __device__ float operator()(float a, float b) const { return a + b; }
};

template <int Threads>
__global__ void block_sums(Span<const float> x, Span<float> out) {
  float sum = 0;
  for (int64_t i = blockIdx.x * int64_t{Threads} + threadIdx.x; i < x.size; i += int64_t{gridDim.x} * Threads) {
    sum += x[i];
  }
  const float first = block_reduce<Threads>(sum, Add(), 0.0f);
  const float second = block_reduce<Threads>(sum, Add(), 0.0f); // reuses the shared memory of the first
  if (threadIdx.x == 0) {
    out[blockIdx.x] = first == second ? first : NAN;
  }
}

void reductions() {
  std::vector<float> x(1000), out(3);
  std::iota(x.begin(), x.end(), 0.0f);
  FASTPPO_LAUNCH((block_sums<128>), 3, 128, 0, nullptr, Span<const float>{x.data(), 1000}, Span<float>{out.data(), 3});
  require(out[0] + out[1] + out[2] == 999 * 500, "sum");
}

// Each block's part by its thread 0, all parts by the last block to arrive.
template <bool Fenced>
__global__ void last_block_sum(Span<float> parts, unsigned* counter, Span<float> out) {
  if (threadIdx.x == 0) {
    parts[blockIdx.x] = static_cast<float>(blockIdx.x);
  }
  bool last;
  if constexpr (Fenced) {
    last = is_last_block(counter);
  } else {
    FASTPPO_SHARED(int, is_last, 1);
    if (threadIdx.x == 0) {
      is_last[0] = atomicInc(counter, gridDim.x - 1) == gridDim.x - 1;
    }
    __syncthreads();
    last = is_last[0] != 0;
  }
  if (last && threadIdx.x == 0) {
    float sum = 0;
    for (int64_t i = 0; i < parts.size; ++i) {
      sum += parts[i];
    }
    out[0] = sum;
    out[1] = static_cast<float>(blockIdx.x);
  }
}

template <bool Fenced>
void last_block() {
  std::vector<float> parts(7), out(2);
  unsigned counter = 0;
  for (int i = 0; i < 2; ++i) { // the counter is ready for the second launch
    FASTPPO_LAUNCH(
        (last_block_sum<Fenced>), 7, 64, 0, nullptr, Span<float>{parts.data(), 7}, &counter,
        Span<float>{out.data(), 2});
    require(out[0] == 21 && counter == 0, "sum of the last block");
  }
  std::printf("last block: %d\n", static_cast<int>(out[1]));
}

__global__ void warps(Span<int> out) {
  const int lane = lane_id();
  const auto put = [&](int i, int x) { out[i * 32 + lane] = x; };
  put(0, __shfl_sync(kFullMask, lane, 5));
  put(1, __shfl_sync(kFullMask, lane, 9, 8));
  put(2, __shfl_up_sync(kFullMask, lane, 3));
  put(3, __shfl_down_sync(kFullMask, lane, 3, 16));
  put(4, __shfl_xor_sync(kFullMask, lane, 16));
  put(5, static_cast<int>(__ballot_sync(kFullMask, lane % 2) == 0xaaaaaaaau));
  put(6, __any_sync(kFullMask, lane == 7) + 2 * __all_sync(kFullMask, lane < 32) + 4 * __all_sync(kFullMask, lane > 0));
  put(7, static_cast<int>(__match_any_sync(kFullMask, lane / 16)));
  // Partial masks: the halves go different ways and meet again.
  if (lane < 16) {
    put(8, __shfl_down_sync(0x0000ffffu, lane, 1, 16));
  } else {
    put(8, __shfl_up_sync(0xffff0000u, lane, 16, 16));
    __syncwarp(0xffff0000u);
  }
  __syncwarp();
  put(9, static_cast<int>(__shfl_sync(kFullMask, 0.5 * lane, 31) * 2));
}

void warp_functions() {
  std::vector<int> out(320);
  FASTPPO_LAUNCH(warps, 1, 32, 0, nullptr, Span<int>{out.data(), 320});
  for (int lane = 0; lane < 32; ++lane) {
    const int expected[] = {
        5,
        lane / 8 * 8 + 1,
        lane >= 3 ? lane - 3 : lane,
        lane % 16 + 3 < 16 ? lane + 3 : lane,
        lane ^ 16,
        1,
        3,
        lane < 16 ? 0xffff : static_cast<int>(0xffff0000u),
        lane < 15 ? lane + 1 : lane,
        31};
    for (int i = 0; i < 10; ++i) {
      require(out[i * 32 + lane] == expected[i], ("warp function " + std::to_string(i)).c_str());
    }
  }
}

__global__ void votes_and_atomics(Span<int> out, unsigned* total, unsigned long long* most) {
  FASTPPO_DYNAMIC_SHARED(int, histogram);
  const int i = static_cast<int>(threadIdx.x + threadIdx.y * blockDim.x);
  if (i < 4) {
    histogram[i] = 0;
  }
  __syncthreads();
  atomicAdd(&histogram[i % 4], 1);
  atomicMax(most, static_cast<unsigned long long>(i) << 40);
  unsigned seen = atomicAdd(total, 0u);
  for (unsigned old; (old = atomicCAS(total, seen, seen + 2)) != seen;) {
    seen = old;
  }
  __syncthreads();
  const int odd = __syncthreads_count(i % 2), any = __syncthreads_or(i == 3), all = __syncthreads_and(i < 3);
  if (i < 4 && blockIdx.x == 0) {
    out[i] = histogram[i];
  }
  if (i == 0 && blockIdx.x == 0) {
    out[4] = odd * 100 + any * 10 + all;
  }
}

void votes() {
  std::vector<int> out(5);
  unsigned total = 0;
  unsigned long long most = 0;
  FASTPPO_LAUNCH(votes_and_atomics, 2, dim3(10, 8), 16, nullptr, Span<int>{out.data(), 5}, &total, &most);
  require(out == std::vector<int>({20, 20, 20, 20, 4010}), "votes and atomics");
  require(total == 320 && most == 79ull << 40, "global atomics");
}

// Block 1 waits for block 0, whatever the order: both are in flight.
__global__ void wait_for_block_0(unsigned* flag, Span<float> x) {
  if (blockIdx.x == 0) {
    x[0] = 42;
    __threadfence();
    atomicExch(flag, 1u);
  } else {
    __threadfence();
    while (atomicAdd(flag, 0u) == 0) {
    }
    __threadfence();
    x[1] = static_cast<float>(x[0]) + 1;
  }
}

void blocks_interleave() {
  unsigned flag = 0;
  std::vector<float> x(2);
  FASTPPO_LAUNCH(wait_for_block_0, 2, 1, 0, nullptr, &flag, Span<float>{x.data(), 2});
  require(x[1] == 43, "block 1 after block 0");
}

template <class T>
__global__ void copy_rows(Span<const T> x, Span<T> out, int64_t columns) {
  float values[8];
  const int64_t first = threadIdx.x * int64_t{8};
  if (first < columns) {
    load_floats(x.part(blockIdx.x * columns, columns), first, values, -1.0f);
    store_floats(out.part(blockIdx.x * columns, columns), first, values);
  }
}

template <class T>
void copies_of() {
  for (const int64_t columns : {1, 7, 8, 13, 64}) { // rows start aligned or not, end inside a group or not
    std::vector<T> x(3 * columns), out(3 * columns);
    for (size_t i = 0; i < x.size(); ++i) {
      x[i] = from_float<T>(static_cast<float>(i) - 5);
    }
    FASTPPO_LAUNCH(
        (copy_rows<T>), 3, 8, 0, nullptr, Span<const T>{x.data(), 3 * columns}, Span<T>{out.data(), 3 * columns},
        columns);
    for (size_t i = 0; i < x.size(); ++i) {
      require(to_float(out[i]) == to_float(x[i]), "copied element");
    }
  }
}

void copies() {
  copies_of<float>();
  copies_of<__nv_bfloat16>();
  copies_of<__half>();
}

// --- faults of barriers and masks
// ---------------------------------------------------------------------------------------

__global__ void divergent_barrier() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void return_before_barrier() {
  if (threadIdx.x == 0) {
    return;
  }
  __syncthreads();
}
// The barrier and the shuffle wait for each other.
__global__ void deadlock() {
  if (lane_id() == 31) {
    __syncthreads();
  } else {
    __shfl_sync(kFullMask, 1, 0);
    __syncthreads();
  }
}
__global__ void livelock(unsigned* flag) {
  while (atomicAdd(flag, 0u) == 0) {
  }
}
__global__ void not_in_own_mask() { __shfl_sync(0x0000ffffu, 1, 0); }
__global__ void absent_lane() { __shfl_sync(kFullMask, 1, 0); }
__global__ void returned_lane() {
  if (lane_id() == 3) {
    return;
  }
  __syncwarp(kFullMask);
}
__global__ void different_masks() { __ballot_sync(lane_id() < 16 ? kFullMask : 0xffff0000u, 1); }
__global__ void shuffle_from_outside() {
  if (lane_id() < 8) {
    __shfl_sync(0xffu, 1, 8);
  }
}
__global__ void divergent_warp() {
  if (lane_id() < 16) {
    __shfl_sync(kFullMask, 1, 0);
  } else {
    __shfl_sync(kFullMask, 2, 0);
  }
}

// --- faults of memory
// -----------------------------------------------------------------------------------------------------

__global__ void uninitialised_shared(Span<float> out) {
  FASTPPO_SHARED(float, x, 32);
  if (threadIdx.x != 7) {
    x[threadIdx.x] = 1;
  }
  __syncthreads();
  out[threadIdx.x] = x[threadIdx.x ^ 1];
}
__global__ void uninitialised_dynamic() {
  FASTPPO_DYNAMIC_SHARED(int, x);
  x[0] += 1;
}
__global__ void shared_out_of_range() {
  FASTPPO_SHARED(float, x, 32);
  x[threadIdx.x + 1] = 1;
}
__global__ void dynamic_out_of_range() {
  FASTPPO_DYNAMIC_SHARED(float, x);
  x[threadIdx.x] = 1;
}
__global__ void global_out_of_range(Span<float> x) { x[threadIdx.x] = 1; }
__global__ void global_read_out_of_range(Span<const float> x, Span<float> out) {
  const float value = x[static_cast<int>(threadIdx.x) - 1];
  out[0] = value;
}
__global__ void vector_out_of_range(Span<const float> x) { load16(x, 28 + threadIdx.x * 4); }
__global__ void misaligned_vector(Span<const float> x) { load16(x, threadIdx.x); }
__global__ void misaligned_store(Span<float> x) { store16(x, 2, Vector<float>{}); }
__global__ void part_out_of_range(Span<float> x) { x.part(30, 3); }
__global__ void static_shared_too_big() {
  FASTPPO_SHARED(double, x, 6145);
  x[0] = 1;
}

// --- what only a sanitizer sees
// ---------------------------------------------------------------------------------------------

// Without the barrier, thread 0 may write again before thread 63 has read. Fibers happen to get it right.
template <bool Barrier>
__global__ void reuse_shared(Span<float> out) {
  FASTPPO_SHARED(float, x, 1);
  for (int i = 0; i < 3; ++i) {
    if (threadIdx.x == 0) {
      x[0] = static_cast<float>(i);
    }
    __syncthreads();
    if (threadIdx.x == 63) {
      out[i] = x[0];
    }
    if constexpr (Barrier) {
      __syncthreads();
    }
  }
}

// A shuffle keeps lanes together and orders no memory; __syncwarp does.
template <bool Sync>
__global__ void through_warp(Span<float> out) {
  FASTPPO_SHARED(float, x, 32);
  x[lane_id()] = static_cast<float>(lane_id());
  __shfl_sync(kFullMask, 0, 0);
  if constexpr (Sync) {
    __syncwarp();
  }
  out[lane_id()] = x[31 - lane_id()];
}

// Raw pointers have no checks of their own.
__global__ void raw_out_of_range(volatile float* x) { static_cast<void>(x[32 + threadIdx.x]); }
__global__ void raw_misaligned(char* x) { *reinterpret_cast<volatile int*>(x + 1) = 1; }

template <bool Right>
void reuse() {
  std::vector<float> out(3);
  FASTPPO_LAUNCH((reuse_shared<Right>), 1, 64, 0, nullptr, Span<float>{out.data(), 3});
}

template <bool Right>
void warp_memory() {
  std::vector<float> out(32);
  FASTPPO_LAUNCH((through_warp<Right>), 1, 32, 0, nullptr, Span<float>{out.data(), 32});
}

int run(const std::string& name) {
  std::vector<float> x(36);
  const auto offset = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x.data()) / 4 % 4);
  const Span<float> out{x.data() + (4 - offset) % 4, 32}; // aligned
  const Span<const float> in{out.data, 32};
  unsigned flag = 0;
  const auto nothing = [] {};
  const std::map<std::string, std::function<void()>> programs = {
      {"reductions", reductions},
      {"last_block", last_block<true>},
      {"warp_functions", warp_functions},
      {"votes", votes},
      {"blocks_interleave", blocks_interleave},
      {"copies", copies},
      {"reuse_shared", reuse<true>},
      {"through_warp", warp_memory<true>},

      {"divergent_barrier", [] { FASTPPO_LAUNCH(divergent_barrier, 2, 64, 0, nullptr); }},
      {"return_before_barrier", [] { FASTPPO_LAUNCH(return_before_barrier, 1, 64, 0, nullptr); }},
      {"deadlock", [] { FASTPPO_LAUNCH(deadlock, 1, 32, 0, nullptr); }},
      {"livelock", [&] { FASTPPO_LAUNCH(livelock, 1, 32, 0, nullptr, &flag); }},
      {"not_in_own_mask", [] { FASTPPO_LAUNCH(not_in_own_mask, 1, 32, 0, nullptr); }},
      {"absent_lane", [] { FASTPPO_LAUNCH(absent_lane, 1, 20, 0, nullptr); }},
      {"returned_lane", [] { FASTPPO_LAUNCH(returned_lane, 1, 32, 0, nullptr); }},
      {"different_masks", [] { FASTPPO_LAUNCH(different_masks, 1, 32, 0, nullptr); }},
      {"shuffle_from_outside", [] { FASTPPO_LAUNCH(shuffle_from_outside, 1, 32, 0, nullptr); }},
      {"divergent_warp", [] { FASTPPO_LAUNCH(divergent_warp, 1, 32, 0, nullptr); }},

      {"uninitialised_shared", [&] { FASTPPO_LAUNCH(uninitialised_shared, 1, 32, 0, nullptr, out); }},
      {"uninitialised_dynamic", [] { FASTPPO_LAUNCH(uninitialised_dynamic, 1, 1, 64, nullptr); }},
      {"shared_out_of_range", [] { FASTPPO_LAUNCH(shared_out_of_range, 3, 32, 0, nullptr); }},
      {"dynamic_out_of_range", [] { FASTPPO_LAUNCH(dynamic_out_of_range, 1, 32, 124, nullptr); }},
      {"global_out_of_range", [&] { FASTPPO_LAUNCH(global_out_of_range, 1, 33, 0, nullptr, out); }},
      {"global_read_out_of_range", [&] { FASTPPO_LAUNCH(global_read_out_of_range, 1, 1, 0, nullptr, in, out); }},
      {"vector_out_of_range", [&] { FASTPPO_LAUNCH(vector_out_of_range, 1, 2, 0, nullptr, in); }},
      {"misaligned_vector", [&] { FASTPPO_LAUNCH(misaligned_vector, 1, 2, 0, nullptr, in); }},
      {"misaligned_store", [&] { FASTPPO_LAUNCH(misaligned_store, 1, 1, 0, nullptr, out); }},
      {"part_out_of_range", [&] { FASTPPO_LAUNCH(part_out_of_range, 1, 1, 0, nullptr, out); }},
      {"static_shared_too_big", [] { FASTPPO_LAUNCH(static_shared_too_big, 1, 1, 0, nullptr); }},

      {"too_many_threads", [&] { FASTPPO_LAUNCH(livelock, 1, 1056, 0, nullptr, &flag); }},
      {"no_blocks", [&] { FASTPPO_LAUNCH(livelock, 0, 32, 0, nullptr, &flag); }},
      {"too_much_shared", [&] { FASTPPO_LAUNCH(livelock, 1, 32, (227 << 10) + 16, nullptr, &flag); }},
      {"grid_too_big", [&] { FASTPPO_LAUNCH(livelock, dim3(1, 65536), 32, 0, nullptr, &flag); }},
      {"shared_not_opted_in",
       [&] { emulator::launch({"direct", FASTPPO_HERE, 1, 32, (48 << 10) + 16, false}, nothing); }},

      {"missing_barrier", reuse<false>},
      {"missing_syncwarp", warp_memory<false>},
      {"missing_fence", last_block<false>},
      {"raw_out_of_range",
       [] {
         std::vector<float> small(32);
         FASTPPO_LAUNCH(raw_out_of_range, 1, 4, 0, nullptr, small.data());
       }},
      {"raw_misaligned",
       [] {
         alignas(4) char bytes[8] = {};
         FASTPPO_LAUNCH(raw_misaligned, 1, 1, 0, nullptr, bytes);
       }},
  };
  const auto program = programs.find(name);
  if (program == programs.end()) {
    std::printf("no program %s\n", name.c_str());
    return 2;
  }
  program->second();
  std::printf("ok\n");
  return 0;
}

} // namespace
} // namespace fastppo::cuda

int main(int count, char** arguments) {
  if (count != 3) {
    std::printf("usage: programs NAME ORDER\n");
    return 2;
  }
  fastppo::emulator::machine.order = static_cast<fastppo::emulator::Order>(std::atoi(arguments[2]));
  return fastppo::cuda::run(arguments[1]);
}
