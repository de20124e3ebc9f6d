// A softmax in progress for some rows: a running maximum and sums relative to it (Milakov &
// Gimelshein 2018, arXiv:1805.02867), block by block. Two that saw different slots can be merged
// (Dao et al. 2022, arXiv:2205.14135).
#pragma once

#include <limits>

#include "kernels/cpu/blocks.h"
#include "kernels/cpu/queries.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

template <typename A>
struct Softmax {
  int64_t rows = 0;
  int64_t q_per_kv = 1;  // rows that are one token's
  int64_t width = 0;     // of a row of sums: row_width
  A* sums = nullptr;     // [rows, width] weighted values
  A* largest = nullptr;  // [rows] largest score so far
  A* totals = nullptr;   // [rows, regions] weights of each region

  static int64_t size(int64_t rows, int64_t value_dim) {
    return rows * (row_width<A>(value_dim) + 1 + kRegions);
  }

  Softmax(A* memory, int64_t row_count, int64_t rows_of_token, int64_t value_dim)
      : rows(row_count),
        q_per_kv(rows_of_token),
        width(row_width<A>(value_dim)),
        sums(memory),
        largest(memory + rows * width),
        totals(largest + rows) {}

  // Rows first ... first + count - 1.
  Softmax part(int64_t first, int64_t count) const {
    Softmax some = *this;
    some.rows = count;
    some.sums += first * width;
    some.largest += first;
    some.totals += first * kRegions;
    return some;
  }

  void clear() {
    std::fill_n(sums, rows * width, A(0));
    std::fill_n(largest, rows, -std::numeric_limits<A>::infinity());
    std::fill_n(totals, rows * kRegions, A(0));
  }

  A total(int64_t r) const {
    A sum = 0;
    for (int64_t region = 0; region < kRegions; ++region) sum += totals[r * kRegions + region];
    return sum;
  }

  // Turns `count` scores of row r into weights, which the values are to be added with. What stands
  // behind them is made zero, up to a whole vector.
  void weigh(int64_t r, Region region, A* scores, int64_t count) {
    const int64_t end = padded<A>(count);
    std::fill(scores + count, scores + end, -std::numeric_limits<A>::infinity());
    Vec<A> most = broadcast(largest[r]);
    for (int64_t j = 0; j < end; j += kLanes<A>) most = largest_of<A>(load(scores + j), most);
    raise(r, largest_lane<A>(most));
    const Vec<A> reference = broadcast(finite(largest[r]));
    Vec<A> total{};
    for (int64_t j = 0; j < end; j += kLanes<A>) {
      const Vec<A> weight = exponential(load(scores + j) - reference);
      store(scores + j, weight);
      total += weight;
    }
    totals[r * kRegions + region] += sum_lanes<A>(total);
  }

  // Adds row r's final weights of `count` scores to `usage`, as the row's part of a mean over the
  // rows of its token.
  void add_weights(int64_t r, const A* scores, int64_t count, A* usage) const {
    const A factor = A(1) / (total(r) * static_cast<A>(q_per_kv));
    for (int64_t j = 0; j < count; ++j)
      usage[j] += exponential_of(scores[j] - finite(largest[r])) * factor;
  }

  // Adds what another one made of other slots for the same rows.
  void merge(const Softmax& other) {
    for (int64_t r = 0; r < rows; ++r) {
      raise(r, std::max(largest[r], other.largest[r]));
      const A factor = exponential_of(other.largest[r] - finite(largest[r]));
      axpy(factor, other.sums + r * width, sums + r * width, width);
      axpy(factor, other.totals + r * kRegions, totals + r * kRegions, kRegions);
    }
  }

 private:
  // All scores minus infinity so far (a bias may be): their weights are zero, not NaN.
  static A finite(A largest_score) {
    return largest_score == -std::numeric_limits<A>::infinity() ? A(0) : largest_score;
  }

  void raise(int64_t r, A to) {
    if (to == largest[r]) return;
    const A shrink = exponential_of(largest[r] - finite(to));
    scale_row(shrink, sums + r * width, width);
    scale_row(shrink, totals + r * kRegions, kRegions);
    largest[r] = to;
  }
};

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
