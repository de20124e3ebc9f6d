// CUDA's execution model on the host: grids, blocks, threads as fibers, shared memory, barriers, warp
// shuffles and votes, so that kernels compile with a C++ compiler and run without a GPU.
//
// A thread runs until it meets a barrier or a warp-wide operation. Which of the threads that may run
// goes first is a setting (ascending, descending, random per seed), as is the order of blocks: a
// missing barrier then gives another result in one of the orders, or reads shared memory that is not
// written yet, which holds 0xff (NaN in every floating type). Errors that are found as such:
//   - a barrier that some threads wait at while others wait at another one, or have ended;
//   - a warp-wide operation whose mask names lanes that never come, or that come with another mask;
//   - a shuffle from a lane outside the mask; a launch whose sizes a device would refuse.
// Dynamic shared memory has exactly the size asked for, so that an ASan build finds what is beyond.
// Asynchronous copies take place when they are waited for, and not before (intrinsics_host.h).
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <source_location>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fiber.h"

#define CTX_CUDA_EMULATOR 1
#define __global__ inline
#define __device__
#define __host__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static __attribute__((section("ctx_shared")))

// Bounds of all `__shared__` variables, where a program has any.
extern "C" char __start_ctx_shared[] __attribute__((weak));
extern "C" char __stop_ctx_shared[] __attribute__((weak));

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

namespace ctx::emulator {

enum class Order { kAscending, kDescending, kRandom };
struct Settings {
  Order order = Order::kAscending;
  uint64_t seed = 0;
};
inline Settings settings;

// Bytes that asynchronous copies read.
inline int64_t copied_bytes = 0;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

using Site = std::source_location;
inline std::string name_of(const Site& site) {
  return std::string(site.file_name()) + ":" + std::to_string(site.line());
}
inline bool same(const Site& a, const Site& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         std::strcmp(a.file_name(), b.file_name()) == 0;
}

struct Copy {
  void* to;
  const void* from;
  int bytes;
  int filled;  // of `bytes`; the rest is zero
};

struct Thread {
  enum class State : uint8_t { kReady, kAtBlock, kAtWarp, kDone };
  Fiber fiber;
  State state = State::kReady;
  dim3 index;
  unsigned linear = 0;
  Site site;
  unsigned mask = 0;
  void* operand = nullptr;
  std::vector<Copy> open;                 // copies of no group yet
  std::vector<std::vector<Copy>> groups;  // committed and not waited for, oldest first
};

class Machine {
 public:
  void launch(const dim3& grid,
              const dim3& block,
              size_t shared,
              void (*run)(const void*),
              const void* what) {
    check_sizes(grid, block, shared);
    grid_ = grid, block_ = block, run_ = run, what_ = what;
    random_.seed(settings.seed);
    std::vector<uint64_t> order(uint64_t{grid.x} * grid.y * grid.z);
    for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
    put_in_order(order);
    char* memory = nullptr;
    if (posix_memalign(reinterpret_cast<void**>(&memory), 128, std::max<size_t>(shared, 1)) != 0)
      throw std::bad_alloc();
    shared_ = memory;
    const auto free_memory = [&] { std::free(memory), shared_ = nullptr; };
    try {
      for (const uint64_t i : order) {
        block_index_ = dim3(static_cast<unsigned>(i % grid.x),
                            static_cast<unsigned>(i / grid.x % grid.y),
                            static_cast<unsigned>(i / grid.x / grid.y));
        std::memset(memory, 0xff, std::max<size_t>(shared, 1));
        if (&__start_ctx_shared[0] != &__stop_ctx_shared[0])
          std::memset(__start_ctx_shared, 0xff, __stop_ctx_shared - __start_ctx_shared);
        run_block();
      }
    } catch (...) {
      free_memory();
      throw;
    }
    free_memory();
  }

  Thread& current() { return *current_; }
  const dim3& block_index() const { return block_index_; }
  const dim3& block_size() const { return block_; }
  const dim3& grid_size() const { return grid_; }
  char* shared() const { return shared_; }

  // All threads of the block; `operand` is an int, and becomes the sum of those of all threads.
  void block_barrier(int* operand, const Site& site) {
    Thread& me = *current_;
    me.operand = operand, me.site = site;
    me.state = Thread::State::kAtBlock;
    me.fiber.leave();
  }

  // The lanes of `mask`: the last one to come calls complete(operands of 32 lanes, null where
  // outside the mask) for all of them.
  template <typename F>
  void warp_operation(unsigned mask, void* operand, const Site& site, const F& complete) {
    Thread& me = *current_;
    const unsigned warp = me.linear / 32 * 32;
    if ((mask >> (me.linear % 32) & 1) == 0)
      throw Error(name_of(site) + ": a lane that is not in its own mask");
    me.operand = operand, me.site = site, me.mask = mask;
    me.state = Thread::State::kAtWarp;
    void* operands[32] = {nullptr};
    for (unsigned lane = 0; lane < 32; ++lane) {
      if ((mask >> lane & 1) == 0) continue;
      if (warp + lane >= threads_.size())
        throw Error(name_of(site) + ": the mask names lanes that the block does not have");
      Thread& other = threads_[warp + lane];
      if (other.state != Thread::State::kAtWarp) return me.fiber.leave();
      if (!same(other.site, site)) return me.fiber.leave();  // it never comes: no progress
      if (other.mask != mask)
        throw Error(name_of(site) + ": lanes of a warp come with different masks");
      operands[lane] = other.operand;
    }
    complete(operands);
    for (unsigned lane = 0; lane < 32; ++lane)
      if (operands[lane] != nullptr) threads_[warp + lane].state = Thread::State::kReady;
  }

 private:
  static void check_sizes(const dim3& grid, const dim3& block, size_t shared) {
    const uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024) throw Error("a block must have 1 to 1024 threads");
    if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
        grid.z > 65535)
      throw Error("a grid's sizes must be positive and at most 2^31 - 1, 65535, 65535");
    if (shared > 227 * 1024) throw Error("a block must ask for at most 227 KiB of shared memory");
  }

  template <typename T>
  void put_in_order(std::vector<T>& items) {
    if (settings.order == Order::kDescending) std::reverse(items.begin(), items.end());
    if (settings.order == Order::kRandom) std::shuffle(items.begin(), items.end(), random_);
  }

  static Machine*& running() {
    static Machine* machine = nullptr;
    return machine;
  }

  static void entry() {
    Machine& machine = *running();
    Thread& me = *machine.current_;
    me.fiber.entered();
    try {
      machine.run_(machine.what_);
    } catch (...) {
      machine.failure_ = std::current_exception();
    }
    me.state = Thread::State::kDone;
    me.fiber.leave();
  }

  void run_block() {
    running() = this;
    const unsigned count = block_.x * block_.y * block_.z;
    while (stacks_.size() < count) stacks_.push_back(new_stack());
    threads_.clear();
    threads_.resize(count);
    order_.resize(count);
    for (unsigned i = 0; i < count; ++i) {
      threads_[i].linear = i;
      threads_[i].index = dim3(i % block_.x, i / block_.x % block_.y, i / block_.x / block_.y);
      threads_[i].fiber.start(stacks_[i], &Machine::entry);
      order_[i] = i;
    }
    put_in_order(order_);
    while (!pass()) {
    }
  }

  // Lets every thread that may go run as far as it comes; true once all have ended.
  bool pass() {
    const bool random = settings.order == Order::kRandom;
    if (random) put_in_order(order_);
    bool any = false;
    unsigned done = 0, waiting = 0;
    for (const unsigned i : order_) {
      Thread& thread = threads_[i];
      if (thread.state != Thread::State::kReady) continue;
      any = true;
      if (random && random_() % 4 == 0) continue;  // later
      current_ = &thread;
      thread.fiber.enter();
      if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
    }
    for (const Thread& thread : threads_) {
      done += thread.state == Thread::State::kDone;
      waiting += thread.state == Thread::State::kAtBlock;
    }
    if (done == threads_.size()) return true;
    if (waiting == threads_.size()) {
      release_block();
    } else if (!any) {
      throw Error(stuck());
    }
    return false;
  }

  void release_block() {
    int sum = 0;
    for (const Thread& thread : threads_) {
      if (!same(thread.site, threads_[0].site))
        throw Error("divergent barrier: threads wait at " + name_of(thread.site) + " and at " +
                    name_of(threads_[0].site));
      sum += *static_cast<int*>(thread.operand);
    }
    for (Thread& thread : threads_) {
      *static_cast<int*>(thread.operand) = sum;
      thread.state = Thread::State::kReady;
    }
  }

  std::string stuck() const {
    std::string said = "divergent barrier: no thread can go on;";
    for (const auto state :
         {Thread::State::kAtBlock, Thread::State::kAtWarp, Thread::State::kDone}) {
      int count = 0;
      const Thread* one = nullptr;
      for (const Thread& thread : threads_)
        if (thread.state == state) ++count, one = &thread;
      if (count == 0) continue;
      said += " " + std::to_string(count);
      said += state == Thread::State::kDone
                  ? " have ended"
                  : (state == Thread::State::kAtBlock ? " wait for the block at "
                                                      : " wait for their warp at ") +
                        name_of(one->site);
    }
    return said;
  }

  dim3 grid_, block_, block_index_;
  void (*run_)(const void*) = nullptr;
  const void* what_ = nullptr;
  char* shared_ = nullptr;
  std::vector<Thread> threads_;
  std::vector<unsigned> order_;
  std::vector<char*> stacks_;
  Thread* current_ = nullptr;
  std::exception_ptr failure_;
  std::mt19937_64 random_;
};

inline Machine& machine() {
  static Machine one;
  return one;
}

// Runs kernel(args...) for every thread of the grid, and returns when all have ended.
template <typename Kernel>
void run(const dim3& grid, const dim3& block, size_t shared, const Kernel& kernel) {
  machine().launch(
      grid, block, shared, [](const void* k) { (*static_cast<const Kernel*>(k))(); }, &kernel);
}

}  // namespace ctx::emulator

#include "intrinsics_host.h"
