// One softmax over sinks, compressed slots and window. A region is a ring, so what a query sees of
// it is at most two contiguous pieces; they are walked in blocks of keys with a running maximum and
// sum (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135), each key
// read once for all query heads that share it.
#include <ATen/Parallel.h>

#include <limits>
#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/rotary.h"
#include "kernels/cpu/table.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {
namespace {

constexpr int64_t kBlock = 64;  // keys whose scores are held at once

enum Region : int64_t { kSinks = 0, kCompressed = 1, kWindow = 2, kRegions = 3 };

// Queries rotated to the three clocks: [regions, B, tokens, H, D], scaled. Made once for all tasks
// of a block.
template <typename A>
class RotatedQueries {
 public:
  RotatedQueries(const AttendArgs& args, std::vector<A>& storage) : args_(args), storage_(storage) {
    storage_.resize(kRegions * args.memory.batch * args.block.tokens * args.heads *
                    args.memory.head_dim);
  }

  A* at(int64_t region, int64_t b, int64_t i, int64_t h) const {
    const int64_t token = (region * args_.memory.batch + b) * args_.block.tokens + i;
    return storage_.data() + (token * args_.heads + h) * args_.memory.head_dim;
  }

  template <typename T>
  void fill(int64_t b, int64_t i) {
    const MemoryView& m = args_.memory;
    const int64_t t = args_.block.first(b) + i;
    const double clocks[kRegions] = {static_cast<double>(m.clock.sink_query(t)),
                                     static_cast<double>(m.clock.group_query(t)),
                                     static_cast<double>(t)};
    thread_local std::vector<A> table;
    table.resize(m.rotary.dim);
    for (int64_t region = 0; region < kRegions; ++region) {
      rotary_table(m.rotary, clocks[region], table.data(), table.data() + m.rotary.dim / 2);
      for (int64_t h = 0; h < args_.heads; ++h) {
        A* query = at(region, b, i, h);
        load_row(row<T>(args_.queries, b, h, args_.block.offset + i), query, m.head_dim);
        rotate_row(m.rotary, table.data(), table.data() + m.rotary.dim / 2, A(1), query);
        scale_row(static_cast<A>(args_.scale), query, m.head_dim);
      }
    }
  }

 private:
  const AttendArgs& args_;
  std::vector<A>& storage_;
};

// The query heads of one kv head at one token.
template <typename T>
class Attention {
 public:
  using A = Acc<T>;

  Attention(const AttendArgs& args, const RotatedQueries<A>& queries)
      : args_(args), m_(args.memory), queries_(queries), share_(args.heads / m_.kv_heads) {
    const int64_t wide = std::is_same_v<T, A> ? 0 : std::max(m_.head_dim, m_.value_dim);
    buffer_.resize(share_ * (kBlock + m_.value_dim + 2 + kRegions) + wide);
    scores_ = buffer_.data();
    sums_ = scores_ + share_ * kBlock;
    largest_ = sums_ + share_ * m_.value_dim;
    total_ = largest_ + share_;
    mass_ = total_ + share_;
    row_ = mass_ + share_ * kRegions;
  }

  void run(int64_t b, int64_t kv, int64_t i) {
    b_ = b, kv_ = kv, i_ = i;
    const int64_t t = args_.block.first(b) + i;
    if (t < 0 || i >= args_.block.count(b)) return store_zeros();
    t_ = t;
    std::fill_n(sums_, share_ * m_.value_dim, A(0));
    std::fill_n(largest_, share_, -std::numeric_limits<A>::infinity());
    std::fill_n(total_, share_, A(0));
    std::fill_n(mass_, share_ * kRegions, A(0));
    const Schedule& schedule = m_.clock.schedule;
    const int64_t n = schedule.groups(t);
    span(kSinks, m_.sink_keys, m_.sink_values, schedule.sinks, 0, schedule.visible_sinks(t));
    keep_mass(kSinks);
    if (m_.compressed_capacity > 0) {
      span(kCompressed,
           m_.compressed_keys,
           m_.compressed_values,
           m_.compressed_capacity,
           n - schedule.slots(t),
           n);
    }
    keep_mass(kCompressed);
    span(kWindow, m_.window_keys, m_.window_values, m_.window_capacity, schedule.edge(t), t + 1);
    keep_mass(kWindow);
    store();
    if (args_.count_usage) count_usage(schedule.edge(t), t + 1);
  }

 private:
  // Slots begin ... end - 1 of a ring, as at most two contiguous pieces.
  void span(Region region, void* keys, void* values, int64_t capacity, int64_t begin, int64_t end) {
    while (begin < end) {
      const int64_t index = begin % capacity;
      const int64_t count = std::min({end - begin, capacity - index, kBlock});
      block(region,
            ring_row<T>(keys, m_.kv_heads, capacity, m_.head_dim, b_, kv_, index),
            ring_row<T>(values, m_.kv_heads, capacity, m_.value_dim, b_, kv_, index),
            begin,
            count);
      begin += count;
    }
  }

  // Scores of slots begin ... begin + count - 1 of a region, whose keys lie together.
  void score(Region region, const T* keys, int64_t begin, int64_t count) {
    for (int64_t j = 0; j < count; ++j) {
      const A* key = widen(keys + j * m_.head_dim, m_.head_dim);
      for (int64_t r = 0; r < share_; ++r) {
        scores_[r * kBlock + j] =
            dot(queries_.at(region, b_, i_, kv_ * share_ + r), key, m_.head_dim);
      }
    }
    const auto per_head = [&](const void* values, int64_t r) {
      return values == nullptr ? A(0) : static_cast<const A*>(values)[kv_ * share_ + r];
    };
    for (int64_t r = 0; r < share_; ++r) {
      A* scores = scores_ + r * kBlock;
      const A bias = per_head(region == kCompressed ? args_.bias : nullptr, r);
      for (int64_t j = 0; j < count; ++j) scores[j] += bias;
      if (args_.slopes == nullptr) continue;
      const A slope = per_head(args_.slopes, r);
      for (int64_t j = 0; j < count; ++j)
        scores[j] -= slope * static_cast<A>(distance(region, begin + j));
    }
  }

  // How far slot `number` of a region is from the query.
  double distance(Region region, int64_t number) const {
    switch (region) {
      case kSinks:
        return static_cast<double>(m_.clock.sink_query(t_) - number);
      case kCompressed: {
        if (m_.clock.token_distance && m_.slot_positions != nullptr) {
          const int64_t head = b_ * m_.kv_heads + kv_;
          const int64_t index = head * m_.compressed_capacity + number % m_.compressed_capacity;
          return static_cast<double>(t_ - m_.slot_positions[index]);
        }
        return static_cast<double>(m_.clock.group_query(t_)) - m_.clock.group_key(number);
      }
      default:
        return static_cast<double>(t_ - number);
    }
  }

  void block(Region region, const T* keys, const T* values, int64_t begin, int64_t count) {
    score(region, keys, begin, count);
    for (int64_t r = 0; r < share_; ++r) {
      A* scores = scores_ + r * kBlock;
      A largest = largest_[r];
      for (int64_t j = 0; j < count; ++j) largest = std::max(largest, scores[j]);
      // All scores minus infinity so far (a bias may be): their weights are zero, not NaN.
      const A reference = std::isinf(largest) && largest < 0 ? A(0) : largest;
      const A shrink = exp_row_value(largest_[r] - reference);
      A total = 0;
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < count; ++j) total += scores[j] = exp_row_value(scores[j] - reference);
      total_[r] = total_[r] * shrink + total;
      if (shrink != A(1)) {
        scale_row(shrink, sums_ + r * m_.value_dim, m_.value_dim);
        scale_row(shrink, mass_ + r * kRegions, kRegions);
      }
      largest_[r] = largest;
    }
    for (int64_t j = 0; j < count; ++j) {
      const A* value = widen(values + j * m_.value_dim, m_.value_dim);
      for (int64_t r = 0; r < share_; ++r)
        axpy(scores_[r * kBlock + j], value, sums_ + r * m_.value_dim, m_.value_dim);
    }
  }

  // What has been summed up so far and is no earlier region's.
  void keep_mass(Region region) {
    for (int64_t r = 0; r < share_; ++r) {
      A* mass = mass_ + r * kRegions;
      A before = 0;
      for (int64_t earlier = 0; earlier < region; ++earlier) before += mass[earlier];
      mass[region] = total_[r] - before;
    }
  }

  // Weights are known once all is summed up: the window's scores are made a second time.
  void count_usage(int64_t begin, int64_t end) {
    const int64_t head = b_ * m_.kv_heads + kv_;
    A* usage = static_cast<A*>(m_.usage) + head * m_.window_capacity;
    while (begin < end) {
      const int64_t index = begin % m_.window_capacity;
      const int64_t count = std::min({end - begin, m_.window_capacity - index, kBlock});
      const T* keys =
          ring_row<T>(m_.window_keys, m_.kv_heads, m_.window_capacity, m_.head_dim, b_, kv_, index);
      score(kWindow, keys, begin, count);
      for (int64_t r = 0; r < share_; ++r) {
        const A share = A(1) / (total_[r] * static_cast<A>(share_));
        for (int64_t j = 0; j < count; ++j)
          usage[index + j] += exp_row_value(scores_[r * kBlock + j] - largest_[r]) * share;
      }
      begin += count;
    }
  }

  // The row itself where it is stored in the arithmetic's type, a widened copy elsewhere.
  const A* widen(const T* source, int64_t n) {
    if constexpr (std::is_same_v<T, A>) {
      return source;
    } else {
      load_row(source, row_, n);
      return row_;
    }
  }

  T* out(int64_t r) const {
    return row<T>(args_.out, b_, kv_ * share_ + r, args_.block.offset + i_);
  }

  void store() {
    for (int64_t r = 0; r < share_; ++r) {
      A* sum = sums_ + r * m_.value_dim;
      scale_row(A(1) / total_[r], sum, m_.value_dim);
      store_row(sum, out(r), m_.value_dim);
      if (args_.mass == nullptr) continue;
      for (int64_t region = 0; region < kRegions; ++region)
        mass_out(r)[region] = mass_[r * kRegions + region] / total_[r];
    }
  }

  void store_zeros() {
    for (int64_t r = 0; r < share_; ++r) {
      std::fill_n(out(r), m_.value_dim, T(0));
      if (args_.mass != nullptr) std::fill_n(mass_out(r), int64_t{kRegions}, A(0));
    }
  }

  A* mass_out(int64_t r) const {
    const int64_t head = b_ * args_.heads + kv_ * share_ + r;
    const int64_t token = head * args_.call_tokens + args_.block.offset + i_;
    return static_cast<A*>(args_.mass) + token * kRegions;
  }

  const AttendArgs& args_;
  const MemoryView& m_;
  const RotatedQueries<A>& queries_;
  int64_t share_;
  int64_t b_ = 0;
  int64_t kv_ = 0;
  int64_t i_ = 0;
  int64_t t_ = 0;
  std::vector<A> buffer_;
  A* scores_;
  A* sums_;
  A* largest_;
  A* total_;
  A* mass_;
  A* row_;
};

template <typename T>
void attend_rows(const AttendArgs& args) {
  const MemoryView& m = args.memory;
  const int64_t tokens = args.block.tokens;
  thread_local std::vector<Acc<T>> storage;  // the calling thread's: kept from step to step
  RotatedQueries<Acc<T>> queries(args, storage);
  at::parallel_for(
      0, m.batch * tokens, grain(args.heads * m.head_dim * 6), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
          queries.template fill<T>(task / tokens, task % tokens);
      });
  const int64_t slots = m.clock.schedule.sinks + m.compressed_capacity + m.window_capacity;
  const int64_t work = slots * (args.heads / m.kv_heads) * (m.head_dim + m.value_dim);
  if (args.count_usage) {  // in the order of the tokens: queries of one head add to the same sums
    at::parallel_for(
        0, m.batch * m.kv_heads, grain(work * tokens), [&](int64_t begin, int64_t end) {
          Attention<T> attention(args, queries);
          for (int64_t task = begin; task < end; ++task) {
            for (int64_t i = 0; i < tokens; ++i)
              attention.run(task / m.kv_heads, task % m.kv_heads, i);
          }
        });
    return;
  }
  at::parallel_for(0, m.batch * m.kv_heads * tokens, grain(work), [&](int64_t begin, int64_t end) {
    Attention<T> attention(args, queries);
    for (int64_t task = begin; task < end; ++task) {
      attention.run(task / (m.kv_heads * tokens), task / tokens % m.kv_heads, task % tokens);
    }
  });
}

}  // namespace

void attend(const AttendArgs& args) {
  dispatch(args.memory.storage, [&](auto type) { attend_rows<decltype(type)>(args); });
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
