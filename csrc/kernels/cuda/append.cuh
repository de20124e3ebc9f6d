// Pairs into the rings: a token's index is its position modulo the capacity; the first `sinks` tokens
// have a place of their own and never leave it. Keys are rotated here, once, to their own position,
// where they are not given so. A block takes one token of one row and all its heads.
#pragma once

#include "kernels/cuda/rotary.cuh"

namespace ctx::cuda {

constexpr int kAppendThreads = 128;

// Token i of row b; shared memory: a table.
template <typename T>
CTX_DEVICE void append_token(const AppendArgs& args, int64_t i, int64_t b) {
  using A = Acc<T>;
  const MemoryView& m = args.memory;
  const BlockRow row_of_block(args.block, b);
  if (!row_of_block.has(i)) return;
  const int64_t t = row_of_block.first + i;
  const int64_t source = args.block.offset + i;
  const int64_t held = args.block.row(b);
  const bool sink = t < m.clock.schedule.sinks;
  const int64_t capacity = sink ? m.clock.schedule.sinks : m.window_capacity;
  const int64_t index = (t + (CTX_PLANTED(kWrongSlot) ? 1 : 0)) % capacity;
  const bool rotates = m.rotary.dim > 0 && !m.rotary.keys_rotated;
  auto* table = reinterpret_cast<A*>(shared_memory());
  if (rotates) make_table(m.rotary, static_cast<double>(t), table, threadIdx.x, kAppendThreads);
  if (!CTX_PLANTED(kMissingBarrier)) __syncthreads();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int64_t task = warp; task < 2 * m.kv_heads; task += kAppendThreads / 32) {
    const int64_t h = task / 2;
    if (task % 2 == 0) {
      void* ring = sink ? m.sink_keys : m.window_keys;
      const T* from = row<T>(args.keys, b, h, source);
      T* to = ring_row<T>(ring, m.kv_heads, capacity, m.head_dim, held, h, index);
      if (rotates) {
        rotate_row(m.rotary, table, Rotation::kTo, from, to, m.head_dim, lane, 32);
      } else {
        copy_row(from, to, m.head_dim, lane, 32);
      }
    } else {
      void* ring = sink ? m.sink_values : m.window_values;
      T* to = ring_row<T>(ring, m.kv_heads, capacity, m.value_dim, held, h, index);
      copy_row(row<T>(args.values, b, h, source), to, m.value_dim, lane, 32);
      if (m.usage != nullptr && !sink && lane == 0)
        *ring_row<A>(m.usage, m.kv_heads, capacity, 1, held, h, index) = A(0);
    }
  }
}

// Grid [tokens, batch].
template <typename T>
__global__ void __launch_bounds__(kAppendThreads)
    append_kernel(const __grid_constant__ AppendArgs args) {
  append_token<T>(args, blockIdx.x, blockIdx.y);
}

// Bytes of shared memory.
inline size_t append_shared(const MemoryView& m) {
  return m.rotary.dim * (m.storage == Storage::kFloat64 ? sizeof(double) : sizeof(float));
}

inline void append(const AppendArgs& args, cudaStream_t stream) {
  const MemoryView& m = args.memory;
  if (m.kv_heads == 0) return;
  dispatch(m.storage, [&](auto type) {
    using T = decltype(type);
    launch(&append_kernel<T>,
           grid_of(args.block.tokens, m.batch),
           kAppendThreads,
           append_shared(m),
           stream,
           args);
  });
}

}  // namespace ctx::cuda
