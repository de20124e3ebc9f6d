// Fibers: what the emulator runs a CUDA thread as. On x86-64 a switch saves the six registers that a
// call preserves; elsewhere it is swapcontext, which also asks the kernel for a signal mask and is
// some hundred times slower.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <new>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
extern "C" void ctx_emulator_switch(void** from, void* to);
asm(R"(
.text
.weak ctx_emulator_switch
.type ctx_emulator_switch, @function
ctx_emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#include <ucontext.h>
#endif

namespace ctx::emulator {

inline constexpr size_t kStackBytes = size_t{256} << 10;

// Memory of one stack; pages are the system's until they are touched.
inline char* new_stack() {
  void* memory =
      mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  return static_cast<char*>(memory);
}

class Fiber {
 public:
  // The entry must not return: it ends in leave().
  void start(char* stack, void (*entry)()) {
    stack_ = stack;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStackBytes);  // a fiber before may not have ended
#endif
#if defined(__x86_64__)
    auto top = reinterpret_cast<uintptr_t>(stack + kStackBytes) & ~uintptr_t{15};
    auto* slots = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 6; ++i) slots[i] = nullptr;
    slots[6] = reinterpret_cast<void*>(entry);  // where `ret` goes; the stack is then aligned as
    slots[7] = nullptr;                         // behind a call
    here_ = slots;
#else
    getcontext(&here_);
    here_.uc_stack.ss_sp = stack;
    here_.uc_stack.ss_size = kStackBytes;
    here_.uc_link = nullptr;
    makecontext(&here_, entry, 0);
#endif
  }

  // Called by the scheduler: runs the fiber until it leaves.
  void enter() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, stack_, kStackBytes);
    swap(back_, here_);
    __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#else
    swap(back_, here_);
#endif
  }

  // Called by the fiber: back to the scheduler.
  void leave() {
#if defined(__SANITIZE_ADDRESS__)
    void* fake = nullptr;
    __sanitizer_start_switch_fiber(&fake, scheduler_stack_, scheduler_bytes_);
    swap(here_, back_);
    __sanitizer_finish_switch_fiber(fake, &scheduler_stack_, &scheduler_bytes_);
#else
    swap(here_, back_);
#endif
  }

  // The first thing that a fiber does.
  void entered() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &scheduler_stack_, &scheduler_bytes_);
#endif
  }

 private:
#if defined(__x86_64__)
  using Context = void*;
  static void swap(Context& from, Context& to) { ctx_emulator_switch(&from, to); }
#else
  using Context = ucontext_t;
  static void swap(Context& from, Context& to) { swapcontext(&from, &to); }
#endif

  Context here_{};
  Context back_{};
  char* stack_ = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_bytes_ = 0;
#endif
};

}  // namespace ctx::emulator
