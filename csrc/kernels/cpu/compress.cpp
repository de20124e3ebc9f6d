// c tokens -> 1 slot: a group is read back from the window ring, its keys are rotated back by their
// tokens' positions, compressed in the arithmetic's type, and rotated to the slot's position.
#include <ATen/Parallel.h>

#include <limits>
#include <vector>

#include "kernels/cpu/blocks.h"
#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/rotary.h"
#include "kernels/cpu/slots.h"
#include "kernels/cpu/table.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {
namespace {

constexpr int64_t kGroups = 8;  // of a head that are made together

template <typename A>
void pool_mean(const A* x, int64_t c, int64_t width, A* slot) {
  std::fill_n(slot, width, A(0));
  for (int64_t i = 0; i < c; ++i) axpy(A(1), x + i * width, slot, width);
  scale_row(A(1) / static_cast<A>(c), slot, width);
}

template <typename A>
void pool_max(const A* x, int64_t c, int64_t width, A* slot) {
  std::copy_n(x, width, slot);
  for (int64_t i = 1; i < c; ++i) {
    // A NaN stays a NaN, as in torch.amax.
    for (int64_t d = 0; d < width; ++d) {
      const A candidate = x[i * width + d];
      if (candidate > slot[d] || candidate != candidate) slot[d] = candidate;
    }
  }
}

// slot = sum_i x_i W_i (+ bias) for some groups of a head, which read its weight [c, width, width]
// once; x [groups, c, width], slots [groups, padded width].
template <typename A, typename P>
void convolve(const A* x,
              const P* weight,
              const P* bias,
              int64_t groups,
              int64_t c,
              int64_t width,
              A* slots) {
  for (int64_t g = 0; g < groups; ++g) {
    A* slot = slots + g * padded<A>(width);
    std::fill_n(slot, padded<A>(width), A(0));
    if (bias != nullptr) load_row(bias, slot, width);
  }
  A factors[kGroups * kBlock];
  for (int64_t j = 0; j < c * width; j += kBlock) {
    const int64_t count = std::min(kBlock, c * width - j);
    for (int64_t g = 0; g < groups; ++g)
      std::copy_n(x + g * c * width + j, count, factors + g * kBlock);
    by_rows(groups, [&](auto number, int64_t g) {
      add_rows<decltype(number)::value>(factors + g * kBlock,
                                        weight + j * width,
                                        count,
                                        width,
                                        width,
                                        slots + g * padded<A>(width));
    });
  }
}

// slot = sum_i softmax_i(key_i . gate + position_i) x_i
template <typename A, typename P>
void gate(const A* keys,
          const A* x,
          const P* direction,
          const P* position,
          int64_t c,
          int64_t key_width,
          int64_t width,
          A* slot,
          A* parameter_row,
          A* weights) {
  load_row(direction, parameter_row, key_width);
  load_row(position, weights, c);
  A largest = -std::numeric_limits<A>::infinity();
  for (int64_t i = 0; i < c; ++i) {
    weights[i] += dot(keys + i * key_width, parameter_row, key_width);
    largest = std::max(largest, weights[i]);
  }
  A total = 0;
  for (int64_t i = 0; i < c; ++i) total += weights[i] = std::exp(weights[i] - largest);
  std::fill_n(slot, width, A(0));
  for (int64_t i = 0; i < c; ++i) axpy(weights[i] / total, x + i * width, slot, width);
}

// The angles that due groups need, made once for all heads: [B, groups, c + 1, rotary dim], of the
// tokens and then of the slot.
template <typename A>
class GroupAngles {
 public:
  GroupAngles(const CompressArgs& args, int64_t groups, std::vector<A>& storage)
      : m_(args.memory), groups_(groups), c_(m_.clock.schedule.ratio), storage_(storage) {
    const size_t size = m_.batch * groups_ * (c_ + 1) * m_.rotary.dim;
    if (storage_.size() < size) storage_.resize(size);
  }

  // `number` counts a row's due groups, i a group's tokens, and then its slot.
  RotaryTable<A> at(int64_t b, int64_t number, int64_t i) const {
    const A* table = memory(b, number, i);
    return {table, table + m_.rotary.dim / 2};
  }

  void fill(int64_t b, int64_t number, int64_t group) {
    const int64_t first = m_.clock.schedule.first_token(group);
    for (int64_t i = 0; i < c_; ++i)
      make_rotary_table(m_.rotary, static_cast<double>(first + i), memory(b, number, i));
    make_rotary_table(m_.rotary, m_.clock.group_key(group), memory(b, number, c_));
  }

 private:
  A* memory(int64_t b, int64_t number, int64_t i) const {
    return storage_.data() + ((b * groups_ + number) * (c_ + 1) + i) * m_.rotary.dim;
  }

  const MemoryView& m_;
  int64_t groups_;
  int64_t c_;
  std::vector<A>& storage_;
};

// Makes neighbouring slots of one head.
template <typename T, typename P>
class GroupCompressor {
 public:
  using A = Acc<T>;

  GroupCompressor(const CompressArgs& args, const GroupAngles<A>& angles, std::vector<A>& storage)
      : args_(args), m_(args.memory), angles_(angles), c_(m_.clock.schedule.ratio) {
    const int64_t wide = padded<A>(std::max(m_.head_dim, m_.value_dim));
    const size_t size = kGroups * c_ * (m_.head_dim + m_.value_dim) + kGroups * wide + wide + c_;
    if (storage.size() < size) storage.resize(size);
    keys_ = storage.data();
    values_ = keys_ + kGroups * c_ * m_.head_dim;
    slots_ = values_ + kGroups * c_ * m_.value_dim;
    row_ = slots_ + kGroups * wide;
    weights_ = row_ + wide;
  }

  // Groups first ... first + count - 1 of row b; `number` counts the row's due groups.
  void run(int64_t b, int64_t h, int64_t number, int64_t first, int64_t count) {
    for (int64_t g = 0; g < count && args_.kind != CompressorKind::kGiven; ++g)
      read(b, h, number + g, first + g, g);
    make(b, h, first, count, 0);
    for (int64_t g = 0; g < count; ++g) {
      A* slot = slots_ + g * padded<A>(m_.head_dim);
      rotate_row(m_.rotary, angles_.at(b, number + g, c_), A(1), slot);
      store(slot, m_.compressed_keys, m_.head_dim, b, h, first + g);
    }
    make(b, h, first, count, 1);
    for (int64_t g = 0; g < count; ++g) {
      const A* slot = slots_ + g * padded<A>(m_.value_dim);
      store(slot, m_.compressed_values, m_.value_dim, b, h, first + g);
    }
  }

 private:
  void store(const A* slot, void* ring, int64_t width, int64_t b, int64_t h, int64_t group) const {
    const int64_t index = group % m_.compressed_capacity;
    dispatch_slots<T>(m_.compressed_storage, [&](auto type) {
      using S = decltype(type);
      const int64_t stored = stored_width<S>(width);
      S* target = ring_row<S>(ring, m_.kv_heads, m_.compressed_capacity, stored, b, h, index);
      store_slot(slot, target, width);
    });
  }

  // The pairs of a group, as its g-th here; keys are rotated back.
  void read(int64_t b, int64_t h, int64_t number, int64_t group, int64_t g) {
    const auto window = [&](void* ring, int64_t width, int64_t index) {
      return ring_row<T>(ring, m_.kv_heads, m_.window_capacity, width, b, h, index);
    };
    const int64_t first = m_.clock.schedule.first_token(group);
    for (int64_t i = 0; i < c_; ++i) {
      const int64_t index = (first + i) % m_.window_capacity;
      A* key = keys_ + (g * c_ + i) * m_.head_dim;
      load_row(window(m_.window_keys, m_.head_dim, index), key, m_.head_dim);
      rotate_row(m_.rotary, angles_.at(b, number, i), A(-1), key);
      load_row(window(m_.window_values, m_.value_dim, index),
               values_ + (g * c_ + i) * m_.value_dim,
               m_.value_dim);
    }
  }

  // Parameters of head h; `size` elements per head.
  const P* parameter(int index, int64_t h, int64_t size) const {
    const auto* data = static_cast<const P*>(args_.parameters[index]);
    return data == nullptr ? nullptr : data + h * size;
  }

  // side: 0 for keys, 1 for values.
  void make(int64_t b, int64_t h, int64_t first, int64_t count, int side) {
    const A* x = side == 0 ? keys_ : values_;
    const int64_t width = side == 0 ? m_.head_dim : m_.value_dim;
    if (args_.kind == CompressorKind::kConv) {
      const P* weight = parameter(side, h, c_ * width * width);
      convolve(x, weight, parameter(2 + side, h, width), count, c_, width, slots_);
      return;
    }
    for (int64_t g = 0; g < count; ++g)
      make_one(b, h, first + g, g, x + g * c_ * width, width, side, slots_ + g * padded<A>(width));
  }

  void make_one(int64_t b,
                int64_t h,
                int64_t group,
                int64_t g,
                const A* x,
                int64_t width,
                int side,
                A* slot) {
    switch (args_.kind) {
      case CompressorKind::kMean:
        return pool_mean(x, c_, width, slot);
      case CompressorKind::kMax:
        return pool_max(x, c_, width, slot);
      case CompressorKind::kGated:
        return gate(keys_ + g * c_ * m_.head_dim,
                    x,
                    parameter(2 * side, h, m_.head_dim),
                    parameter(2 * side + 1, h, c_),
                    c_,
                    m_.head_dim,
                    width,
                    slot,
                    row_,
                    weights_);
      case CompressorKind::kGiven:
        return take_given(b, h, group, width, side, slot);
      case CompressorKind::kConv:
        return;
    }
  }

  void take_given(int64_t b, int64_t h, int64_t group, int64_t width, int side, A* slot) const {
    const int64_t start = -args_.block.origin[b];
    const int64_t given = group_block(m_.clock.schedule, start, group) - args_.slot_block[b];
    if (given < 0 || given >= args_.slots) {  // a block that is not the call's
      std::fill_n(slot, width, A(0));
      return;
    }
    std::copy_n(row<A>(side == 0 ? args_.slot_keys : args_.slot_values, b, h, given), width, slot);
  }

  const CompressArgs& args_;
  const MemoryView& m_;
  const GroupAngles<A>& angles_;
  int64_t c_;
  A* keys_;
  A* values_;
  A* slots_;
  A* row_;
  A* weights_;
};

template <typename T, typename P>
void compress_rows(const CompressArgs& args) {
  using A = Acc<T>;
  const MemoryView& m = args.memory;
  int64_t most = 0;
  for (int64_t b = 0; b < m.batch; ++b) {
    const DueGroups due = due_groups(m, args.block, b);
    most = std::max(most, due.last - due.first);
  }
  if (most == 0) return;
  const int64_t c = m.clock.schedule.ratio;
  thread_local std::vector<A> angle_memory;  // kept from step to step
  GroupAngles<A> angles(args, most, angle_memory);
  at::parallel_for(
      0, m.batch * most, grain((c + 1) * m.rotary.dim * 4), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const DueGroups due = due_groups(m, args.block, task / most);
          const int64_t number = task % most;
          if (due.first + number < due.last) angles.fill(task / most, number, due.first + number);
        }
      });
  const int64_t tiles = (most + kGroups - 1) / kGroups;
  const int64_t wide = m.head_dim + m.value_dim;
  const int64_t work =
      kGroups * c * wide * (args.kind == CompressorKind::kConv ? m.head_dim + 4 : 4);
  at::parallel_for(0, m.batch * m.kv_heads * tiles, grain(work), [&](int64_t begin, int64_t end) {
    thread_local std::vector<A> memory;  // kept from step to step
    GroupCompressor<T, P> compressor(args, angles, memory);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles / m.kv_heads;
      const DueGroups due = due_groups(m, args.block, b);
      const int64_t number = task % tiles * kGroups;
      const int64_t count = std::min(kGroups, due.last - due.first - number);
      if (count > 0)
        compressor.run(b, task / tiles % m.kv_heads, number, due.first + number, count);
    }
  });
}

}  // namespace

void compress(const CompressArgs& args) {
  if (args.memory.compressed_capacity == 0) return;
  dispatch(args.memory.storage, [&](auto type) {
    using T = decltype(type);
    args.wide_parameters ? compress_rows<T, Acc<T>>(args) : compress_rows<T, T>(args);
  });
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
