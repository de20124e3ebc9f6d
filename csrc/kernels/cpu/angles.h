// Cosines and sines of float64 angles, a vector at a time: a decode step at a few hundred slots
// would otherwise spend most of its time in libm.
//
// Reduction and polynomials are those of fdlibm (e_rem_pio2.c, k_sin.c, k_cos.c; Sun Microsystems
// 1993): error below one unit in the last place of one. Angles too large for a reduction in three
// steps are left to libm.
#pragma once

#include "kernels/cpu/simd.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

using Doubles = Vec<double>;
using Bits64 = VectorOf<int64_t>::type;

// Quarter turns below 2^20: their products with the 33-bit parts of pi/2 are exact.
inline constexpr double kLargestAngle = 1647099.0;

// For |angle| <= kLargestAngle.
inline void cosine_and_sine(Doubles angle, Doubles& cosine, Doubles& sine) {
  constexpr double kRound = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves the nearest integer
  const Doubles shifted = angle * 6.36619772367581382433e-01 + kRound;
  const Doubles turns = shifted - kRound;
  Doubles r = angle - turns * 1.57079632673412561417e+00;
  r = r - turns * 6.07710050630396597660e-11;
  r = r - turns * 2.02226624879595063154e-21;
  const Doubles z = r * r;
  Doubles s = broadcast(1.58969099521155010221e-10);
  s = s * z - 2.50507602534068634195e-08;
  s = s * z + 2.75573137070700676789e-06;
  s = s * z - 1.98412698298579493134e-04;
  s = s * z + 8.33333333332248946124e-03;
  s = s * z - 1.66666666666666324348e-01;
  s = r + (r * z) * s;
  Doubles c = broadcast(-1.13596475577881948265e-11);
  c = c * z + 2.08757232129817482790e-09;
  c = c * z - 2.75573143513906633035e-07;
  c = c * z + 2.48015872894767294178e-05;
  c = c * z - 1.38888888888741095749e-03;
  c = c * z + 4.16666666666666019037e-02;
  const Doubles half = z * 0.5;
  const Doubles w = 1.0 - half;
  c = w + (((1.0 - w) - half) + z * z * c);
  // The number of quarter turns stands in the low bits of `shifted`.
  const Bits64 quarter = std::bit_cast<Bits64>(shifted);
  const Bits64 odd = -(quarter & 1);
  const Doubles sine_part = odd ? c : s;
  const Doubles cosine_part = odd ? s : c;
  sine = (-(quarter >> 1 & 1)) ? -sine_part : sine_part;
  cosine = (-((quarter + 1) >> 1 & 1)) ? -cosine_part : cosine_part;
}

// cosine[i], sine[i] of position * frequency[i], computed in float64 and rounded once, so that
// positions may grow without end.
template <typename A>
inline void cosines_and_sines(
    double position, const double* frequency, int64_t n, A* __restrict cosine, A* __restrict sine) {
  for (int64_t i = 0; i < n; i += kLanes<double>) {
    const int64_t count = std::min<int64_t>(kLanes<double>, n - i);
    const bool whole = count == kLanes<double>;
    const Doubles angle =
        (whole ? load(frequency + i) : load_some(frequency + i, count)) * position;
    Doubles c, s;
    cosine_and_sine(angle, c, s);
    for (int64_t lane = 0; lane < count; ++lane) {
      const bool large = std::abs(angle[lane]) > kLargestAngle;
      cosine[i + lane] = static_cast<A>(large ? std::cos(angle[lane]) : c[lane]);
      sine[i + lane] = static_cast<A>(large ? std::sin(angle[lane]) : s[lane]);
    }
  }
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
