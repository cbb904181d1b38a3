/*
The scheduler of machine.h. Barriers and warp collectives are written once; what differs between fibers and threads is
only how a thread waits, and that is at the end of the file.
*/
#include "emulator/machine.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <random>
#include <sstream>

#if defined(FASTPPO_EMULATOR_THREADS)
#include <chrono>
#include <condition_variable>
#include <thread>
#elif !defined(__x86_64__) || defined(FASTPPO_EMULATOR_UCONTEXT)
#define FASTPPO_UCONTEXT 1 // a system call per switch, but on every processor
#include <ucontext.h>
#else
#define FASTPPO_UCONTEXT 0
#endif

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#define FASTPPO_ASAN 1
#else
#define FASTPPO_ASAN 0
#endif

#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" {
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
void AnnotateIgnoreSyncBegin(const char*, int);
void AnnotateIgnoreSyncEnd(const char*, int);
}
#endif

namespace fastppo::emulator {

Machine machine;

bool Where::operator==(const Where& other) const { return line == other.line && std::strcmp(file, other.file) == 0; }

namespace {

#if defined(FASTPPO_EMULATOR_THREADS)
thread_local Thread* running = nullptr;
#else
Thread* running = nullptr;
#endif
const Launch* launching = nullptr;

std::string text(const uint3& v) {
  std::ostringstream out;
  out << '(' << v.x << ", " << v.y << ", " << v.z << ')';
  return out.str();
}

struct Lane {
  bool returned = false, waiting = false;
  Collective kind;
  unsigned mask;
  Where where;
  uint64_t value, result;
  int source;
  unsigned generation = 0;
  char order_points[2];
};

struct Site {
  const void* site;
  int64_t offset;
};

} // namespace

struct Execution {
  Thread thread;
  bool returned = false;
  const unsigned* watched = nullptr; // waits until this differs from `seen`
  unsigned seen = 0;
  Where waits_at;
#if !defined(FASTPPO_EMULATOR_THREADS)
  void* stack = nullptr;
#if !FASTPPO_UCONTEXT
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
#if FASTPPO_ASAN
  void* fake_stack = nullptr;
#endif
#endif
};

struct Block {
  std::vector<Execution> threads;
  std::vector<Lane> lanes; // by thread number
  int alive = 0;

  // the barrier
  int arrived = 0, yes = 0;
  unsigned generation = 0;
  int result = 0;
  char order_points[2];
  Barrier kind;
  Where barrier_at;

  // shared memory: dynamic first, then each static declaration as it is met
  std::vector<std::byte> memory;
  std::vector<uint8_t> written;
  std::vector<Site> sites;
  int64_t used = 0, used_by_static = 0;

#if defined(FASTPPO_EMULATOR_THREADS)
  std::mutex mutex;
  std::condition_variable barrier_passed;
  std::unique_ptr<std::condition_variable[]> warp_moved; // one per warp: waking a block for each shuffle takes minutes
#endif
};

Thread& current() { return *running; }

void fail(const std::string& fault, Where where) {
  std::ostringstream out;
  out << "cuda emulator: " << fault << "\n  at " << where.file << ':' << where.line;
  if (launching != nullptr) {
    out << "\n  kernel " << launching->kernel << " launched at " << launching->where.file << ':'
        << launching->where.line;
  }
  if (running != nullptr) {
    out << "\n  block " << text(running->block) << " thread " << text(running->index);
  }
  std::fprintf(stderr, "%s\n", out.str().c_str());
  std::fflush(stderr);
  std::abort();
}

namespace {

Execution& execution() { return running->home->threads[running->number]; }

#if defined(FASTPPO_EMULATOR_THREADS)

/*
The lock around a block's state. ThreadSanitizer must not see it: it would order everything that passes through, and a
shuffle, which on a GPU orders no memory, would hide a race. What a barrier does order is said by order_memory().
*/
struct Unseen {
#if defined(__SANITIZE_THREAD__)
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
    AnnotateIgnoreSyncBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreSyncEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
  }
  Unseen(const Unseen&) = delete;
#endif
};
struct Guard : Unseen, std::unique_lock<std::mutex> {
  explicit Guard(Block& block) : std::unique_lock<std::mutex>(block.mutex) {}
};
Guard guard(Block& block) { return Guard(block); }
void wake(std::condition_variable& waiting) { waiting.notify_all(); }
std::condition_variable& at_barrier(Block& block) { return block.barrier_passed; }
std::condition_variable& in_warp(Block& block) { return block.warp_moved[running->number / 32]; }

// Long enough for ThreadSanitizer on a loaded machine, short enough for a test of it.
std::chrono::seconds patience() {
  const char* seconds = std::getenv("FASTPPO_EMULATOR_PATIENCE");
  return std::chrono::seconds(seconds != nullptr ? std::atoi(seconds) : 60);
}

void wait_for_change(Guard& guard, std::condition_variable& change, const unsigned& generation, Where where) {
  const unsigned seen = generation;
  if (!change.wait_for(guard, patience(), [&] { return generation != seen; })) {
    fail("deadlock: this thread waits for others that never come", where);
  }
}

#else

struct Guard {};
Guard guard(Block&) { return {}; }
struct Anyone {}; // whom to wake: the scheduler looks at all
void wake(Anyone) {}
Anyone at_barrier(Block&) { return {}; }
Anyone in_warp(Block&) { return {}; }
int64_t progress = 0; // barriers passed, threads ended: anything but spinning

void back_to_scheduler();

void wait_for_change(Guard&, Anyone, const unsigned& generation, Where where) {
  Execution& self = execution();
  self.watched = &generation;
  self.seen = generation;
  self.waits_at = where;
  back_to_scheduler();
}

#endif

} // namespace

namespace {

// Runs a meeting of threads so that what each wrote before, all see after. Two points take turns: a thread that is
// already on its way to the next meeting must not seem to have ordered itself before the stragglers of this one.
template <class Meeting>
auto order_memory([[maybe_unused]] char (&points)[2], [[maybe_unused]] unsigned generation, const Meeting& meeting) {
#if defined(__SANITIZE_THREAD__)
  char* point = &points[generation % 2];
  __tsan_release(point);
  const auto result = meeting();
  __tsan_acquire(point);
  return result;
#else
  return meeting();
#endif
}

int meet_at_barrier(Barrier kind, bool predicate, Where where) {
  Block& block = *running->home;
  Guard held = guard(block);
  if (block.alive != static_cast<int>(block.threads.size())) {
    fail("divergent barrier: other threads of the block have returned", where);
  }
  if (block.arrived == 0) {
    block.kind = kind;
    block.barrier_at = where;
    block.yes = 0;
  } else if (block.kind != kind || !(block.barrier_at == where)) {
    fail(
        "divergent barrier: other threads of the block wait at " + std::string(block.barrier_at.file) + ':' +
            std::to_string(block.barrier_at.line),
        where);
  }
  block.yes += predicate;
  if (++block.arrived < static_cast<int>(block.threads.size())) {
    wait_for_change(held, at_barrier(block), block.generation, where);
    return block.result;
  }
  block.result = kind == Barrier::kCount ? block.yes
                 : kind == Barrier::kOr  ? block.yes > 0
                                         : block.yes == block.arrived;
  block.arrived = 0;
  ++block.generation;
#if !defined(FASTPPO_EMULATOR_THREADS)
  ++progress;
#endif
  wake(at_barrier(block));
  return block.result;
}

uint64_t meet_in_warp(Collective kind, unsigned mask, uint64_t value, int source, Where where) {
  Block& block = *running->home;
  Guard held = guard(block);
  const int first = running->number - running->lane;
  const auto lane = [&](int i) -> Lane& { return block.lanes[first + i]; };
  Lane& self = lane(running->lane);

  if ((mask >> running->lane & 1) == 0) {
    fail("partial mask: the calling lane is not in its own mask", where);
  }
  for (int i = 0; i < 32; ++i) {
    const bool named = mask >> i & 1;
    const bool exists = first + i < static_cast<int>(block.lanes.size());
    if (named && (!exists || lane(i).returned)) {
      fail(
          "partial mask: it names lane " + std::to_string(i) +
              (exists ? ", which has returned" : ", which is not there"),
          where);
    }
    // A lane may wait with another mask that overlaps this one: when that meeting is over it can still come here.
    if (!exists || !lane(i).waiting || lane(i).mask != mask) {
      continue;
    }
    if (lane(i).kind != kind || !(lane(i).where == where)) {
      fail(
          "divergent warp: lane " + std::to_string(i) + " waits at " + lane(i).where.file + ':' +
              std::to_string(lane(i).where.line),
          where);
    }
  }
  if (kind == Collective::kShuffle && (mask >> source & 1) == 0) {
    fail("partial mask: a shuffle reads from lane " + std::to_string(source) + ", which is outside the mask", where);
  }

  self.waiting = true;
  self.kind = kind;
  self.mask = mask;
  self.where = where;
  self.value = value;
  self.source = source;
  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) && !(lane(i).waiting && lane(i).mask == mask)) {
      wait_for_change(held, in_warp(block), self.generation, where);
      return self.result;
    }
  }

  for (int i = 0; i < 32; ++i) {
    if ((mask >> i & 1) == 0) {
      continue;
    }
    uint64_t result = 0;
    if (kind == Collective::kShuffle) {
      result = lane(lane(i).source).value;
    } else if (kind != Collective::kSync) {
      for (int j = 0; j < 32; ++j) {
        const bool yes =
            (mask >> j & 1) && (kind == Collective::kBallot ? lane(j).value != 0 : lane(j).value == lane(i).value);
        result |= static_cast<uint64_t>(yes) << j;
      }
    }
    lane(i).result = result;
  }
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) {
      lane(i).waiting = false;
      ++lane(i).generation;
    }
  }
#if !defined(FASTPPO_EMULATOR_THREADS)
  ++progress;
#endif
  wake(in_warp(block));
  return self.result;
}

} // namespace

int block_barrier(Barrier kind, bool predicate, Where where) {
  Block& block = *running->home;
  return order_memory(block.order_points, block.generation, [&] { return meet_at_barrier(kind, predicate, where); });
}

uint64_t warp_collective(Collective kind, unsigned mask, uint64_t value, int source, Where where) {
  const auto meeting = [&] { return meet_in_warp(kind, mask, value, source, where); };
  if (kind != Collective::kSync || mask == 0) {
    return meeting(); // on a GPU too, only __syncwarp orders memory
  }
  const int first_of_mask = running->number - running->lane + __builtin_ctz(mask);
  Block& block = *running->home;
  if (first_of_mask >= static_cast<int>(block.lanes.size())) {
    return meeting(); // which says what is wrong with this mask
  }
  Lane& first = block.lanes[first_of_mask];
  return order_memory(first.order_points, first.generation, meeting);
}

// --- shared memory --------------------------------------------------------------------------------------------------

SharedMemory static_shared(const void* site, int64_t bytes, int64_t alignment, Where where) {
  Block& block = *running->home;
  [[maybe_unused]] const Guard held = guard(block);
  for (const Site& known : block.sites) {
    if (known.site == site) {
      return {block.memory.data() + known.offset, block.written.data() + known.offset};
    }
  }
  const int64_t offset = (block.used + alignment - 1) / alignment * alignment;
  block.used_by_static += bytes;
  block.used = offset + bytes;
  if (block.used_by_static > kMaxStaticShared) {
    fail("static shared memory over 48 KB: " + std::to_string(block.used_by_static) + " bytes", where);
  }
  if (block.used > kMaxShared) {
    fail("shared memory over 227 KB: " + std::to_string(block.used) + " bytes, dynamic and static", where);
  }
  // All ones are NaN in every floating-point type, so that what slips past the flags is still seen in the results.
  std::fill_n(block.memory.begin() + offset, bytes, std::byte{0xff});
  std::fill_n(block.written.begin() + offset, bytes, uint8_t{0});
  block.sites.push_back({site, offset});
  return {block.memory.data() + offset, block.written.data() + offset};
}

SharedMemory dynamic_shared(int64_t& bytes) {
  bytes = launching->dynamic_shared;
  return {running->home->memory.data(), running->home->written.data()};
}

// --- blocks
// -----------------------------------------------------------------------------------------------------------

namespace {

void prepare(Block& block, const Launch& launch, uint64_t number) {
  const dim3 size = launch.block, grid = launch.grid;
  const auto threads = static_cast<size_t>(size.x) * size.y * size.z;
  block.threads = std::vector<Execution>(threads);
  block.lanes.assign(threads, {});
#if defined(FASTPPO_EMULATOR_THREADS)
  block.warp_moved = std::make_unique<std::condition_variable[]>((threads + 31) / 32);
#endif
  block.alive = static_cast<int>(threads);
  block.arrived = 0;
  block.memory.resize(kMaxShared);
  block.written.resize(kMaxShared);
  block.sites.clear();
  block.used = launch.dynamic_shared;
  block.used_by_static = 0;
  std::fill_n(block.memory.begin(), launch.dynamic_shared, std::byte{0xff});
  std::fill_n(block.written.begin(), launch.dynamic_shared, uint8_t{0});
  for (unsigned i = 0; i < threads; ++i) {
    Thread& thread = block.threads[i].thread;
    thread.index = {i % size.x, i / size.x % size.y, i / (size.x * size.y)};
    thread.block = {
        static_cast<unsigned>(number % grid.x), static_cast<unsigned>(number / grid.x % grid.y),
        static_cast<unsigned>(number / grid.x / grid.y)};
    thread.block_size = size;
    thread.grid_size = grid;
    thread.number = static_cast<int>(i);
    thread.lane = static_cast<int>(i % 32);
    thread.home = &block;
  }
}

void thread_returns() {
  Block& block = *running->home;
  [[maybe_unused]] const Guard held = guard(block);
  block.lanes[running->number].returned = true;
  --block.alive;
  if (block.arrived > 0) {
    fail("divergent barrier: this thread returned while others of its block wait here", block.barrier_at);
  }
  const int first = running->number - running->lane;
  for (int i = first; i < std::min<int>(first + 32, static_cast<int>(block.lanes.size())); ++i) {
    if (block.lanes[i].waiting && (block.lanes[i].mask >> running->lane & 1)) {
      fail(
          "partial mask: this lane returned while lane " + std::to_string(i - first) + " waits for it",
          block.lanes[i].where);
    }
  }
}

void check_launch(const Launch& launch) {
  const auto threads = static_cast<uint64_t>(launch.block.x) * launch.block.y * launch.block.z;
  const dim3 g = launch.grid;
  if (threads == 0 || g.x == 0 || g.y == 0 || g.z == 0) {
    fail("a launch needs at least one block and one thread", launch.where);
  }
  if (threads > kMaxThreads || launch.block.z > 64) {
    fail("a block of " + std::to_string(threads) + " threads: at most 1024, at most 64 in z", launch.where);
  }
  if (g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) {
    fail("a grid may have 2^31 - 1 blocks in x and 65535 in y and z", launch.where);
  }
  if (launch.dynamic_shared > kMaxStaticShared && !launch.opted_in) {
    fail("over 48 KB of dynamic shared memory without opting in", launch.where);
  }
  if (launch.dynamic_shared < 0 || launch.dynamic_shared > kMaxShared) {
    fail("shared memory over 227 KB: " + std::to_string(launch.dynamic_shared) + " bytes", launch.where);
  }
}

std::vector<uint64_t> order_of_blocks(const Launch& launch, std::mt19937& random) {
  std::vector<uint64_t> blocks(static_cast<uint64_t>(launch.grid.x) * launch.grid.y * launch.grid.z);
  for (size_t i = 0; i < blocks.size(); ++i) {
    blocks[i] = machine.order == Order::kReverse ? blocks.size() - 1 - i : i;
  }
  if (machine.order == Order::kShuffled) {
    std::shuffle(blocks.begin(), blocks.end(), random);
  }
  return blocks;
}

// Blocks keep their memory for the next launch: allocating 454 KB per block would be most of a small launch.
std::vector<std::unique_ptr<Block>> spare_blocks;

std::unique_ptr<Block> take_block() {
  if (spare_blocks.empty()) {
    return std::make_unique<Block>();
  }
  std::unique_ptr<Block> block = std::move(spare_blocks.back());
  spare_blocks.pop_back();
  return block;
}

} // namespace

// --- fibers
// -----------------------------------------------------------------------------------------------------------

#if !defined(FASTPPO_EMULATOR_THREADS)

namespace {

constexpr size_t kStack = FASTPPO_ASAN ? 256 << 10 : 64 << 10;
constexpr int64_t kPatience = 200000; // rounds of all threads without a barrier passed or a thread ended

const std::function<void()>* kernel_body = nullptr;

// Stacks, each above a page that may not be touched: an overflow stops instead of writing into its neighbour.
class Stacks {
 public:
  void* take() {
    if (spare_.empty()) {
      const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
      void* base =
          mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (base == MAP_FAILED || mprotect(base, page, PROT_NONE) != 0) {
        fail("no memory for another thread's stack", {__FILE__, __LINE__});
      }
      spare_.push_back(static_cast<char*>(base) + page);
    }
    void* stack = spare_.back();
    spare_.pop_back();
    return stack;
  }
  void give(void* stack) { spare_.push_back(stack); }

 private:
  std::vector<void*> spare_;
} stacks;

#if !FASTPPO_UCONTEXT
// Saves what a call must preserve, and the stack pointer in *save; goes on where `to` was saved.
extern "C" void fastppo_emulator_switch(void** save, void* to);
asm(R"(
.text
.local fastppo_emulator_switch
.type fastppo_emulator_switch, @function
fastppo_emulator_switch:
  push %rbp
  push %rbx
  push %r12
  push %r13
  push %r14
  push %r15
  mov %rsp, (%rdi)
  mov %rsi, %rsp
  pop %r15
  pop %r14
  pop %r13
  pop %r12
  pop %rbx
  pop %rbp
  ret
.size fastppo_emulator_switch, .-fastppo_emulator_switch
)");
void* scheduler_stack = nullptr;
#else
ucontext_t scheduler_context;
#endif

#if FASTPPO_ASAN
const void* scheduler_bottom = nullptr;
size_t scheduler_size = 0;
void* scheduler_fake = nullptr;
#endif

void back_to_scheduler() {
  Execution& self = execution();
#if FASTPPO_ASAN
  __sanitizer_start_switch_fiber(self.returned ? nullptr : &self.fake_stack, scheduler_bottom, scheduler_size);
#endif
#if !FASTPPO_UCONTEXT
  fastppo_emulator_switch(&self.stack_pointer, scheduler_stack);
#else
  swapcontext(&self.context, &scheduler_context);
#endif
#if FASTPPO_ASAN
  __sanitizer_finish_switch_fiber(self.fake_stack, nullptr, nullptr);
#endif
}

void fiber_main() {
#if FASTPPO_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &scheduler_bottom, &scheduler_size);
#endif
  (*kernel_body)();
  thread_returns();
  ++progress;
  execution().returned = true;
  back_to_scheduler();
  std::abort(); // nobody resumes a thread that returned
}

void start(Execution& fiber) {
  fiber.stack = stacks.take();
#if !FASTPPO_UCONTEXT
  // As if fiber_main had been interrupted at its first instruction: its address where `ret` looks, six registers below.
  // After the `ret`, the stack pointer is 8 off a multiple of 16, as after a call.
  auto** top = reinterpret_cast<void**>(static_cast<char*>(fiber.stack) + kStack);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&fiber_main);
  for (int i = 0; i < 6; ++i) {
    *--top = nullptr;
  }
  fiber.stack_pointer = top;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, fiber_main, 0);
#endif
}

void resume(Execution& fiber) {
  running = &fiber.thread;
#if FASTPPO_ASAN
  __sanitizer_start_switch_fiber(&scheduler_fake, fiber.stack, kStack);
#endif
#if !FASTPPO_UCONTEXT
  fastppo_emulator_switch(&scheduler_stack, fiber.stack_pointer);
#else
  swapcontext(&scheduler_context, &fiber.context);
#endif
#if FASTPPO_ASAN
  __sanitizer_finish_switch_fiber(scheduler_fake, nullptr, nullptr);
#endif
  running = nullptr;
}

void run(const Launch& launch, const std::function<void()>& body) {
  kernel_body = &body;
  progress = 0;
  std::mt19937 random(machine.seed);
  const std::vector<uint64_t> waiting = order_of_blocks(launch, random);
  size_t next = 0;
  std::vector<std::unique_ptr<Block>> in_flight;
  std::vector<Execution*> fibers;
  int64_t last_progress = -1, idle_rounds = 0;
  while (true) {
    const size_t before = in_flight.size();
    for (auto it = in_flight.begin(); it != in_flight.end();) {
      if ((*it)->alive == 0) {
        for (Execution& fiber : (*it)->threads) {
          stacks.give(fiber.stack);
        }
        spare_blocks.push_back(std::move(*it));
        it = in_flight.erase(it);
      } else {
        ++it;
      }
    }
    const bool ended = in_flight.size() != before;
    bool started = false;
    while (in_flight.size() < static_cast<size_t>(std::max(1, machine.blocks_in_flight)) && next < waiting.size()) {
      in_flight.push_back(take_block());
      prepare(*in_flight.back(), launch, waiting[next++]);
      for (Execution& fiber : in_flight.back()->threads) {
        start(fiber);
      }
      started = true;
    }
    if (in_flight.empty()) {
      return;
    }
    if (ended || started) {
      fibers.clear();
      for (const auto& block : in_flight) {
        for (Execution& fiber : block->threads) {
          fibers.push_back(&fiber);
        }
        if (machine.order == Order::kReverse) {
          std::reverse(fibers.end() - static_cast<std::ptrdiff_t>(block->threads.size()), fibers.end());
        }
      }
    }
    if (machine.order == Order::kShuffled) {
      std::shuffle(fibers.begin(), fibers.end(), random);
    }
    bool moved = false;
    for (Execution* fiber : fibers) {
      if (fiber->returned || (fiber->watched != nullptr && *fiber->watched == fiber->seen)) {
        continue;
      }
      fiber->watched = nullptr;
      moved = true;
      resume(*fiber);
    }
    if (!moved) {
      for (Execution* fiber : fibers) {
        if (!fiber->returned) {
          running = &fiber->thread;
          fail("deadlock: this thread waits for others that never come", fiber->waits_at);
        }
      }
    }
    idle_rounds = progress == last_progress ? idle_rounds + 1 : 0;
    last_progress = progress;
    if (idle_rounds > kPatience) {
      fail("livelock: threads spin on memory that nobody writes", launch.where);
    }
  }
}

} // namespace

void give_way() { back_to_scheduler(); }

void fence() { running->fenced = true; }

#else

// --- threads
// ----------------------------------------------------------------------------------------------------------

namespace {

void run(const Launch& launch, const std::function<void()>& body) {
  std::mt19937 random(machine.seed);
  const std::vector<uint64_t> waiting = order_of_blocks(launch, random);
  const auto batch = static_cast<size_t>(std::max(1, machine.blocks_in_flight));
  for (size_t begin = 0; begin < waiting.size(); begin += batch) {
    std::vector<std::unique_ptr<Block>> blocks;
    for (size_t i = begin; i < std::min(begin + batch, waiting.size()); ++i) {
      blocks.push_back(take_block());
      prepare(*blocks.back(), launch, waiting[i]);
    }
    std::vector<std::thread> threads;
    for (const auto& block : blocks) {
      for (Execution& execution : block->threads) {
        threads.emplace_back([&body, &execution] {
          running = &execution.thread;
          body();
          thread_returns();
        });
      }
    }
    for (std::thread& thread : threads) {
      thread.join();
    }
    for (auto& block : blocks) {
      spare_blocks.push_back(std::move(block));
    }
  }
}

} // namespace

void give_way() { std::this_thread::yield(); }

void fence() { running->fenced = true; }

#endif

void launch(const Launch& launch, const std::function<void()>& body) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> held(one_at_a_time);
  launching = &launch;
  check_launch(launch);
  ++machine.launches;
  if (machine.plan) {
    const auto count = [](dim3 d) { return std::to_string(int64_t{d.x} * d.y * d.z); };
    machine.planned += launch.kernel + ('\t' + count(launch.grid)) + '\t' + count(launch.block) + '\t' +
                       std::to_string(launch.dynamic_shared) + '\n';
  } else {
    run(launch, body);
  }
  launching = nullptr;
}

} // namespace fastppo::emulator

// --- from Python, through ctypes
// ----------------------------------------------------------------------------------------

#define FASTPPO_EXPORT extern "C" __attribute__((visibility("default")))

FASTPPO_EXPORT void fastppo_emulator_set(int order, unsigned seed, int blocks_in_flight, int64_t max_shared) {
  auto& machine = fastppo::emulator::machine;
  machine.order = static_cast<fastppo::emulator::Order>(order);
  machine.seed = seed;
  machine.blocks_in_flight = blocks_in_flight;
  machine.max_shared = max_shared;
}

// counts: launches, bytes loaded from and stored to global memory through spans, since the last reset.
FASTPPO_EXPORT void fastppo_emulator_counts(int64_t* counts, bool reset) {
  auto& machine = fastppo::emulator::machine;
  counts[0] = machine.launches;
  counts[1] = machine.bytes_loaded;
  counts[2] = machine.bytes_stored;
  if (reset) {
    machine.launches = machine.bytes_loaded = machine.bytes_stored = 0;
  }
}

// From now on launches are noted and not run, or run again; what was noted before is forgotten.
FASTPPO_EXPORT void fastppo_emulator_plan(bool on) {
  fastppo::emulator::machine.plan = on;
  fastppo::emulator::machine.planned.clear();
}

FASTPPO_EXPORT const char* fastppo_emulator_planned() { return fastppo::emulator::machine.planned.c_str(); }
