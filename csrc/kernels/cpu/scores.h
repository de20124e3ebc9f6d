// Slots where they lie, and the scores of queries with them.
#pragma once

#include "kernels/cpu/blocks.h"
#include "kernels/cpu/queries.h"
#include "kernels/cpu/relative.h"
#include "kernels/cpu/slots.h"
#include "kernels/cpu/softcap.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

// Slots that lie together: numbers first ... first + count - 1 of a region.
template <typename T>
struct Piece {
  int64_t first = 0;
  int64_t count = 0;
  int64_t index = 0;  // of the first one in its ring
  const T* keys = nullptr;
  const T* values = nullptr;
  int64_t key_stride = 0;
  int64_t value_stride = 0;
};

// The ring of one region and kv head.
template <typename T>
class Ring {
 public:
  Ring(const MemoryView& m, Region region, int64_t held, int64_t kv)
      : key_stride_(stored_width<T>(m.head_dim)),
        value_stride_(stored_width<T>(m.value_dim)),
        capacity_(region == kSinks        ? m.clock.schedule.sinks
                  : region == kCompressed ? m.compressed_capacity
                                          : m.window_capacity) {
    const auto head = [&](void* const(&rings)[kRegions], int64_t stride) {
      return ring_row<const T>(rings[region], m.kv_heads, capacity_, stride, held, kv, 0);
    };
    keys_ = head({m.sink_keys, m.compressed_keys, m.window_keys}, key_stride_);
    values_ = head({m.sink_values, m.compressed_values, m.window_values}, value_stride_);
  }

  // The first slots of a range, at most kBlock and not beyond the ring's end.
  Piece<T> piece(const Range& range) const {
    if (range.size() <= 0) return {};
    const int64_t index = range.begin % capacity_;
    const int64_t count = std::min({range.size(), capacity_ - index, kBlock});
    return {range.begin,
            count,
            index,
            keys_ + index * key_stride_,
            values_ + index * value_stride_,
            key_stride_,
            value_stride_};
  }

 private:
  int64_t key_stride_;
  int64_t value_stride_;
  int64_t capacity_;
  const T* keys_;
  const T* values_;
};

// The rows that attend together: all query heads of kv head `kv` for each of some tokens.
struct QueryRows {
  int64_t b = 0;
  int64_t held = 0;  // the memory's row
  int64_t kv = 0;
  int64_t q_per_kv = 1;
  Range tokens;  // of the block
  int64_t count() const { return tokens.size() * q_per_kv; }
};

// How far slot `number` of a region of the memory's row `held` is from the query of token t.
inline double distance(
    const MemoryView& m, Region region, int64_t held, int64_t kv, int64_t t, int64_t number) {
  if (region == kCompressed && m.clock.token_distance && m.slot_positions != nullptr) {
    const int64_t head = held * m.kv_heads + kv;
    const int64_t index = head * m.compressed_capacity + number % m.compressed_capacity;
    return static_cast<double>(t - m.slot_positions[index]);
  }
  return static_cast<double>(query_clock(m.clock, region, t)) - key_clock(m.clock, region, number);
}

// Caps the scores of every row with the slots of a piece, as AttendArgs::logit_softcap says.
template <typename A>
inline void cap_scores(double softcap, int64_t rows, int64_t count, A* scores) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t j = 0; j < count; j += kLanes<A>) {
      A* score = scores + r * kBlock + j;
      store(score, capped<A>(load(score), static_cast<A>(softcap)));
    }
  }
}

// Adds bias and mass of slots, and takes slopes times distances.
template <typename T>
inline void add_biases(const AttendArgs& args,
                       Region region,
                       const QueryRows& rows,
                       const Piece<T>& piece,
                       Acc<T>* scores) {
  using A = Acc<T>;
  const MemoryView& m = args.memory;
  const auto* bias = static_cast<const A*>(region == kCompressed ? args.bias : nullptr);
  const auto* slopes = static_cast<const A*>(args.slopes);
  const A* mass = nullptr;
  if (region == kCompressed && m.slot_mass != nullptr) {
    mass = static_cast<const A*>(m.slot_mass) +
           (rows.held * m.kv_heads + rows.kv) * m.compressed_capacity + piece.index;
  }
  if (bias == nullptr && mass == nullptr && slopes == nullptr) return;
  for (int64_t r = 0; r < rows.count(); ++r) {
    const int64_t head = rows.kv * rows.q_per_kv + r % rows.q_per_kv;
    A* score = scores + r * kBlock;
    if (bias != nullptr) {
      for (int64_t j = 0; j < piece.count; ++j) score[j] += bias[head];
    }
    if (mass != nullptr) {
      for (int64_t j = 0; j < piece.count; ++j) score[j] += mass[j];
    }
    if (slopes == nullptr) continue;
    const int64_t t = args.block.first(rows.b) + rows.tokens.begin + r / rows.q_per_kv;
    for (int64_t j = 0; j < piece.count; ++j) {
      const double apart = distance(m, region, rows.held, rows.kv, t, piece.first + j);
      score[j] -= slopes[head] * static_cast<A>(apart);
    }
  }
}

// Multiplies what belongs to each row of int8 by its scale: numbers[r * kBlock + j] for row j.
template <typename T>
inline void apply_scales([[maybe_unused]] const T* stored,
                         [[maybe_unused]] int64_t stride,
                         [[maybe_unused]] int64_t width,
                         [[maybe_unused]] int64_t count,
                         [[maybe_unused]] int64_t rows,
                         [[maybe_unused]] Acc<T>* numbers) {
  if constexpr (std::is_same_v<T, int8_t>) {
    float scales[kBlock];
    load_scales(stored, stride, width, count, scales);
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = 0; j < count; ++j) numbers[r * kBlock + j] *= scales[j];
    }
  }
}

// The same where every slot is a token with a distance of its own.
template <typename T>
inline void add_relative_tokens(const AttendArgs& args,
                                const RotatedQueries<Acc<T>>& queries,
                                const QueryRows& rows,
                                const Piece<T>& piece,
                                Acc<T>* scores) {
  using A = Acc<T>;
  const int64_t half = args.relative.dim / 2;
  const A* query = queries.relative_rows(kCompressed, rows.b, rows.kv, rows.tokens.begin);
  for (int64_t r = 0; r < rows.count(); ++r) {
    const int64_t t = args.block.first(rows.b) + rows.tokens.begin + r / rows.q_per_kv;
    for (int64_t j = 0; j < piece.count; ++j) {
      const int64_t number = piece.first + j;
      const double apart = distance(args.memory, kCompressed, rows.held, rows.kv, t, number);
      const RotaryTable<A> table = distance_table<A>(2 * half, apart);
      const A* z = query + r * 2 * half;
      scores[r * kBlock + j] += dot(z, table.sine, half) + dot(z + half, table.cosine, half);
    }
  }
}

// Adds the products of the relative queries with the sinusoids of a piece's distances.
template <typename T>
inline void add_relative(const AttendArgs& args,
                         const RotatedQueries<Acc<T>>& queries,
                         Region region,
                         const QueryRows& rows,
                         const Piece<T>& piece,
                         Acc<T>* scores) {
  using A = Acc<T>;
  const Clock& clock = args.memory.clock;
  if (region == kCompressed && clock.token_distance && args.memory.slot_positions != nullptr)
    return add_relative_tokens(args, queries, rows, piece, scores);
  const int64_t half = args.relative.dim / 2;
  const int64_t width = row_width<A>(half);
  const int64_t count = rows.count();
  const int64_t middle = piece.count / 2;
  thread_local std::vector<A> room;  // kept from step to step
  const size_t size = 2 * count * (width + kBlock);
  if (room.size() < size) room.resize(size);
  A* odd_rows = room.data();
  A* even_rows = odd_rows + count * width;
  A* odd = even_rows + count * width;
  A* even = odd + count * kBlock;
  const A* query = queries.relative_rows(region, rows.b, rows.kv, rows.tokens.begin);
  const double key = key_clock(clock, region, piece.first + middle);
  for (int64_t r = 0; r < count; ++r) {
    const int64_t t = args.block.first(rows.b) + rows.tokens.begin + r / rows.q_per_kv;
    const double apart = static_cast<double>(query_clock(clock, region, t)) - key;
    split_relative(query + r * 2 * half,
                   distance_table<A>(2 * half, apart),
                   half,
                   odd_rows + r * width,
                   even_rows + r * width);
    std::fill(odd_rows + r * width + half, odd_rows + (r + 1) * width, A(0));
    std::fill(even_rows + r * width + half, even_rows + (r + 1) * width, A(0));
  }
  const PlaceTable<A>& places = place_table<A>(2 * half, key_step(clock, region));
  by_rows(count, [&](auto number, int64_t r) {
    constexpr int R = decltype(number)::value;
    const int64_t row = r * width;
    const int64_t to = r * kBlock;
    score_rows<R>(odd_rows + row, places.sines(), middle + 1, half, half, odd + to);
    score_rows<R>(even_rows + row, places.cosines(), middle + 1, half, half, even + to);
  });
  for (int64_t r = 0; r < count; ++r) {
    A* score = scores + r * kBlock + middle;
    const A* s = odd + r * kBlock;
    const A* c = even + r * kBlock;
    score[0] += c[0];
    for (int64_t p = 1; p <= middle; ++p) score[-p] += c[p] + s[p];
    for (int64_t p = 1; p < piece.count - middle; ++p) score[p] += c[p] - s[p];
  }
}

// scores[r * kBlock + j] of every row with slot j of a piece.
template <typename T>
inline void score_piece(const AttendArgs& args,
                        const RotatedQueries<Acc<T>>& queries,
                        Region region,
                        const QueryRows& rows,
                        const Piece<T>& piece,
                        Acc<T>* scores) {
  const int64_t width = args.memory.head_dim;
  const auto* query = queries.rows(region, rows.b, rows.kv, rows.tokens.begin);
  by_rows(rows.count(), [&](auto number, int64_t r) {
    constexpr int R = decltype(number)::value;
    score_rows<R>(query + r * row_width<Acc<T>>(width),
                  piece.keys,
                  piece.count,
                  width,
                  piece.key_stride,
                  scores + r * kBlock);
  });
  apply_scales(piece.keys, piece.key_stride, width, piece.count, rows.count(), scores);
  if (args.relative.dim > 0) add_relative(args, queries, region, rows, piece, scores);
  if (args.logit_softcap > 0) cap_scores(args.logit_softcap, rows.count(), piece.count, scores);
  add_biases(args, region, rows, piece, scores);
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
