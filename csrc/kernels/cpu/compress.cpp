// c tokens -> 1 slot: a group is read back from the window ring, its keys are rotated back by their
// tokens' positions, compressed in the arithmetic's type, and rotated to the slot's position.
#include <ATen/Parallel.h>

#include <limits>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/rotary.h"
#include "kernels/cpu/slots.h"
#include "kernels/cpu/table.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {
namespace {

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

// slot = sum_i x_i W_i (+ bias); weight [c, width, width] of one head.
template <typename A, typename P>
void convolve(const A* x,
              const P* weight,
              const P* bias,
              int64_t c,
              int64_t width,
              A* slot,
              A* parameter_row) {
  std::fill_n(slot, width, A(0));
  if (bias != nullptr) load_row(bias, slot, width);
  for (int64_t id = 0; id < c * width; ++id) {
    load_row(weight + id * width, parameter_row, width);
    axpy(x[id], parameter_row, slot, width);
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

template <typename T, typename P>
class GroupCompressor {
 public:
  using A = Acc<T>;

  explicit GroupCompressor(const CompressArgs& args)
      : args_(args), m_(args.memory), c_(m_.clock.schedule.ratio) {
    const int64_t wide = std::max(m_.head_dim, m_.value_dim);
    tables_.resize(c_ + 1);
    angles_.resize((c_ + 1) * m_.rotary.dim);
    buffer_.resize(c_ * (m_.head_dim + m_.value_dim) + 2 * wide + c_);
    keys_ = buffer_.data();
    values_ = keys_ + c_ * m_.head_dim;
    slot_ = values_ + c_ * m_.value_dim;
    row_ = slot_ + wide;
    weights_ = row_ + wide;
  }

  void run(int64_t b, int64_t g) {
    const int64_t first = m_.clock.schedule.first_token(g);
    for (int64_t i = 0; i < c_; ++i) table(i, static_cast<double>(first + i));
    table(c_, m_.clock.group_key(g));
    const int64_t target = g % m_.compressed_capacity;
    const bool given = args_.kind == CompressorKind::kGiven;
    if (given) {
      const int64_t start = -args_.block.origin[b];
      given_ = group_block(m_.clock.schedule, start, g) - args_.slot_block[b];
    }
    for (int64_t h = 0; h < m_.kv_heads; ++h) {
      for (int64_t i = 0; i < c_ && !given; ++i) {
        const int64_t index = (first + i) % m_.window_capacity;
        A* key = keys_ + i * m_.head_dim;
        load_row(
            ring_row<T>(m_.window_keys, m_.kv_heads, m_.window_capacity, m_.head_dim, b, h, index),
            key,
            m_.head_dim);
        rotate_row(m_.rotary, tables_[i], A(-1), key);
        load_row(ring_row<T>(
                     m_.window_values, m_.kv_heads, m_.window_capacity, m_.value_dim, b, h, index),
                 values_ + i * m_.value_dim,
                 m_.value_dim);
      }
      make(b, h, keys_, m_.head_dim, 0);
      rotate_row(m_.rotary, tables_[c_], A(1), slot_);
      store(m_.compressed_keys, m_.head_dim, b, h, target);
      make(b, h, values_, m_.value_dim, 1);
      store(m_.compressed_values, m_.value_dim, b, h, target);
    }
  }

 private:
  void store(void* ring, int64_t width, int64_t b, int64_t h, int64_t index) {
    dispatch_slots<T>(m_.compressed_storage, [&](auto type) {
      using S = decltype(type);
      const int64_t stored = stored_width<S>(width);
      store_slot(slot_,
                 ring_row<S>(ring, m_.kv_heads, m_.compressed_capacity, stored, b, h, index),
                 width);
    });
  }

  void table(int64_t i, double position) {
    A* angles = angles_.data() + i * m_.rotary.dim;
    tables_[i] = make_rotary_table(m_.rotary, position, angles);
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
                        parameter(side, h, c_ * width * width),
                        parameter(2 + side, h, width),
                        c_,
                        width,
                        slot_,
                        row_);
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
    }
  }

  const CompressArgs& args_;
  const MemoryView& m_;
  int64_t c_;
  int64_t given_ = 0;                   // which of the given slots
  std::vector<RotaryTable<A>> tables_;  // of the tokens, then of the slot
  std::vector<A> angles_;
  std::vector<A> buffer_;
  A* keys_;
  A* values_;
  A* slot_;
  A* row_;
  A* weights_;
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
  const int64_t work = schedule.ratio * m.kv_heads * (m.head_dim + m.value_dim + 40) *
                       (args.kind == CompressorKind::kConv ? m.head_dim : 1);
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
  dispatch(args.memory.storage, [&](auto type) {
    using T = decltype(type);
    args.wide_parameters ? compress_rows<T, Acc<T>>(args) : compress_rows<T, T>(args);
  });
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
