/*
A CUDA device made of host threads of execution, for tests: the .cuh and .cu files of csrc/cuda, compiled by g++ instead
of nvcc, run on it. This file is the machine (blocks, warps, threads, barriers, shared memory); builtins.h dresses it up
as CUDA; memory.h has the checked arrays. csrc/cuda/device.cuh includes them where FASTPPO_EMULATED is defined.

Each CUDA thread is a fiber, so a block of 1024 costs no more than 1024 stacks. With FASTPPO_EMULATOR_THREADS each is a
std::thread instead, which is slow and lets ThreadSanitizer see the races that a fiber, never interrupted, cannot have.

Several blocks are in flight at once and take turns wherever a thread waits or uses an atomic, so "the last block to
arrive" differs between the three orders (forward, reverse, shuffled). A kernel that is right gives the same bits in
each.

What a GPU would answer with undefined results, a hang or a launch error ends the process here, with a line that names
the fault, file, line, kernel, block and thread:
  - threads of a block at different barriers, or one that returned while the others wait;
  - lanes of one mask at different places, a lane outside its own mask, a mask that names a lane that is not there, a
shuffle from a lane outside the mask;
  - a deadlock, and threads that spin on memory nobody writes;
  - a launch with no blocks or threads, more than 1024 threads, or more shared memory than there is;
  - and through memory.h: reads of shared memory nobody wrote, indices out of range, vectors that are not aligned.

Not modelled: thread-block clusters, cooperative groups, asynchronous copies, textures, warp-synchronous code without
masks, __activemask. A kernel that wants a cluster keeps it behind `#if !defined(FASTPPO_EMULATED)` with a plain path
beside it, and the plain path is what is tested here.
*/
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <source_location>
#include <string>
#include <vector>

#include <vector_types.h>

namespace fastppo::emulator {

struct Where {
  const char* file = "";
  unsigned line = 0;

  Where() = default;
  Where(const char* file, unsigned line) : file(file), line(line) {}
  Where(const std::source_location& at) : file(at.file_name()), line(at.line()) {}
  bool operator==(const Where& other) const;
};

// Prints the fault with the kernel, block and thread it happened in, and aborts.
[[noreturn]] void fail(const std::string& fault, Where where);

// What a GPU of today allows; the smallest common figures would refuse kernels that choose by asking the device.
constexpr int kMaxThreads = 1024;
constexpr int64_t kMaxStaticShared = 48 << 10;
constexpr int64_t kMaxShared = 227 << 10;

enum class Order { kForward, kReverse, kShuffled };

// Settings of the next launch and counts over all launches. Launches run one after another.
struct Machine {
  Order order = Order::kForward;
  unsigned seed = 1; // of the shuffled order
  int blocks_in_flight = 4;
  int64_t max_shared = kMaxShared; // what a kernel that asks the device is told
  int64_t launches = 0;
  int64_t bytes_loaded = 0, bytes_stored = 0; // global memory, through spans; fibers only
  bool plan = false;   // note launches instead of running them: what an op would launch, at sizes no test could run
  std::string planned; // "kernel\tblocks\tthreads\tdynamic shared bytes\n" per launch
};
extern Machine machine;

struct Block;
struct Execution; // the fiber or std::thread behind a CUDA thread

struct Thread {
  uint3 index; // threadIdx
  uint3 block; // blockIdx
  dim3 block_size, grid_size;
  int number = 0; // in its block
  int lane = 0;
  Block* home = nullptr;
  bool fenced = false; // has called __threadfence
};

Thread& current();

// --- what builtins are made of ------------------------------------------------------------------------------------

enum class Barrier { kPlain, kOr, kAnd, kCount };
int block_barrier(Barrier kind, bool predicate, Where where);

// One step that the lanes of a mask take together. `source` is the lane to read from, for shuffles.
enum class Collective { kSync, kShuffle, kBallot, kMatch };
uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int source, Where where);

// Lets other threads of execution go first: called around atomics.
void give_way();
void fence();

// The block's own instance of a __shared__ declaration. `site` is its identity: one per declaration and instantiation.
struct SharedMemory {
  std::byte* data;
  uint8_t* written; // one flag per byte
};
SharedMemory static_shared(const void* site, int64_t bytes, int64_t alignment, Where where);
SharedMemory dynamic_shared(int64_t& bytes);

struct Launch {
  const char* kernel;
  Where where;
  dim3 grid, block;
  int64_t dynamic_shared;
  bool opted_in; // to more than 48 KB of dynamic shared memory
};
void launch(const Launch& launch, const std::function<void()>& body);

} // namespace fastppo::emulator
