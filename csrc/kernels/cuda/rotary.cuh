// Rotary position: angles are made in float64, once per token, and shared by all heads.
#pragma once

#include "kernels/cuda/rows.cuh"

namespace ctx::cuda {

// kTo: by the table's angles, times the attention factor. kTransposed: the transpose of that, which
// gradients take. kBack: the inverse.
enum class Rotation { kTo, kTransposed, kBack };

// Sine and cosine of a float64 angle. For float32, whole turns are taken away in float64, and what the
// rest loses by rounding is put back to first order: float64 sines cost ten times as much.
CTX_DEVICE void sine_and_cosine(double angle, double& sine, double& cosine) {
  sincos(angle, &sine, &cosine);
}
CTX_DEVICE void sine_and_cosine(double angle, float& sine, float& cosine) {
  const double turns = rint(angle * 0.15915494309189533577);
  const double rest = fma(-turns, 2.4492935982947064e-16, fma(-turns, 6.283185307179586232, angle));
  const auto near = static_cast<float>(rest);
  const auto left = static_cast<float>(rest - static_cast<double>(near));
  float s, c;
  sincosf(near, &s, &c);
  sine = s + left * c;
  cosine = c - left * s;
}

// Cosines [dim / 2] and then sines of a position; for `lanes` threads together, which must meet at a
// barrier before they read it.
template <typename A>
CTX_DEVICE void make_table(
    const Rotary& rotary, double position, A* table, int64_t lane, int64_t lanes) {
  const int64_t half = rotary.dim / 2;
  for (int64_t i = lane; i < half; i += lanes) {
    sine_and_cosine(position * rotary.inv_freq[i], table[half + i], table[i]);
    if (rotary.attention_factor != 1.0) {
      table[i] *= static_cast<A>(rotary.attention_factor);
      table[half + i] *= static_cast<A>(rotary.attention_factor);
    }
  }
}

// Pair i of a row: where its two numbers lie.
struct PairPlace {
  int64_t first, second;
};
CTX_DEVICE PairPlace pair_place(const Rotary& rotary, int64_t i) {
  if (rotary.interleaved) return {2 * i, 2 * i + 1};
  return {i, rotary.dim / 2 + i};
}

template <typename A>
CTX_DEVICE A factor_of(const Rotary& rotary, Rotation rotation) {
  const double factor = rotary.attention_factor;
  if (rotation == Rotation::kBack && factor != 1.0) return static_cast<A>(1.0 / (factor * factor));
  return A(1);
}

// Rotates pair i, whose numbers are a and b.
template <typename A>
CTX_DEVICE void rotate_pair(
    const Rotary& rotary, const A* table, Rotation rotation, int64_t i, A& a, A& b) {
  const A factor = factor_of<A>(rotary, rotation);
  const A cosine = table[i];
  const A sine = rotation == Rotation::kTo ? table[rotary.dim / 2 + i] : -table[rotary.dim / 2 + i];
  const A x = a * factor, y = b * factor;
  a = x * cosine - y * sine;
  b = y * cosine + x * sine;
}

template <typename T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

// Rotates a row of T from one place to another (or the same): 16 bytes at a time where the halves of
// the row allow it; for `lanes` threads together.
template <typename T>
CTX_DEVICE void rotate_row(const Rotary& rotary,
                           const Acc<T>* table,
                           Rotation rotation,
                           const T* from,
                           T* to,
                           int64_t width,
                           int64_t lane,
                           int64_t lanes) {
  using A = Acc<T>;
  using V = Vector<T>;
  const int64_t half = rotary.dim / 2;
  const bool aligned =
      (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0;
  const bool wide_pairs = aligned && !rotary.interleaved && half % V::kSize == 0;
  for (int64_t c = lane; wide_pairs && c < half / V::kSize; c += lanes) {
    V one = reinterpret_cast<const V*>(from)[c];
    V other = reinterpret_cast<const V*>(from + half)[c];
    CTX_UNROLL for (int e = 0; e < V::kSize; ++e) {
      A a = wide<A>(one.x[e]), b = wide<A>(other.x[e]);
      rotate_pair(rotary, table, rotation, c * V::kSize + e, a, b);
      one.x[e] = narrow<T>(a), other.x[e] = narrow<T>(b);
    }
    reinterpret_cast<V*>(to)[c] = one;
    reinterpret_cast<V*>(to + half)[c] = other;
  }
  for (int64_t i = lane; !wide_pairs && i < half; i += lanes) {
    const PairPlace place = pair_place(rotary, i);
    A a = wide<A>(from[place.first]), b = wide<A>(from[place.second]);
    rotate_pair(rotary, table, rotation, i, a, b);
    to[place.first] = narrow<T>(a), to[place.second] = narrow<T>(b);
  }
  if (from != to) copy_row(from + rotary.dim, to + rotary.dim, width - rotary.dim, lane, lanes);
}

}  // namespace ctx::cuda
