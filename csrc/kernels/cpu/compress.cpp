// c tokens -> 1 slot: a group, and what its compressor reads left of it, is read back from the rings,
// its keys are rotated back by their tokens' positions, compressed in the arithmetic's type, and
// rotated to the slot's position.
#include <ATen/Parallel.h>

#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/pooling.h"
#include "kernels/cpu/rotary.h"
#include "kernels/cpu/table.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {
namespace {

template <typename T, typename P>
class GroupCompressor {
 public:
  using A = Acc<T>;

  explicit GroupCompressor(const CompressArgs& args)
      : args_(args),
        m_(args.memory),
        c_(m_.clock.schedule.ratio),
        read_(c_ + m_.clock.schedule.overlap),
        half_(m_.rotary.dim / 2) {
    const int64_t wide = std::max(m_.head_dim, m_.value_dim);
    const int64_t hidden = args.kind == CompressorKind::kDilated ? 2 * wide : 0;
    tables_.resize((read_ + 1) * m_.rotary.dim);
    buffer_.resize(read_ * (m_.head_dim + m_.value_dim) + wide + std::max(wide, hidden) + c_ +
                   2 * read_ * hidden);
    keys_ = buffer_.data();
    values_ = keys_ + read_ * m_.head_dim;
    slot_ = values_ + read_ * m_.value_dim;
    row_ = slot_ + wide;
    weights_ = row_ + std::max(wide, hidden);
    hidden_[0] = weights_ + c_;
    hidden_[1] = hidden_[0] + read_ * hidden;
  }

  void run(int64_t b, int64_t g) {
    const int64_t first = m_.clock.schedule.first_token(g) - (read_ - c_);
    for (int64_t i = 0; i < read_; ++i) table(i, static_cast<double>(first + i));
    table(read_, m_.clock.group_key(g));
    const int64_t target = g % m_.compressed_capacity;
    const bool given = args_.kind == CompressorKind::kGiven;
    if (given) {
      const int64_t start = -args_.block.origin[b];
      given_ = group_block(m_.clock.schedule, start, g) - args_.slot_block[b];
    }
    for (int64_t h = 0; h < m_.kv_heads; ++h) {
      for (int64_t i = 0; i < read_ && !given; ++i) read(b, h, first + i, i);
      make(b, h, keys_, m_.head_dim, 0);
      rotate_row(m_.rotary, cosine(read_), sine(read_), A(1), slot_);
      store_row(
          slot_,
          ring_row<T>(
              m_.compressed_keys, m_.kv_heads, m_.compressed_capacity, m_.head_dim, b, h, target),
          m_.head_dim);
      make(b, h, values_, m_.value_dim, 1);
      store_row(slot_,
                ring_row<T>(m_.compressed_values,
                            m_.kv_heads,
                            m_.compressed_capacity,
                            m_.value_dim,
                            b,
                            h,
                            target),
                m_.value_dim);
    }
  }

 private:
  A* cosine(int64_t i) { return tables_.data() + i * m_.rotary.dim; }
  A* sine(int64_t i) { return cosine(i) + half_; }
  void table(int64_t i, double position) { rotary_table(m_.rotary, position, cosine(i), sine(i)); }

  // Token t of head h, un-rotated, as row i; what is before the stream is zero.
  void read(int64_t b, int64_t h, int64_t t, int64_t i) {
    A* key = keys_ + i * m_.head_dim;
    A* value = values_ + i * m_.value_dim;
    if (t < 0) {
      std::fill_n(key, m_.head_dim, A(0));
      std::fill_n(value, m_.value_dim, A(0));
      return;
    }
    const bool sink = t < m_.clock.schedule.sinks;
    void* keys = sink ? m_.sink_keys : m_.window_keys;
    void* values = sink ? m_.sink_values : m_.window_values;
    const int64_t capacity = sink ? m_.clock.schedule.sinks : m_.window_capacity;
    const int64_t index = t % capacity;
    load_row(ring_row<T>(keys, m_.kv_heads, capacity, m_.head_dim, b, h, index), key, m_.head_dim);
    rotate_row(m_.rotary, cosine(i), sine(i), A(-1), key);
    load_row(
        ring_row<T>(values, m_.kv_heads, capacity, m_.value_dim, b, h, index), value, m_.value_dim);
  }

  // Parameters of head h; `size` elements per head.
  const P* parameter(int index, int64_t h, int64_t size) const {
    const auto* data = static_cast<const P*>(args_.parameters[index]);
    return data == nullptr ? nullptr : data + h * size;
  }

  // side: 0 for keys, 1 for values.
  void make(int64_t b, int64_t h, const A* x, int64_t width, int side) {
    switch (args_.kind) {
      case CompressorKind::kMean:
        return pool_mean(x, c_, width, slot_);
      case CompressorKind::kMax:
        return pool_max(x, c_, width, slot_);
      case CompressorKind::kConv:
        return convolve(x,
                        parameter(side, h, read_ * width * width),
                        parameter(2 + side, h, width),
                        read_,
                        width,
                        width,
                        slot_,
                        row_);
      case CompressorKind::kDilated:
        return make_dilated(h, x, width, side);
      case CompressorKind::kGated:
        return gate(keys_,
                    x,
                    parameter(2 * side, h, m_.head_dim),
                    parameter(2 * side + 1, h, c_),
                    c_,
                    m_.head_dim,
                    width,
                    slot_,
                    row_,
                    weights_);
      case CompressorKind::kGiven:
        if (given_ < 0 || given_ >= args_.slots) {  // a block that is not the call's
          std::fill_n(slot_, width, A(0));
          return;
        }
        std::copy_n(
            row<A>(side == 0 ? args_.slot_keys : args_.slot_values, b, h, given_), width, slot_);
        return;
      case CompressorKind::kMostUsed:  // choose.cpp
        return;
    }
  }

  // Dilations 1, 2, 4, ...: each layer has as many rows fewer, and c are left.
  void make_dilated(int64_t h, const A* x, int64_t width, int64_t side) {
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
      dilate(hidden_[(layer - 1) % 2],
             weight,
             rows,
             dilation,
             hidden,
             hidden,
             hidden_[layer % 2],
             row_);
    }
    convolve(hidden_[(layers - 1) % 2],
             parameter(index + 2, h, c_ * hidden * width),
             static_cast<const P*>(nullptr),
             c_,
             hidden,
             width,
             slot_,
             row_);
  }

  const CompressArgs& args_;
  const MemoryView& m_;
  int64_t c_;
  int64_t read_;  // tokens of a group and left of it
  int64_t half_;
  int64_t given_ = 0;  // which of the given slots
  std::vector<A> tables_;
  std::vector<A> buffer_;
  A* keys_;
  A* values_;
  A* slot_;
  A* row_;
  A* weights_;
  A* hidden_[2];
};

template <typename T, typename P>
void compress_rows(const CompressArgs& args) {
  const MemoryView& m = args.memory;
  const Schedule& schedule = m.clock.schedule;
  const int64_t most = std::min(m.compressed_capacity, schedule.max_new_groups(args.block.tokens));
  bool due = false;
  for (int64_t b = 0; b < m.batch && !due; ++b) {
    const DueGroups groups = due_groups(m, args.block, b);
    due = groups.first < groups.last;
  }
  if (!due) return;
  const bool matrices = args.kind == CompressorKind::kConv || args.kind == CompressorKind::kDilated;
  const int64_t work = (schedule.ratio + schedule.overlap) * m.kv_heads *
                       (m.head_dim + m.value_dim + 40) * (matrices ? m.head_dim : 1);
  at::parallel_for(0, m.batch * most, grain(work), [&](int64_t begin, int64_t end) {
    GroupCompressor<T, P> compressor(args);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / most;
      const DueGroups groups = due_groups(m, args.block, b);
      const int64_t g = groups.first + task % most;
      if (g < groups.last) compressor.run(b, g);
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
