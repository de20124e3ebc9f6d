// Relative positions: products of queries z with the sinusoids of distances,
//
//   r(d) = z . [sin(d w); cos(d w)].
//
// With z turned by the distance of a middle key, odd = z1 cos - z2 sin and even = z2 cos + z1 sin of
// d w, the p-th key behind it has r = even . cos(p w) - odd . sin(p w), and the p-th before it the
// same with a plus. So a block of neighbouring keys needs the sinusoids of half as many places, the
// same ones for every block and head, and half the products.
#pragma once

#include <array>
#include <vector>

#include "kernels/cpu/rotary.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

inline constexpr int64_t kPlaces = 64;  // more than half the keys of any block

// w_i = 10000^(-2i/dim), i < dim / 2.
inline const std::vector<double>& relative_frequencies(int64_t dim) {
  thread_local std::vector<double> known;
  if (static_cast<int64_t>(known.size()) != dim / 2) {
    known.resize(dim / 2);
    for (int64_t i = 0; i < dim / 2; ++i)
      known[i] = std::pow(10000.0, -2.0 * static_cast<double>(i) / static_cast<double>(dim));
  }
  return known;
}

// Cosines and sines of p * step * w_i for p < kPlaces: [kPlaces, dim / 2] each.
template <typename A>
struct PlaceTable {
  int64_t dim = 0;
  double step = 0;
  std::vector<A> memory;
  const A* cosines() const { return memory.data(); }
  const A* sines() const { return memory.data() + kPlaces * (dim / 2); }
};

// How far neighbouring keys of a region are apart.
inline double key_step(const Clock& clock, int64_t region) {
  return key_clock(clock, region, 1) - key_clock(clock, region, 0);
}

// Kept per thread, for the two steps that a memory has. Valid until the next but one call.
template <typename A>
inline const PlaceTable<A>& place_table(int64_t dim, double step) {
  thread_local std::array<PlaceTable<A>, 2> tables;
  thread_local size_t oldest = 0;
  for (const PlaceTable<A>& table : tables) {
    if (table.dim == dim && table.step == step) return table;
  }
  PlaceTable<A>& table = tables[oldest];
  oldest = (oldest + 1) % tables.size();
  const int64_t half = dim / 2;
  table.dim = dim, table.step = step;
  table.memory.resize(2 * kPlaces * half);
  A* cosine = table.memory.data();
  A* sine = cosine + kPlaces * half;
  for (int64_t p = 0; p < kPlaces; ++p, cosine += half, sine += half)
    cosines_and_sines(
        static_cast<double>(p) * step, relative_frequencies(dim).data(), half, cosine, sine);
  return table;
}

// Cosines and sines of distance * w_i. Kept per thread: all heads and layers of a step ask for the
// same ones. Valid until the next call.
template <typename A>
inline RotaryTable<A> distance_table(int64_t dim, double distance) {
  struct Entry {
    double distance = 0;
    std::vector<A> memory;
  };
  constexpr int kBits = 7;
  thread_local std::vector<Entry> entries(size_t{1} << kBits);
  const uint64_t hash = std::bit_cast<uint64_t>(distance) * 0x9E3779B97F4A7C15u;
  Entry& e = entries[hash >> (64 - kBits)];
  const int64_t half = dim / 2;
  if (e.distance != distance || static_cast<int64_t>(e.memory.size()) != dim) {
    e.distance = distance;
    e.memory.resize(dim);
    cosines_and_sines(
        distance, relative_frequencies(dim).data(), half, e.memory.data(), e.memory.data() + half);
  }
  return {e.memory.data(), e.memory.data() + half};
}

// The odd and the even part of z [2 half], turned by the angles of a table.
template <typename A>
inline void split_relative(const A* __restrict z,
                           const RotaryTable<A>& table,
                           int64_t half,
                           A* __restrict odd,
                           A* __restrict even) {
  for (int64_t i = 0; i < half; ++i) {
    odd[i] = z[i] * table.cosine[i] - z[half + i] * table.sine[i];
    even[i] = z[half + i] * table.cosine[i] + z[i] * table.sine[i];
  }
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
