// From the storage type of a memory to the template that handles it, and how much work is worth a
// thread.
#pragma once

#include "kernels/cpu/vec.h"
#include "ops/kernels.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

template <typename F>
inline void dispatch(Storage storage, F&& run) {
  switch (storage) {
    case Storage::kFloat32:
      return run(float{});
    case Storage::kFloat64:
      return run(double{});
    case Storage::kBFloat16:
      return run(c10::BFloat16{});
    case Storage::kFloat16:
      return run(c10::Half{});
    case Storage::kInt8:  // slots.h
      return;
  }
}

// Tasks per thread so that a thread gets at least some ten microseconds of multiply-adds.
inline int64_t grain(int64_t operations_per_task) {
  return std::max<int64_t>(1, 65536 / std::max<int64_t>(1, operations_per_task));
}

template <typename T>
inline T* row(const Strided& tensor, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(tensor.data) + b * tensor.batch + h * tensor.head + t * tensor.token;
}

// Row `index` of head h in a contiguous ring [B, Hkv, capacity, width].
template <typename T>
inline T* ring_row(void* ring,
                   int64_t kv_heads,
                   int64_t capacity,
                   int64_t width,
                   int64_t b,
                   int64_t h,
                   int64_t index) {
  return static_cast<T*>(ring) + ((b * kv_heads + h) * capacity + index) * width;
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
