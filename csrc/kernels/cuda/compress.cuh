// c tokens -> 1 slot: a group, and what its compressor reads left of it, is read back from the rings,
// its keys are rotated back by their tokens' positions, compressed in the arithmetic's type, and
// rotated to the slot's position. A block makes one slot of one head; where no group is due it ends
// at once.
#pragma once

#include "kernels/cuda/append.cuh"
#include "kernels/cuda/pooling.cuh"

namespace ctx::cuda {

constexpr int kCompressThreads = 128;
static_assert(kCompressThreads == kAppendThreads);  // a launch may hold blocks of both
constexpr size_t kMostShared = 96 * 1024;  // of a block; what needs more lies in the workspace

// How a block's memory is cut, in numbers of A.
struct GroupRoom {
  int64_t rows, hidden, weights, slot;

  CTX_HOST_DEVICE explicit GroupRoom(const CompressArgs& args) {
    const MemoryView& m = args.memory;
    const int64_t c = m.clock.schedule.ratio;
    const int64_t read = c + m.clock.schedule.overlap;
    const int64_t width = m.head_dim < m.value_dim ? m.value_dim : m.head_dim;
    const bool given = args.kind == CompressorKind::kGiven;
    rows = given ? 0 : read * width;
    hidden = args.kind == CompressorKind::kDilated ? read * 2 * width : 0;
    weights = args.kind == CompressorKind::kGated ? c : 0;
    slot = width;
  }
  CTX_HOST_DEVICE int64_t size() const { return rows + 2 * hidden + weights + slot; }
};

struct CompressLaunch {
  CompressArgs args;
  int64_t groups;   // of a row, at most
  void* workspace;  // of all blocks; null: in shared memory
  // A block of one token makes slots of older ones: its pairs are written in the same launch.
  AppendArgs append;
  unsigned appended = 0;  // tokens
};

template <typename T, typename P>
struct GroupCompressor {
  using A = Acc<T>;
  const CompressArgs& args;
  const MemoryView& m;
  int64_t c, read;
  int64_t b, held, h, group;  // held: the memory's row
  A *rows, *hidden[2], *weights, *slot;

  CTX_DEVICE GroupCompressor(const CompressArgs& a, A* memory)
      : args(a), m(a.memory), c(m.clock.schedule.ratio), read(c + m.clock.schedule.overlap) {
    const GroupRoom room(a);
    rows = memory;
    hidden[0] = rows + room.rows;
    hidden[1] = hidden[0] + room.hidden;
    weights = hidden[1] + room.hidden;
    slot = weights + room.weights;
  }

  // The rows of a group and left of it; what is before the stream is zero.
  CTX_DEVICE void read_rows(int side) const {
    const Schedule& schedule = m.clock.schedule;
    const int64_t first = schedule.first_token(group) - (read - c);
    const int64_t width = side == 0 ? m.head_dim : m.value_dim;
    const int64_t half = side == 0 ? m.rotary.dim / 2 : 0;
    const int64_t pieces = width - half;  // of a row: pairs, then single numbers
    for (int64_t task = threadIdx.x; task < read * pieces; task += blockDim.x) {
      const int64_t i = task / pieces, piece = task % pieces;
      const int64_t t = first + i;
      A* to = rows + i * width;
      const T* from = t < 0 ? nullptr : ring(t, side, width);
      if (piece >= half) {
        const int64_t d = piece + half;
        to[d] = from == nullptr ? A(0) : wide<A>(from[d]);
        continue;
      }
      const PairPlace place = pair_place(m.rotary, piece);
      A x = 0, y = 0;
      if (from != nullptr) {
        x = wide<A>(from[place.first]), y = wide<A>(from[place.second]);
        turn(static_cast<double>(t), Rotation::kBack, piece, x, y);
      }
      to[place.first] = x, to[place.second] = y;
    }
  }

  CTX_DEVICE const T* ring(int64_t t, int side, int64_t width) const {
    const bool sink = t < m.clock.schedule.sinks;
    const int64_t capacity = sink ? m.clock.schedule.sinks : m.window_capacity;
    void* data =
        side == 0 ? (sink ? m.sink_keys : m.window_keys) : (sink ? m.sink_values : m.window_values);
    return ring_row<T>(data, m.kv_heads, capacity, width, held, h, t % capacity);
  }

  // Rotates pair i by the angle of a position, which nobody else needs.
  CTX_DEVICE void turn(double position, Rotation rotation, int64_t i, A& x, A& y) const {
    A angles[2];
    sine_and_cosine(position * m.rotary.inv_freq[i], angles[1], angles[0]);
    if (m.rotary.attention_factor != 1.0)
      for (A& angle : angles) angle *= static_cast<A>(m.rotary.attention_factor);
    const A factor = factor_of<A>(m.rotary, rotation);
    const A s = rotation == Rotation::kTo ? angles[1] : -angles[1];
    const A p = x * factor, q = y * factor;
    x = p * angles[0] - q * s;
    y = q * angles[0] + p * s;
  }

  CTX_DEVICE const P* parameter(int index, int64_t size) const {
    const auto* data = static_cast<const P*>(args.parameters[index]);
    return data == nullptr ? nullptr : data + h * size;
  }

  // Makes the row of a side; returns the slot's log-mass, of side 0.
  CTX_DEVICE A make(int side) {
    const int64_t width = side == 0 ? m.head_dim : m.value_dim;
    auto mass = static_cast<A>(log(static_cast<double>(c)));
    switch (args.kind) {
      case CompressorKind::kMean:
        pool_mean(rows, c, width, slot);
        break;
      case CompressorKind::kMax:
        pool_max(rows, c, width, slot);
        break;
      case CompressorKind::kConv:
        convolve(rows,
                 parameter(side, read * width * width),
                 parameter(2 + side, width),
                 read,
                 width,
                 width,
                 slot);
        break;
      case CompressorKind::kDilated:
        make_dilated(side, width);
        break;
      case CompressorKind::kGated:
        if (side == 1) break;  // make_gated() makes both
        mass = make_gated();
        break;
      case CompressorKind::kGiven:
        take_given(side, width, mass);
        break;
      case CompressorKind::kMostUsed:  // choose.cuh
        break;
    }
    return mass;
  }

  // Dilations 1, 2, 4, ...: each layer has as many rows fewer, and c are left.
  CTX_DEVICE void make_dilated(int side, int64_t width) const {
    const int64_t inner = 2 * width;
    const int64_t layers = dilated_layers(c);
    const int index = 3 * side;
    int64_t left = read - 1;
    dilate(rows, parameter(index, 2 * width * inner), left, 1, width, inner, hidden[0]);
    const P* deeper = parameter(index + 1, (layers - 1) * 2 * inner * inner);
    for (int64_t layer = 1; layer < layers; ++layer) {
      const int64_t dilation = int64_t{1} << layer;
      left -= dilation;
      __syncthreads();
      dilate(hidden[(layer - 1) % 2],
             deeper + (layer - 1) * 2 * inner * inner,
             left,
             dilation,
             inner,
             inner,
             hidden[layer % 2]);
    }
    __syncthreads();
    const P* none = nullptr;
    const P* last = parameter(index + 2, c * inner * width);
    convolve(hidden[(layers - 1) % 2], last, none, c, inner, width, slot);
  }

  // Weights of the key gate make the key's row; those of the value gate, which reads the keys, too,
  // stay for the value's.
  CTX_DEVICE A make_gated() const {
    const A entropy = gate(rows, parameter(0, m.head_dim), parameter(1, c), c, m.head_dim, weights);
    pool_weighted(rows, weights, c, m.head_dim, slot);
    __syncthreads();
    gate(rows, parameter(2, m.head_dim), parameter(3, c), c, m.head_dim, weights);
    return entropy;
  }

  CTX_DEVICE void take_given(int side, int64_t width, A& mass) const {
    const int64_t block = args.slot_block[b * args.slot_block_stride];
    const int64_t start = BlockRow(args.block, b).start;
    const int64_t given = m.clock.schedule.block_of(start, group) - block;
    const bool here = given >= 0 && given < args.slots;  // else of a block that is not the call's
    const A* from =
        here ? row<A>(side == 0 ? args.slot_keys : args.slot_values, b, h, given) : nullptr;
    for (int64_t d = threadIdx.x; d < width; d += blockDim.x) slot[d] = here ? from[d] : A(0);
    if (here && args.given_mass != nullptr)
      mass = static_cast<const A*>(args.given_mass)[(b * m.kv_heads + h) * args.slots + given];
  }

  CTX_DEVICE void rotate_slot() const {
    const double position = m.clock.group_key(group);
    for (int64_t i = threadIdx.x; i < m.rotary.dim / 2; i += blockDim.x) {
      const PairPlace place = pair_place(m.rotary, i);
      turn(position, Rotation::kTo, i, slot[place.first], slot[place.second]);
    }
  }

  CTX_DEVICE void store(int side) const {
    const int64_t width = side == 0 ? m.head_dim : m.value_dim;
    void* data = side == 0 ? m.compressed_keys : m.compressed_values;
    const int64_t index = group % m.compressed_capacity;
    if (threadIdx.x >= 32) return;
    dispatch_slots<T>(m.compressed_storage, [&](auto type) {
      using S = decltype(type);
      S* to = ring_row<S>(
          data, m.kv_heads, m.compressed_capacity, stored_width<S>(width), held, h, index);
      store_slot(slot, to, width, threadIdx.x);
    });
  }

  CTX_DEVICE void run() {
    for (int side = 0; side < 2; ++side) {
      if (args.kind != CompressorKind::kGiven) read_rows(side);
      __syncthreads();
      const A mass = make(side);
      if (args.kind == CompressorKind::kGated && side == 1)
        pool_weighted(rows, weights, c, m.value_dim, slot);
      __syncthreads();
      if (side == 0) {
        rotate_slot();
        if (m.slot_mass != nullptr && threadIdx.x == 0)
          static_cast<A*>(m.slot_mass)[(held * m.kv_heads + h) * m.compressed_capacity +
                                       group % m.compressed_capacity] = mass;
        __syncthreads();
      }
      store(side);
      __syncthreads();
    }
  }
};

// Grid [tokens + kv heads * groups, batch].
template <typename T, typename P>
__global__ void __launch_bounds__(kCompressThreads)
    compress_kernel(const __grid_constant__ CompressLaunch launch) {
  using A = Acc<T>;
  const CompressArgs& args = launch.args;
  const int64_t b = blockIdx.y;
  if (blockIdx.x < launch.appended) return append_token<T>(launch.append, blockIdx.x, b);
  const int64_t task = blockIdx.x - launch.appended;
  const int64_t h = task / launch.groups, number = task % launch.groups;
  const EvictedGroups due = due_groups(args.memory, args.block, b);
  if (number >= due.last - due.first) return;
  A* memory = reinterpret_cast<A*>(shared_memory());
  if (launch.workspace != nullptr) {
    const int64_t block = b * (gridDim.x - launch.appended) + task;
    memory = static_cast<A*>(launch.workspace) + block * GroupRoom(args).size();
  }
  GroupCompressor<T, P> compressor(args, memory);
  compressor.b = b, compressor.held = args.block.row(b);
  compressor.h = h, compressor.group = due.first + number;
  compressor.run();
}

// Groups of a row that a block of tokens can make due and keep.
inline int64_t most_groups(const CompressArgs& args) {
  const int64_t due = args.memory.clock.schedule.max_new_groups(args.block.tokens);
  return due < args.memory.compressed_capacity ? due : args.memory.compressed_capacity;
}

}  // namespace ctx::cuda
