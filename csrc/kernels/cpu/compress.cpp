// c tokens -> 1 slot: a group, and what its compressor reads left of it, is read back from the rings,
// its keys are rotated back by their tokens' positions, compressed in the arithmetic's type, and
// rotated to the slot's position.
#include <ATen/Parallel.h>

#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/pooling.h"
#include "kernels/cpu/rotary.h"
#include "kernels/cpu/slots.h"
#include "kernels/cpu/table.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {
namespace {

// The angles that due groups need, made once for all heads: [B, groups, tokens read + 1, rotary dim],
// of the tokens and then of the slot.
template <typename A>
class GroupAngles {
 public:
  GroupAngles(const CompressArgs& args, int64_t groups, std::vector<A>& storage)
      : m_(args.memory),
        groups_(groups),
        left_(m_.clock.schedule.overlap),
        read_(m_.clock.schedule.ratio + left_),
        storage_(storage) {
    const size_t size = m_.batch * groups_ * (read_ + 1) * m_.rotary.dim;
    if (storage_.size() < size) storage_.resize(size);
  }

  // `number` counts a row's due groups, i the tokens read, and then its slot.
  RotaryTable<A> at(int64_t b, int64_t number, int64_t i) const {
    const A* table = memory(b, number, i);
    return {table, table + m_.rotary.dim / 2};
  }

  void fill(int64_t b, int64_t number, int64_t group) {
    const int64_t first = m_.clock.schedule.first_token(group) - left_;
    for (int64_t i = 0; i < read_; ++i)
      make_rotary_table(m_.rotary, static_cast<double>(first + i), memory(b, number, i));
    make_rotary_table(m_.rotary, m_.clock.group_key(group), memory(b, number, read_));
  }

 private:
  A* memory(int64_t b, int64_t number, int64_t i) const {
    return storage_.data() + ((b * groups_ + number) * (read_ + 1) + i) * m_.rotary.dim;
  }

  const MemoryView& m_;
  int64_t groups_;
  int64_t left_;
  int64_t read_;
  std::vector<A>& storage_;
};

// Makes neighbouring slots of one head.
template <typename T, typename P>
class GroupCompressor {
 public:
  using A = Acc<T>;

  GroupCompressor(const CompressArgs& args, const GroupAngles<A>& angles, std::vector<A>& storage)
      : args_(args),
        m_(args.memory),
        angles_(angles),
        c_(m_.clock.schedule.ratio),
        read_(c_ + m_.clock.schedule.overlap) {
    const int64_t wide = row_width<A>(std::max(m_.head_dim, m_.value_dim));
    const int64_t hidden = args.kind == CompressorKind::kDilated ? 2 * wide : 0;
    const size_t size = kGroups * read_ * (m_.head_dim + m_.value_dim) + kGroups * wide + wide +
                        hidden + c_ + 2 * read_ * hidden;
    if (storage.size() < size) storage.resize(size);
    keys_ = storage.data();
    values_ = keys_ + kGroups * read_ * m_.head_dim;
    slots_ = values_ + kGroups * read_ * m_.value_dim;
    row_ = slots_ + kGroups * wide;
    weights_ = row_ + wide + hidden;
    hidden_[0] = weights_ + c_;
    hidden_[1] = hidden_[0] + read_ * hidden;
  }

  // Groups first ... first + count - 1 of row b; `number` counts the row's due groups.
  void run(int64_t b, int64_t h, int64_t number, int64_t first, int64_t count) {
    held_ = args_.block.row(b);
    for (int64_t g = 0; g < count && args_.kind != CompressorKind::kGiven; ++g)
      read_group(b, h, number + g, first + g, g);
    std::fill_n(mass_, kGroups, std::log(static_cast<A>(c_)));
    make(b, h, first, count, 0);
    for (int64_t g = 0; g < count; ++g) {
      A* slot = slots_ + g * row_width<A>(m_.head_dim);
      rotate_row(m_.rotary, angles_.at(b, number + g, read_), Rotation::kTo, slot);
      store(slot, m_.compressed_keys, m_.head_dim, h, first + g);
      if (m_.slot_mass != nullptr) store_mass(mass_[g], h, first + g);
    }
    make(b, h, first, count, 1);
    for (int64_t g = 0; g < count; ++g) {
      const A* slot = slots_ + g * row_width<A>(m_.value_dim);
      store(slot, m_.compressed_values, m_.value_dim, h, first + g);
    }
  }

 private:
  void store(const A* slot, void* ring, int64_t width, int64_t h, int64_t group) const {
    const int64_t index = group % m_.compressed_capacity;
    dispatch_slots<T>(m_.compressed_storage, [&](auto type) {
      using S = decltype(type);
      const int64_t stored = stored_width<S>(width);
      S* target = ring_row<S>(ring, m_.kv_heads, m_.compressed_capacity, stored, held_, h, index);
      store_slot(slot, target, width);
    });
  }

  void store_mass(A mass, int64_t h, int64_t group) const {
    const int64_t capacity = m_.compressed_capacity;
    *ring_row<A>(m_.slot_mass, m_.kv_heads, capacity, 1, held_, h, group % capacity) = mass;
  }

  // The pairs of a group and left of it, as its g-th here; keys are rotated back, and what is before
  // the stream is zero.
  void read_group(int64_t b, int64_t h, int64_t number, int64_t group, int64_t g) {
    const Schedule& schedule = m_.clock.schedule;
    const int64_t first = schedule.first_token(group) - (read_ - c_);
    for (int64_t i = 0; i < read_; ++i) {
      A* key = keys_ + (g * read_ + i) * m_.head_dim;
      A* value = values_ + (g * read_ + i) * m_.value_dim;
      const int64_t t = first + i;
      if (t < 0) {
        std::fill_n(key, m_.head_dim, A(0));
        std::fill_n(value, m_.value_dim, A(0));
        continue;
      }
      const bool sink = t < schedule.sinks;
      const int64_t capacity = sink ? schedule.sinks : m_.window_capacity;
      const int64_t index = t % capacity;
      const auto ring = [&](void* rows, int64_t width) {
        return ring_row<T>(rows, m_.kv_heads, capacity, width, held_, h, index);
      };
      load_row(ring(sink ? m_.sink_keys : m_.window_keys, m_.head_dim), key, m_.head_dim);
      rotate_row(m_.rotary, angles_.at(b, number, i), Rotation::kBack, key);
      load_row(ring(sink ? m_.sink_values : m_.window_values, m_.value_dim), value, m_.value_dim);
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
      const P* weight = parameter(side, h, read_ * width * width);
      convolve(x, weight, parameter(2 + side, h, width), count, read_, width, width, slots_);
      return;
    }
    for (int64_t g = 0; g < count; ++g)
      make_one(
          b, h, first + g, g, x + g * read_ * width, width, side, slots_ + g * row_width<A>(width));
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
      case CompressorKind::kDilated:
        return make_dilated(h, x, width, side, slot);
      case CompressorKind::kGated:
        return make_gated(h, g, x, width, side, slot);
      case CompressorKind::kGiven:
        return take_given(b, h, group, g, width, side, slot);
      case CompressorKind::kConv:
      case CompressorKind::kMostUsed:  // choose.cpp
        return;
    }
  }

  void make_gated(int64_t h, int64_t g, const A* x, int64_t width, int side, A* slot) {
    const A entropy = gate(keys_ + g * read_ * m_.head_dim,
                           x,
                           parameter(2 * side, h, m_.head_dim),
                           parameter(2 * side + 1, h, c_),
                           c_,
                           m_.head_dim,
                           width,
                           slot,
                           row_,
                           weights_);
    if (side == 0) mass_[g] = entropy;
  }

  // Dilations 1, 2, 4, ...: each layer has as many rows fewer, and c are left.
  void make_dilated(int64_t h, const A* x, int64_t width, int64_t side, A* slot) {
    const int64_t hidden = 2 * width;
    const int64_t layers = dilated_layers(c_);
    const int index = static_cast<int>(3 * side);
    int64_t rows = read_ - 1;
    dilate(x, parameter(index, h, 2 * width * hidden), rows, 1, width, hidden, hidden_[0], row_);
    const P* deeper = parameter(index + 1, h, (layers - 1) * 2 * hidden * hidden);
    for (int64_t layer = 1; layer < layers; ++layer) {
      const int64_t dilation = int64_t{1} << layer;
      const P* weight = deeper + (layer - 1) * 2 * hidden * hidden;
      rows -= dilation;
      const A* from = hidden_[(layer - 1) % 2];
      dilate(from, weight, rows, dilation, hidden, hidden, hidden_[layer % 2], row_);
    }
    const P* last = parameter(index + 2, h, c_ * hidden * width);
    const P* none = nullptr;
    convolve(hidden_[(layers - 1) % 2], last, none, 1, c_, hidden, width, slot);
  }

  void take_given(
      int64_t b, int64_t h, int64_t group, int64_t g, int64_t width, int side, A* slot) {
    const int64_t start = args_.block.start(b);
    const int64_t given =
        m_.clock.schedule.block_of(start, group) - args_.slot_block[b * args_.slot_block_stride];
    if (given < 0 || given >= args_.slots) {  // a block that is not the call's
      std::fill_n(slot, width, A(0));
      return;
    }
    if (side == 0 && args_.given_mass != nullptr)
      mass_[g] =
          static_cast<const A*>(args_.given_mass)[(b * m_.kv_heads + h) * args_.slots + given];
    std::copy_n(row<A>(side == 0 ? args_.slot_keys : args_.slot_values, b, h, given), width, slot);
  }

  const CompressArgs& args_;
  const MemoryView& m_;
  const GroupAngles<A>& angles_;
  int64_t c_;
  int64_t read_;      // tokens of a group and left of it
  int64_t held_ = 0;  // the memory's row
  A* keys_;
  A* values_;
  A* slots_;
  A* row_;
  A* weights_;
  A* hidden_[2];
  A mass_[kGroups];
};

template <typename T, typename P>
void compress_rows(const CompressArgs& args) {
  using A = Acc<T>;
  const MemoryView& m = args.memory;
  int64_t most = 0;
  for (int64_t b = 0; b < m.batch; ++b) {
    const EvictedGroups due = evicted_groups(m, args.block, b);
    most = std::max(most, due.last - due.first);
  }
  if (most == 0) return;
  const int64_t read = m.clock.schedule.ratio + m.clock.schedule.overlap;
  thread_local std::vector<A> angle_memory;  // kept from step to step
  GroupAngles<A> angles(args, most, angle_memory);
  at::parallel_for(
      0, m.batch * most, grain((read + 1) * m.rotary.dim * 4), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task) {
          const EvictedGroups due = evicted_groups(m, args.block, task / most);
          const int64_t number = task % most;
          if (due.first + number < due.last) angles.fill(task / most, number, due.first + number);
        }
      });
  const int64_t tiles = (most + kGroups - 1) / kGroups;
  const int64_t wide = m.head_dim + m.value_dim;
  const bool matrices = args.kind == CompressorKind::kConv || args.kind == CompressorKind::kDilated;
  const int64_t work = kGroups * read * wide * (matrices ? m.head_dim + 4 : 4);
  at::parallel_for(0, m.batch * m.kv_heads * tiles, grain(work), [&](int64_t begin, int64_t end) {
    thread_local std::vector<A> memory;  // kept from step to step
    GroupCompressor<T, P> compressor(args, angles, memory);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / tiles / m.kv_heads;
      const EvictedGroups due = evicted_groups(m, args.block, b);
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
  if (args.kind == CompressorKind::kMostUsed) return choose(args);
  dispatch(args.memory.storage, [&](auto type) {
    using T = decltype(type);
    args.wide_parameters ? compress_rows<T, Acc<T>>(args) : compress_rows<T, T>(args);
  });
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
