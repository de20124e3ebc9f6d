// Vectors of this instruction set's width, and the matrix product that the spans' kernels are made
// of. Compilers that know `vector_size` lower it to any instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "kernels/cpu/simd.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

#if defined(__AVX512F__)
constexpr int kPanelVectors = 4;  // 6 x 4 sums, 4 operands and a broadcast: 29 of 32 registers
#else
constexpr int kPanelVectors = 2;  // 6 x 2 sums: 15 of 16 registers
#endif
constexpr int kProductRows = 6;

// Integers that lanes of A are compared by.
template <typename A>
using LaneInteger = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;
template <typename A>
inline typename VectorOf<LaneInteger<A>>::type load_integers(const LaneInteger<A>* source) {
  typename VectorOf<LaneInteger<A>>::type x;
  std::memcpy(&x, source, sizeof(x));
  return x;
}

// Buffers of one task, aligned to the widest vector: a row that straddles two cache lines costs
// two loads.
template <typename A>
class Scratch {
 public:
  // Room for n numbers of A, at the start of a cache line.
  A* take(int64_t n) {
    blocks_.emplace_back(n + 64 / sizeof(A));
    const auto address = reinterpret_cast<uintptr_t>(blocks_.back().data());
    return reinterpret_cast<A*>((address + 63) / 64 * 64);
  }

 private:
  std::vector<std::vector<A>> blocks_;
};

inline int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

// How the rows of a product's left operand lie: element (m, k) is a[m * stride + k], or the
// transpose of such a matrix, a[m + k * stride].
enum class Left { kRows, kColumns };

// C (+)= A B for kRows x kVectors vectors of C, all sums in registers.
template <Left kLeft, int kRows, int kVectors, typename A>
inline void multiply_tile(int64_t depth,
                          const A* __restrict a,
                          int64_t a_stride,
                          const A* __restrict b,
                          int64_t b_stride,
                          A* __restrict c,
                          int64_t c_stride,
                          bool add) {
  Vec<A> sum[kRows][kVectors] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> right[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) right[v] = load(b + v * kLanes<A>);
#pragma GCC unroll 6
    for (int m = 0; m < kRows; ++m) {
      const auto left = broadcast(kLeft == Left::kRows ? a[m * a_stride] : a[m]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sum[m][v] += left * right[v];
    }
    a += kLeft == Left::kRows ? 1 : a_stride;
    b += b_stride;
  }
#pragma GCC unroll 6
  for (int m = 0; m < kRows; ++m) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      A* target = c + m * c_stride + v * kLanes<A>;
      store(target, add ? load(target) + sum[m][v] : sum[m][v]);
    }
  }
}

template <Left kLeft, int kVectors, typename A>
inline void panel(int64_t rows,
                  int64_t depth,
                  const A* a,
                  int64_t a_stride,
                  const A* b,
                  int64_t b_stride,
                  A* c,
                  int64_t c_stride,
                  bool add) {
  const int64_t a_step = kLeft == Left::kRows ? a_stride : 1;
  const auto run = [&](auto count) {
    multiply_tile<kLeft, decltype(count)::value, kVectors>(
        depth, a, a_stride, b, b_stride, c, c_stride, add);
  };
  for (; rows >= kProductRows; rows -= kProductRows) {
    run(std::integral_constant<int, kProductRows>{});
    a += kProductRows * a_step, c += kProductRows * c_stride;
  }
  switch (rows) {
    case 5:
      return run(std::integral_constant<int, 5>{});
    case 4:
      return run(std::integral_constant<int, 4>{});
    case 3:
      return run(std::integral_constant<int, 3>{});
    case 2:
      return run(std::integral_constant<int, 2>{});
    case 1:
      return run(std::integral_constant<int, 1>{});
    default:
      return;
  }
}

// C (+)= A B: C [rows, columns], B [depth, columns], `columns` a multiple of kLanes<A>. Rows
// of B and C are read and written as whole vectors.
template <Left kLeft, typename A>
inline void multiply(int64_t rows,
                     int64_t columns,
                     int64_t depth,
                     const A* a,
                     int64_t a_stride,
                     const A* b,
                     int64_t b_stride,
                     A* c,
                     int64_t c_stride,
                     bool add) {
  constexpr int64_t kCount = kLanes<A>;
  const auto run = [&](auto vectors) {
    constexpr int kVectors = decltype(vectors)::value;
    panel<kLeft, kVectors>(rows, depth, a, a_stride, b, b_stride, c, c_stride, add);
    b += kVectors * kCount, c += kVectors * kCount, columns -= kVectors * kCount;
  };
  while (columns >= kPanelVectors * kCount) run(std::integral_constant<int, kPanelVectors>{});
  if constexpr (kPanelVectors > 2) {
    if (columns >= 3 * kCount) run(std::integral_constant<int, 3>{});
    if (columns >= 2 * kCount) run(std::integral_constant<int, 2>{});
  }
  if (columns >= kCount) run(std::integral_constant<int, 1>{});
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
