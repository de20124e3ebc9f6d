// Rotary position: one table of cosines and sines per position, shared by all heads of a token.
#pragma once

#include <cmath>
#include <vector>

#include "kernels/cpu/vec.h"
#include "ops/kernels.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

// base^(-2i/dim) in float64. Kept per thread: a decode step would otherwise spend its time in pow.
inline const std::vector<double>& inverse_frequencies(const Rotary& rotary) {
  thread_local Rotary known;
  thread_local std::vector<double> table;
  if (known.dim != rotary.dim || known.base != rotary.base) {
    table.resize(rotary.dim / 2);
    for (int64_t i = 0; i < rotary.dim / 2; ++i) {
      table[i] =
          std::pow(rotary.base, -2.0 * static_cast<double>(i) / static_cast<double>(rotary.dim));
    }
    known = rotary;
  }
  return table;
}

// Angles are taken in float64 and rounded once, so that positions may grow without end.
template <typename A>
inline void rotary_table(const Rotary& rotary,
                         double position,
                         A* __restrict cosine,
                         A* __restrict sine) {
  const std::vector<double>& frequency = inverse_frequencies(rotary);
  for (int64_t i = 0; i < rotary.dim / 2; ++i) {
    const double angle = position * frequency[i];
    cosine[i] = static_cast<A>(std::cos(angle));
    sine[i] = static_cast<A>(std::sin(angle));
  }
}

// Rotates one row in place; direction = -1 rotates back.
template <typename A>
inline void rotate_row(const Rotary& rotary,
                       const A* __restrict cosine,
                       const A* __restrict sine,
                       A direction,
                       A* row) {
  const int64_t half = rotary.dim / 2;
  const int64_t step = rotary.interleaved ? 2 : 1;  // between one pair and the next
  const int64_t other = rotary.interleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const A a = row[i * step];
    const A b = row[i * step + other];
    const A s = direction * sine[i];
    row[i * step] = a * cosine[i] - b * s;
    row[i * step + other] = b * cosine[i] + a * s;
  }
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
