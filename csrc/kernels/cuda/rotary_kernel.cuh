// Rotary position for whole tensors: a block takes one token of one row and all its heads.
#pragma once

#include "kernels/cuda/rotary.cuh"

namespace ctx::cuda {

constexpr int kRotateThreads = 128;

// Grid [tokens, batch]; shared memory: a table.
template <typename T>
__global__ void __launch_bounds__(kRotateThreads)
    rotate_kernel(const __grid_constant__ RotateArgs args) {
  using A = Acc<T>;
  auto* table = reinterpret_cast<A*>(shared_memory());
  const int64_t t = blockIdx.x, b = blockIdx.y;
  make_table(args.rotary, args.positions[b * args.tokens + t], table, threadIdx.x, kRotateThreads);
  __syncthreads();
  const auto rotation = args.inverse ? Rotation::kBack : Rotation::kTo;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t h = warp; h < args.heads; h += kRotateThreads / 32)
    rotate_row(args.rotary,
               table,
               rotation,
               row<T>(args.in, b, h, t),
               row<T>(args.out, b, h, t),
               args.head_dim,
               lane,
               32);
}

inline void rotate(const RotateArgs& args, cudaStream_t stream) {
  dispatch(args.storage, [&](auto type) {
    using T = decltype(type);
    launch(&rotate_kernel<T>,
           grid_of(args.tokens, args.batch),
           kRotateThreads,
           args.rotary.dim * sizeof(Acc<T>),
           stream,
           args);
  });
}

}  // namespace ctx::cuda
