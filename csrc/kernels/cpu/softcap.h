// Logits that are kept small: softcap * tanh(score / softcap) (Gemma 2, arXiv:2408.00118).
#pragma once

#include "kernels/cpu/simd.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

// Cephes' tanhf, without branches; error below 3 units in the last place.
inline Vec<float> hyperbolic_tangent(Vec<float> x) {
  const Vec<float> z = x * x;
  Vec<float> small = broadcast(-5.70498872745e-3f);
  small = small * z + 2.06390887954e-2f;
  small = small * z - 5.37397155531e-2f;
  small = small * z + 1.33314422036e-1f;
  small = small * z - 3.33332819422e-1f;
  small = small * z * x + x;
  const Vec<float> size = x < 0.0f ? -x : x;
  const Vec<float> e = exponential(-2.0f * size);
  const Vec<float> large = (1.0f - e) / (1.0f + e);
  return size < 0.625f ? small : x < 0.0f ? -large : large;  // NaN stays
}

inline Vec<double> hyperbolic_tangent(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::tanh(x[i]);
  return x;
}

template <typename A>
inline Vec<A> capped(Vec<A> score, A softcap) {
  return softcap * hyperbolic_tangent(score * (A(1) / softcap));
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
