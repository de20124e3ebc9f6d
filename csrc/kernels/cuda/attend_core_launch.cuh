// Launches of the plain attention kernel.
#pragma once

#include "kernels/cuda/attend_core.cuh"

namespace ctx::cuda {

template <typename T, int R>
void launch_core_rows(const Attention& a, cudaStream_t stream) {
  CoreLaunch l{};
  l.a = a;
  l.tiling = RowTiling::of(a, R);
  for (int p = 0; p < a.parts; ++p) {
    const int64_t key = CoreLayout(row_bytes(a.part[p].storage, a.head_dim)).stride;
    const int64_t value = CoreLayout(row_bytes(a.part[p].storage, a.value_dim)).stride;
    l.key_stride = key > l.key_stride ? key : l.key_stride;
    l.value_stride = value > l.value_stride ? value : l.value_stride;
  }
  constexpr int64_t kMost = 200 * 1024;
  l.stages = 2;
  if (CoreRoom(l, R, sizeof(Acc<T>)).all > kMost) l.stages = 1;
  const int64_t shared = CoreRoom(l, R, sizeof(Acc<T>)).all;
  constexpr int64_t kColumns = 16 / static_cast<int64_t>(sizeof(T)) * kCoreThreads;
  if (shared > kMost || a.value_dim > kColumns)
    throw std::runtime_error(
        "ctx: attention on CUDA: head_dim and value_dim must be smaller, got " +
        std::to_string(a.head_dim) + " and " + std::to_string(a.value_dim));
  launch(&attend_core<T, R>,
         grid_of(l.tiling.tiles(a), a.kv_heads * a.batch, a.splits),
         kCoreThreads,
         shared,
         stream,
         l);
}

template <typename T>
void launch_core_type(const Attention& a, cudaStream_t stream) {
  const int64_t rows = a.q_per_kv() * a.tokens;
  if (rows <= 1) return launch_core_rows<T, 1>(a, stream);
  if (rows <= 2) return launch_core_rows<T, 2>(a, stream);
  if (rows <= 4) return launch_core_rows<T, 4>(a, stream);
  launch_core_rows<T, 8>(a, stream);
}

}  // namespace ctx::cuda
