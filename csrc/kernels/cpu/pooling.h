// What compressors make of groups of tokens, one head at a time: rows of numbers in, rows out.
#pragma once

#include <limits>

#include "kernels/cpu/blocks.h"
#include "kernels/cpu/vec.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

inline constexpr int64_t kGroups = 8;  // of a head that are made together

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

// slot = sum_i x_i W_i (+ bias) for some groups of a head, which read its weight [k, inner, width]
// once; x [groups, k, inner], slots [groups, row_width].
template <typename A, typename P>
void convolve(const A* x,
              const P* weight,
              const P* bias,
              int64_t groups,
              int64_t k,
              int64_t inner,
              int64_t width,
              A* slots) {
  for (int64_t g = 0; g < groups; ++g) {
    A* slot = slots + g * row_width<A>(width);
    std::fill_n(slot, row_width<A>(width), A(0));
    if (bias != nullptr) load_row(bias, slot, width);
  }
  A factors[kGroups * kBlock];
  for (int64_t j = 0; j < k * inner; j += kBlock) {
    const int64_t count = std::min(kBlock, k * inner - j);
    for (int64_t g = 0; g < groups; ++g)
      std::copy_n(x + g * k * inner + j, count, factors + g * kBlock);
    by_rows(groups, [&](auto number, int64_t g) {
      add_rows<decltype(number)::value>(factors + g * kBlock,
                                        weight + j * width,
                                        count,
                                        width,
                                        width,
                                        slots + g * row_width<A>(width));
    });
  }
}

// y_i = ReLU(x_i W_0 + x_(i + dilation) W_1), i < rows; x [rows + dilation, inner], y [rows, width],
// weight [2, inner, width] of one head.
template <typename A, typename P>
void dilate(const A* x,
            const P* weight,
            int64_t rows,
            int64_t dilation,
            int64_t inner,
            int64_t width,
            A* y,
            A* parameter_row) {
  std::fill_n(y, rows * width, A(0));
  for (int64_t tap = 0; tap < 2; ++tap) {
    const A* from = x + tap * dilation * inner;
    for (int64_t d = 0; d < inner; ++d) {
      load_row(weight + (tap * inner + d) * width, parameter_row, width);
      for (int64_t i = 0; i < rows; ++i)
        axpy(from[i * inner + d], parameter_row, y + i * width, width);
    }
  }
  // A NaN stays a NaN, as in torch.relu.
  for (int64_t i = 0; i < rows * width; ++i) y[i] = y[i] < A(0) ? A(0) : y[i];
}

// slot = sum_i softmax_i(key_i . gate + position_i) x_i; returns the entropy of these weights.
template <typename A, typename P>
A gate(const A* keys,
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
  A mean_score = 0;  // relative to the largest, times `total`
  for (int64_t i = 0; i < c; ++i) {
    const A score = weights[i] - largest;
    total += weights[i] = std::exp(score);
    if (weights[i] != A(0)) mean_score += weights[i] * score;
  }
  std::fill_n(slot, width, A(0));
  for (int64_t i = 0; i < c; ++i) axpy(weights[i] / total, x + i * width, slot, width);
  return std::log(total) - mean_score / total;
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
