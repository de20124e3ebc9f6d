// Rotary position: one table of cosines and sines per position, shared by all heads of a token.
#pragma once

#include <array>
#include <vector>

#include "kernels/cpu/angles.h"
#include "ops/kernels.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

template <typename A>
struct RotaryTable {
  const A* cosine;
  const A* sine;
};

// Fills `memory`, of rotary.dim numbers, with the table of a position.
template <typename A>
inline RotaryTable<A> make_rotary_table(const Rotary& rotary, double position, A* memory) {
  const int64_t half = rotary.dim / 2;
  cosines_and_sines(position, rotary.inv_freq, half, memory, memory + half);
  if (rotary.attention_factor != 1.0)
    scale_row(static_cast<A>(rotary.attention_factor), memory, rotary.dim);
  return {memory, memory + half};
}

// The table of a position, out of the last ones that this thread made: a step needs that of its
// token to append and again to attend, and so does every other layer. Valid until the next call.
template <typename A>
inline RotaryTable<A> rotary_table(const Rotary& rotary, double position) {
  struct Entry {
    double position = 0;
    double attention_factor = 0;
    std::vector<double> inv_freq;
    std::vector<A> memory;
  };
  thread_local std::array<Entry, 4> entries;
  thread_local size_t oldest = 0;
  const int64_t half = rotary.dim / 2;
  for (const Entry& e : entries) {
    if (e.position == position && e.attention_factor == rotary.attention_factor &&
        std::equal(e.inv_freq.begin(), e.inv_freq.end(), rotary.inv_freq, rotary.inv_freq + half))
      return {e.memory.data(), e.memory.data() + half};
  }
  Entry& e = entries[oldest];
  oldest = (oldest + 1) % entries.size();
  e.position = position;
  e.attention_factor = rotary.attention_factor;
  e.inv_freq.assign(rotary.inv_freq, rotary.inv_freq + half);
  e.memory.resize(rotary.dim);
  return make_rotary_table(rotary, position, e.memory.data());
}

// kTo: by the table's angles, times the attention factor. kTransposed: the transpose of that, which
// gradients take. kBack: the inverse.
enum class Rotation { kTo, kTransposed, kBack };

// Rotates one row in place.
template <typename A>
inline void rotate_row(const Rotary& rotary,
                       const RotaryTable<A>& table,
                       Rotation rotation,
                       A* row) {
  if (rotation == Rotation::kBack && rotary.attention_factor != 1.0) {
    const double factor = rotary.attention_factor;
    scale_row(static_cast<A>(1.0 / (factor * factor)), row, rotary.dim);
  }
  const A direction = rotation == Rotation::kTo ? A(1) : A(-1);
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
