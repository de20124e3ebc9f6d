// Slots that are tokens: of those that leave the window at one boundary the most used stay, in the
// order of their positions. A block takes one head; the rank of every token is counted by one thread.
#pragma once

#include "kernels/cuda/compress.cuh"

namespace ctx::cuda {

template <typename T>
struct Chooser {
  using A = Acc<T>;
  const CompressArgs& args;
  const MemoryView& m;
  const Schedule& schedule;
  int64_t b, held, h;  // held: the memory's row
  A* used;             // [all]
  int8_t* stays;       // [all]
  int64_t* token;      // [groups]
  A* row_of_warp;      // [head_dim or value_dim]

  // The `groups` most used of c * groups tokens from `first` on; of equals the earlier.
  CTX_DEVICE void choose(int64_t first, int64_t groups) const {
    const int64_t all = schedule.tokens_of(groups);
    const A* usage = ring_row<A>(m.usage, m.kv_heads, m.window_capacity, 1, held, h, 0);
    for (int64_t i = threadIdx.x; i < all; i += blockDim.x) {
      const A value = usage[(first + i) % m.window_capacity];
      used[i] = value == value ? value : minus_infinity<A>();  // a NaN has no order
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < all; i += blockDim.x) {
      int64_t before = 0;
      for (int64_t j = 0; j < all; ++j)
        before += used[j] > used[i] || (used[j] == used[i] && j < i);
      stays[i] = before < groups;
    }
    __syncthreads();
    for (int64_t i = threadIdx.x; i < all; i += blockDim.x) {
      if (!stays[i]) continue;
      int64_t place = 0;
      for (int64_t j = 0; j < i; ++j) place += stays[j];
      token[place] = first + i;
    }
    __syncthreads();
  }

  // Which token slot g is, for whoever asked.
  CTX_DEVICE void report(int64_t g, int64_t t) const {
    if (args.chosen == nullptr) return;
    const int64_t start = BlockRow(args.block, b).start;
    const int64_t block = args.slot_block[b * args.slot_block_stride];
    const int64_t place = schedule.block_of(start, g) - block;
    if (place < 0 || place >= args.slots) return;
    const int64_t group = schedule.block_of(start, schedule.group_of(t)) - block;
    const int64_t slot = (b * m.kv_heads + h) * args.slots + place;
    args.chosen[slot] = schedule.tokens_of(group) + schedule.place_in_group(t);
    args.chosen_positions[slot] = t;
  }

  // One warp: the token's pair becomes slot g; under the distance "token" its key stays where it is.
  CTX_DEVICE void copy(int64_t g, int64_t t, int lane) const {
    const int64_t from = t % m.window_capacity, to = g % m.compressed_capacity;
    const bool turns = !m.clock.token_distance && m.rotary.dim > 0;
    for (int side = 0; side < 2; ++side) {
      const int64_t width = side == 0 ? m.head_dim : m.value_dim;
      const T* pair = ring_row<T>(side == 0 ? m.window_keys : m.window_values,
                                  m.kv_heads,
                                  m.window_capacity,
                                  width,
                                  held,
                                  h,
                                  from);
      for (int64_t d = lane; d < width; d += 32) row_of_warp[d] = wide<A>(pair[d]);
      __syncwarp();
      if (side == 0 && turns) {
        GroupCompressor<T, T> turner(args, row_of_warp);
        for (int64_t i = lane; i < m.rotary.dim / 2; i += 32) {
          const PairPlace place = pair_place(m.rotary, i);
          A &x = row_of_warp[place.first], &y = row_of_warp[place.second];
          turner.turn(static_cast<double>(t), Rotation::kBack, i, x, y);
          turner.turn(static_cast<double>(g), Rotation::kTo, i, x, y);
        }
        __syncwarp();
      }
      dispatch_slots<T>(m.compressed_storage, [&](auto type) {
        using S = decltype(type);
        S* target = ring_row<S>(side == 0 ? m.compressed_keys : m.compressed_values,
                                m.kv_heads,
                                m.compressed_capacity,
                                stored_width<S>(width),
                                held,
                                h,
                                to);
        store_slot(row_of_warp, target, width, lane);
      });
      __syncwarp();
    }
    if (lane != 0) return;
    const int64_t slot = (held * m.kv_heads + h) * m.compressed_capacity + to;
    if (m.slot_mass != nullptr)
      static_cast<A*>(m.slot_mass)[slot] = A(0);  // one token stands for itself
    m.slot_positions[slot] = t;
  }
};

// How a block's memory is cut: positions of the slots, usage and rows, flags.
struct ChooserRoom {
  int64_t groups, all, rows;
  CTX_HOST_DEVICE explicit ChooserRoom(const CompressArgs& args) {
    groups = args.memory.clock.schedule.max_new_groups(args.block.tokens);
    all = args.memory.clock.schedule.tokens_of(groups);
    const MemoryView& m = args.memory;
    rows = (m.head_dim < m.value_dim ? m.value_dim : m.head_dim) * (kCompressThreads / 32);
  }
  CTX_HOST_DEVICE int64_t bytes(int64_t arithmetic) const {
    return (groups * 8 + (all + rows) * arithmetic + all + 15) / 16 * 16;
  }
};

// Grid [kv heads, batch].
template <typename T>
__global__ void __launch_bounds__(kCompressThreads)
    choose_kernel(const __grid_constant__ CompressLaunch launch) {
  using A = Acc<T>;
  const CompressArgs& args = launch.args;
  const MemoryView& m = args.memory;
  const int64_t h = blockIdx.x, b = blockIdx.y;
  const BlockRow row(args.block, b);
  if (row.count == 0) return;
  const Schedule& schedule = m.clock.schedule;
  const ChooserRoom room(args);
  const int64_t begun = schedule.groups(row.first - 1);
  const int64_t last = schedule.groups(row.first + row.count - 1);
  const int64_t groups = clamped(last - begun, 0, room.groups);
  if (groups == 0) return;
  char* memory = shared_memory();
  if (launch.workspace != nullptr)
    memory = static_cast<char*>(launch.workspace) + (b * gridDim.x + h) * room.bytes(sizeof(A));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  auto* token = reinterpret_cast<int64_t*>(memory);
  auto* used = reinterpret_cast<A*>(token + room.groups);
  A* rows = used + room.all;
  auto* stays = reinterpret_cast<int8_t*>(rows + room.rows);
  A* mine = rows + room.rows / (kCompressThreads / 32) * warp;
  const int64_t held = args.block.row(b);
  const Chooser<T> chooser{args, m, schedule, b, held, h, used, stays, token, mine};
  chooser.choose(schedule.first_token(begun), groups);
  for (int64_t g = last - groups + warp; g < last; g += kCompressThreads / 32) {
    const int64_t t = token[g - (last - groups)];
    if (lane == 0) chooser.report(g, t);
    if (last - g <= m.compressed_capacity) chooser.copy(g, t, lane);
  }
}

}  // namespace ctx::cuda
