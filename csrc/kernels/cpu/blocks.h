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
static_assert(kBlock % kAccumulators == 0);

// Asks for bytes that are needed soon. The processor's own prefetcher stops at the end of a page and
// does not know that values follow keys; without this, arithmetic and memory take turns.
inline void prefetch(const void* begin, int64_t bytes) {
  constexpr int64_t kCacheLine = 64;
  const char* line = static_cast<const char*>(begin);
  for (int64_t i = 0; i < bytes; i += kCacheLine) __builtin_prefetch(line + i, 0, 2);
}

// Scores of R rows with `count` keys, scores[r * kBlock + j] = queries[r] . keys[j]; keys are
// `key_stride` elements apart, rows `padded`, and rows end in zeros. Places up to the next multiple
// of kAccumulators are written, too. Meanwhile as many rows of `ahead` are asked for, if it is not null.
template <int R, typename T>
inline void score_rows(const Acc<T>* __restrict queries,
                       const T* __restrict keys,
                       int64_t count,
                       int64_t width,
                       int64_t key_stride,
                       const char* ahead,
                       int64_t ahead_bytes,  // of a row
                       Acc<T>* __restrict scores) {
  using A = Acc<T>;
  constexpr int kLane = kLanes<A>;
  constexpr int K = kAccumulators / R;  // keys at once
  const int64_t stride = padded<A>(width);
  const int64_t whole = width / kLane * kLane;
  for (int64_t j = 0; j < count; j += K) {
    if (ahead != nullptr) prefetch(ahead + j * ahead_bytes, K * ahead_bytes);
    const T* key[K];  // past the end: the last one again
    CTX_UNROLL for (int k = 0; k < K; ++k) key[k] = keys + std::min(j + k, count - 1) * key_stride;
    Vec<A> sums[kAccumulators] = {};
    const auto multiply = [&](int64_t d, auto load_key) {
      Vec<A> q[R];
      CTX_UNROLL for (int r = 0; r < R; ++r) q[r] = load(queries + r * stride + d);
      CTX_UNROLL for (int k = 0; k < K; ++k) {
        const Vec<A> x = load_key(key[k] + d);
        CTX_UNROLL for (int r = 0; r < R; ++r) sums[r * K + k] += q[r] * x;
      }
    };
    for (int64_t d = 0; d < whole; d += kLane) multiply(d, [](const T* x) { return load(x); });
    if (whole < width) multiply(whole, [&](const T* x) { return load_some(x, width - whole); });
    A total[kAccumulators];
    CTX_UNROLL for (int i = 0; i < kAccumulators; i += kLane)
        store(total + i, sums_of<A>(sums + i));
    for (int r = 0; r < R; ++r) std::memcpy(scores + r * kBlock + j, total + r * K, K * sizeof(A));
  }
}

// sums[r] += sum_j weights[r * kBlock + j] values[j] for R rows, V vectors from column d on.
template <int R, int V, typename T>
inline void add_columns(const Acc<T>* __restrict weights,
                        const T* __restrict values,
                        int64_t count,
                        int64_t width,
                        int64_t value_stride,
                        int64_t d,
                        Acc<T>* __restrict sums) {
  using A = Acc<T>;
  const int64_t stride = padded<A>(width);
  const int64_t left = width - d;
  Vec<A> sum[R][V];
  CTX_UNROLL for (int r = 0; r < R; ++r) CTX_UNROLL for (int i = 0; i < V; ++i) sum[r][i] =
      load(sums + r * stride + d + i * kLanes<A>);
  const auto add = [&](auto load_value) {
    for (int64_t j = 0; j < count; ++j) {
      Vec<A> value[V];
      CTX_UNROLL for (int i = 0; i < V; ++i) value[i] =
          load_value(values + j * value_stride + d + i * kLanes<A>);
      CTX_UNROLL for (int r = 0; r < R; ++r) {
        const Vec<A> weight = broadcast(weights[r * kBlock + j]);
        CTX_UNROLL for (int i = 0; i < V; ++i) sum[r][i] += weight * value[i];
      }
    }
  };
  if (V == 1 && left < kLanes<A>) {
    add([&](const T* x) { return load_some(x, left); });
  } else {
    add([](const T* x) { return load(x); });
  }
  CTX_UNROLL for (int r = 0; r < R; ++r) CTX_UNROLL for (int i = 0; i < V; ++i)
      store(sums + r * stride + d + i * kLanes<A>, sum[r][i]);
}

// The same for all columns.
template <int R, typename T>
inline void add_rows(const Acc<T>* weights,
                     const T* values,
                     int64_t count,
                     int64_t width,
                     int64_t value_stride,
                     Acc<T>* sums) {
  constexpr int kMost = R == 1 ? 8 : kAccumulators / R;
  int64_t d = 0;
  const auto columns = [&](auto vectors) {
    constexpr int V = decltype(vectors)::value;
    if constexpr (V <= kMost) {
      for (; d + V * kLanes<Acc<T>> <= width; d += V * kLanes<Acc<T>>)
        add_columns<R, V>(weights, values, count, width, value_stride, d, sums);
    }
  };
  columns(std::integral_constant<int, 8>{});
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
