// Rotary position: one table of cosines and sines per position, shared by all heads of a token.
#pragma once

#include <array>
#include <vector>

#include "kernels/cpu/angles.h"
#include "ops/kernels.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

// base^(-2i/dim) in float64, padded to whole vectors. Kept per thread: a decode step would
// otherwise spend its time in pow.
inline const std::vector<double>& inverse_frequencies(const Rotary& rotary) {
  thread_local Rotary known;
  thread_local std::vector<double> table;
  if (known.dim != rotary.dim || known.base != rotary.base) {
    table.assign(padded<double>(rotary.dim / 2), 0.0);
    for (int64_t i = 0; i < rotary.dim / 2; ++i) {
      table[i] =
          std::pow(rotary.base, -2.0 * static_cast<double>(i) / static_cast<double>(rotary.dim));
    }
    known = rotary;
  }
  return table;
}

template <typename A>
struct RotaryTable {
  const A* cosine;
  const A* sine;
};

// Fills `memory`, of rotary.dim numbers, with the table of a position.
template <typename A>
inline RotaryTable<A> make_rotary_table(const Rotary& rotary, double position, A* memory) {
  const int64_t half = rotary.dim / 2;
  turn(position, inverse_frequencies(rotary).data(), half, memory, memory + half);
  return {memory, memory + half};
}

// The table of a position, out of the last ones that this thread made: a step needs that of its
// token to append and again to attend, and so does every other layer. Valid until the next call.
template <typename A>
inline RotaryTable<A> rotary_table(const Rotary& rotary, double position) {
  struct Entry {
    Rotary rotary;
    double position = 0;
    std::vector<A> memory;
  };
  thread_local std::array<Entry, 4> entries;
  thread_local size_t oldest = 0;
  const int64_t half = rotary.dim / 2;
  for (const Entry& e : entries) {
    if (e.position == position && e.rotary.dim == rotary.dim && e.rotary.base == rotary.base &&
        !e.memory.empty())
      return {e.memory.data(), e.memory.data() + half};
  }
  Entry& e = entries[oldest];
  oldest = (oldest + 1) % entries.size();
  e.rotary = rotary;
  e.position = position;
  e.memory.resize(rotary.dim);
  return make_rotary_table(rotary, position, e.memory.data());
}

// Rotates one row in place; direction = -1 rotates back.
template <typename A>
inline void rotate_row(const Rotary& rotary, const RotaryTable<A>& table, A direction, A* row) {
  const A* __restrict cosine = table.cosine;
  const A* __restrict sine = table.sine;
  const int64_t half = rotary.dim / 2;
  if (rotary.interleaved) {
    for (int64_t i = 0; i < half; ++i) {
      const A a = row[2 * i];
      const A b = row[2 * i + 1];
      const A s = direction * sine[i];
      row[2 * i] = a * cosine[i] - b * s;
      row[2 * i + 1] = b * cosine[i] + a * s;
    }
    return;
  }
  A* __restrict first = row;
  A* __restrict second = row + half;
  for (int64_t i = 0; i < half; ++i) {
    const A a = first[i];
    const A b = second[i];
    const A s = direction * sine[i];
    first[i] = a * cosine[i] - b * s;
    second[i] = b * cosine[i] + a * s;
  }
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
