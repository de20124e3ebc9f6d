// What kernels use of the device that plain C++ does not have: shared memory, asynchronous copies,
// ldmatrix, mma.sync, and the launch itself. Everything else in this folder is C++ that a host compiler
// takes, too: tests/cuda_emulator includes a header of the same names before these files.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#define CTX_DEVICE __device__ __forceinline__
#define CTX_DEVICE_CALL __device__ __noinline__ inline  // much code, seldom run
#elif defined(CTX_CUDA_EMULATOR)
#define CTX_DEVICE inline
#define CTX_DEVICE_CALL inline
#else
#error "needs nvcc, or the emulator of tests/cuda_emulator"
#endif

// Loops over registers must be unrolled, or the registers become an array in memory.
#if defined(__CUDACC__)
#define CTX_UNROLL _Pragma("unroll")
#define CTX_ROLLED \
  _Pragma("unroll 1")  // where unrolling would cost more registers than it is worth
#else
#define CTX_UNROLL
#define CTX_ROLLED
#endif

namespace ctx::cuda {

// Bugs that the emulator's tests plant, to see that they find them; in any other build there are none.
enum Bug : int {
  kNoBug,
  kMissingBarrier,
  kWrongSlot,
  kWrongClock,
  kWrongSplitBorder,
  kUnmaskedEmptySplit,
  kSwappedScale
};
#if defined(CTX_PLANTED_BUGS)
inline int planted_bug = kNoBug;
#define CTX_PLANTED(bug) (::ctx::cuda::planted_bug == ::ctx::cuda::bug)
#else
#define CTX_PLANTED(bug) false
#endif

#if defined(__CUDACC__)

CTX_DEVICE char* shared_memory() {
  extern __shared__ __align__(128) char ctx_shared_bytes[];
  return ctx_shared_bytes;
}

// Copies `filled` of kBytes bytes and makes the rest zero; complete when its group was waited for.
template <int kBytes>
CTX_DEVICE void copy_async(void* to, const void* from, int filled = kBytes) {
  const auto place = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  if constexpr (kBytes == 16) {
    asm volatile(
        "cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(place), "l"(from), "r"(filled)
        : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;\n" ::"r"(place),
                 "l"(from),
                 "n"(kBytes),
                 "r"(filled)
                 : "memory");
  }
}
CTX_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }
// All groups of this thread but the last kLeft are complete.
template <int kLeft>
CTX_DEVICE void wait_copies() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kLeft) : "memory");
}

// Four 8 x 8 matrices of 16-bit numbers out of shared memory: lanes 8 i ... 8 i + 7 give the rows of
// matrix i; lane l gets elements 2 (l % 4), + 1 of row l / 4 of each (kTransposed: of column l / 4).
template <bool kTransposed>
CTX_DEVICE void load_matrices(uint32_t (&to)[4], const void* row) {
  const auto place = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (kTransposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(place)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];\n"
                 : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                 : "r"(place)
                 : "memory");
  }
}

// d [16, 8] += a [16, 16] b [16, 8] with float32 sums; T: what the 16-bit numbers are.
template <typename T>
CTX_DEVICE void multiply_tile(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (T::kBrain) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, "
        "{%8,%9}, {%0,%1,%2,%3};\n"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("ctx: ") + what + ": " + cudaGetErrorString(status));
}

// Queues kernel(args) on a stream; an empty grid queues nothing.
template <typename Args>
void launch(void (*kernel)(Args),
            dim3 grid,
            unsigned threads,
            size_t shared,
            cudaStream_t stream,
            const Args& args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  if (shared > 48 * 1024) {
    check(cudaFuncSetAttribute(
              kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared)),
          "shared memory of a kernel");
  }
  kernel<<<grid, threads, shared, stream>>>(args);
  check(cudaGetLastError(), "launch of a kernel");
}

#else

template <typename Args>
void launch(void (*kernel)(Args),
            dim3 grid,
            unsigned threads,
            size_t shared,
            cudaStream_t,
            const Args& args) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
  emulator::run(grid, threads, shared, [&] { kernel(args); });
}

#endif

// A grid's second and third size are at most 65535: what may be larger comes first.
inline dim3 grid_of(int64_t x, int64_t y = 1, int64_t z = 1) {
  if (x > 0x7fffffff || y > 65535 || z > 65535)
    throw std::runtime_error("ctx: a call must be smaller: its grid would be " + std::to_string(x) +
                             " x " + std::to_string(y) + " x " + std::to_string(z));
  return dim3(static_cast<unsigned>(x), static_cast<unsigned>(y), static_cast<unsigned>(z));
}

}  // namespace ctx::cuda
