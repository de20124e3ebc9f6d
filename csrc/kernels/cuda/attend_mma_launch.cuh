// Launches of the mma attention kernel.
#pragma once

#include "kernels/cuda/attend_mma.cuh"

namespace ctx::cuda {

template <typename T, int kValues, bool kByKeys>
void launch_mma_tile(const Attention& a, cudaStream_t stream) {
  constexpr int kRows = MmaBlock<T, kValues, kByKeys>::kRows;
  MmaLaunch l{};
  l.a = a;
  l.tiling = RowTiling::of(a, kRows);
  for (int p = 0; p < a.parts; ++p) l.has_int8 = l.has_int8 || a.part[p].storage == Storage::kInt8;
  launch(&attend_mma<T, kValues, kByKeys>,
         grid_of(l.tiling.tiles(a), a.kv_heads * a.batch, a.splits),
         kMmaThreads,
         MmaRoom(a, kRows, l.has_int8).all,
         stream,
         l);
}

template <typename T>
void launch_mma_type(const Attention& a, cudaStream_t stream) {
  const bool few = has_few_queries(a);
  if (a.value_dim <= 64) {
    few ? launch_mma_tile<T, 64, true>(a, stream) : launch_mma_tile<T, 64, false>(a, stream);
  } else {
    few ? launch_mma_tile<T, 128, true>(a, stream) : launch_mma_tile<T, 128, false>(a, stream);
  }
}

}  // namespace ctx::cuda
