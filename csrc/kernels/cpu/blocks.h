// The two products of attention on a block of slots that lie together: queries with keys, weights
// with values. Several rows (query heads that share a kv head, tokens that see the same slots) are
// taken at once, so that a key is loaded and widened once for all of them, and several keys, so
// that no multiply-add waits for the one before it.
#pragma once

#include "kernels/cpu/simd.h"

// Loops over registers must be unrolled, or the registers become an array in memory.
#define CTX_UNROLL _Pragma("GCC unroll 16")

namespace ctx::cpu::CTX_CPU_CAPABILITY {

inline constexpr int64_t kBlock = 64;  // slots whose scores are held at once
static_assert(kBlock % kLanes<float> == 0);

// Asks for the cache line that is read soon. The processor's own prefetcher stops at the end of a
// page, and a block of values is read between two blocks of keys.
inline void prefetch_ahead(const void* now) {
  constexpr int64_t kAhead = 4096;  // bytes; measured
  __builtin_prefetch(static_cast<const char*>(now) + kAhead, 0, 3);
}
// The same for the elements of a pair: every line once.
template <typename T>
inline void prefetch_pair_ahead(const T* now, int64_t d) {
  constexpr int64_t kLine = 64 / sizeof(T);
  constexpr int64_t kPair = 2 * kLanes<Acc<T>>;
  if constexpr (kPair < kLine) {
    if (d % kLine == 0) prefetch_ahead(now);
  } else {
    CTX_UNROLL for (int64_t i = 0; i < kPair; i += kLine) prefetch_ahead(now + i);
  }
}

// Scores of R rows with `count` keys, scores[r * kBlock + j] = queries[r] . keys[j]; keys are
// `key_stride` elements apart, rows row_width, end in zeros and are in T's order (load_as). Places
// up to the next whole vector are written, too.
template <int R, typename T>
inline void score_rows(const Acc<T>* __restrict queries,
                       const T* __restrict keys,
                       int64_t count,
                       int64_t width,
                       int64_t key_stride,
                       Acc<T>* __restrict scores) {
  using A = Acc<T>;
  constexpr int kLane = kLanes<A>;
  constexpr int K = std::min({4, kAccumulators / R, kLane});  // keys at once
  const int64_t stride = row_width<A>(width);
  const int64_t whole = width / (2 * kLane) * (2 * kLane);
  const int64_t left = width - whole;
  for (int64_t j = 0; j < count; j += kLane) {
    Vec<A> sums[R][kLane];
    if (count - j < kLane) std::memset(sums, 0, sizeof(sums));
    for (int64_t i = 0; i < std::min<int64_t>(kLane, count - j); i += K) {
      const T* key[K];  // past the end: the last one again
      CTX_UNROLL for (int k = 0; k < K; ++k) key[k] =
          keys + std::min(j + i + k, count - 1) * key_stride;
      Vec<A> sum[R][K] = {};
      const auto multiply = [&](int64_t d, auto load_key) {
        Pair<A> q[R];
        CTX_UNROLL for (int r = 0; r < R; ++r) {
          const A* query = queries + r * stride + d;
          q[r] = {load(query), load(query + kLane)};
        }
        CTX_UNROLL for (int k = 0; k < K; ++k) {
          prefetch_pair_ahead(key[k] + d, d);
          const Pair<A> x = load_key(key[k] + d);
          CTX_UNROLL for (int r = 0; r < R; ++r) {
            sum[r][k] += q[r].first * x.first;
            sum[r][k] += q[r].second * x.second;
          }
        }
      };
      for (int64_t d = 0; d < whole; d += 2 * kLane)
        multiply(d, [](const T* x) { return load_pair(x); });
      if (left > 0) multiply(whole, [&](const T* x) { return load_some_of_pair(x, left); });
      CTX_UNROLL for (int r = 0; r < R; ++r) CTX_UNROLL for (int k = 0; k < K; ++k) sums[r][i + k] =
          sum[r][k];
    }
    CTX_UNROLL for (int r = 0; r < R; ++r) store(scores + r * kBlock + j, sums_of<A>(sums[r]));
  }
}

// sums[r] += sum_j weights[r * kBlock + j] values[j] for R rows, P pairs of vectors from column d
// on; rows of sums are row_width apart.
template <int R, int P, typename T>
inline void add_columns(const Acc<T>* __restrict weights,
                        const T* __restrict values,
                        int64_t count,
                        int64_t width,
                        int64_t value_stride,
                        int64_t d,
                        Acc<T>* __restrict sums) {
  using A = Acc<T>;
  constexpr int64_t kPair = 2 * kLanes<A>;
  const int64_t stride = row_width<A>(width);
  const int64_t left = width - d;
  Pair<A> sum[R][P];
  CTX_UNROLL for (int r = 0; r < R; ++r) CTX_UNROLL for (int i = 0; i < P; ++i) sum[r][i] =
      load_as<T>(sums + r * stride + d + i * kPair);
  const auto add = [&](auto load_values) {
    for (int64_t j = 0; j < count; ++j) {
      Pair<A> value[P];
      CTX_UNROLL for (int i = 0; i < P; ++i) {
        const T* source = values + j * value_stride + d + i * kPair;
        prefetch_pair_ahead(source, d + i * kPair);
        value[i] = load_values(source);
      }
      CTX_UNROLL for (int r = 0; r < R; ++r) {
        const Vec<A> weight = broadcast(weights[r * kBlock + j]);
        CTX_UNROLL for (int i = 0; i < P; ++i) {
          sum[r][i].first += weight * value[i].first;
          sum[r][i].second += weight * value[i].second;
        }
      }
    }
  };
  if (P == 1 && left < kPair) {
    add([&](const T* x) { return load_some_of_pair(x, left); });
  } else {
    add([](const T* x) { return load_pair(x); });
  }
  CTX_UNROLL for (int r = 0; r < R; ++r) CTX_UNROLL for (int i = 0; i < P; ++i)
      store_from<T>(sums + r * stride + d + i * kPair, sum[r][i]);
}

// The same for all columns.
template <int R, typename T>
inline void add_rows(const Acc<T>* weights,
                     const T* values,
                     int64_t count,
                     int64_t width,
                     int64_t value_stride,
                     Acc<T>* sums) {
  constexpr int64_t kPair = 2 * kLanes<Acc<T>>;
  constexpr int kMost = std::min(4, kAccumulators / R / 2);
  static_assert(kMost >= 1);
  int64_t d = 0;
  const auto columns = [&](auto pairs) {
    constexpr int P = decltype(pairs)::value;
    if constexpr (P <= kMost) {
      for (; d + P * kPair <= width; d += P * kPair)
        add_columns<R, P>(weights, values, count, width, value_stride, d, sums);
    }
  };
  columns(std::integral_constant<int, 4>{});
  columns(std::integral_constant<int, 2>{});
  columns(std::integral_constant<int, 1>{});
  if (d < width) add_columns<R, 1>(weights, values, count, width, value_stride, d, sums);
}

// Runs over rows by fours, and the rest: run(integral_constant<int, R>, first row).
template <typename F>
inline void by_rows(int64_t rows, const F& run) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) run(std::integral_constant<int, 4>{}, r);
  for (; r + 2 <= rows; r += 2) run(std::integral_constant<int, 2>{}, r);
  if (r < rows) run(std::integral_constant<int, 1>{}, r);
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
