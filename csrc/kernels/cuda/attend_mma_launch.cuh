// Launches of the mma attention kernel.
#pragma once

#include "kernels/cuda/attend_mma.cuh"

namespace ctx::cuda {

template <typename T, int kValues, bool kByKeys>
void launch_mma_tile(const Attention& a, cudaStream_t stream) {
  constexpr int kRows = MmaBlock<T, kValues, kByKeys>::kRows;
  MmaLaunch l{};
  l.a = a;
  const int64_t q_per_kv = a.q_per_kv();
  const int64_t head_tiles = (q_per_kv + kRows - 1) / kRows;
  l.head_tiles = static_cast<int>(head_tiles);
  l.tile_heads = static_cast<int>((q_per_kv + head_tiles - 1) / head_tiles);
  const int64_t fit = head_tiles > 1 ? 1 : kRows / l.tile_heads;
  l.tile_tokens = static_cast<int>(fit < a.tokens ? fit : a.tokens);
  for (int p = 0; p < a.parts; ++p) l.has_int8 = l.has_int8 || a.part[p].storage == Storage::kInt8;
  const int64_t tiles = (a.tokens + l.tile_tokens - 1) / l.tile_tokens;
  launch(&attend_mma<T, kValues, kByKeys>,
         grid_of(tiles * head_tiles, a.kv_heads * a.batch, a.splits),
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
