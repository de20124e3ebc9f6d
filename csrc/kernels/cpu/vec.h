// Rows of numbers: loops that the compiler turns into the instruction set that this file is
// compiled for.
//
// Each loop's order depends on its length alone, never on how a call was cut: the same row gives
// the same bits.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef CTX_CPU_CAPABILITY
#error "compiled once per instruction set, with -DCTX_CPU_CAPABILITY=DEFAULT|AVX2|AVX512"
#endif

namespace ctx::cpu::CTX_CPU_CAPABILITY {

// Arithmetic is float32, float64 for float64.
template <typename T>
using Acc = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename T, typename A>
inline void load_row(const T* __restrict source, A* __restrict target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] = static_cast<A>(source[i]);
}

// The upper half of a float32.
template <>
inline void load_row(const c10::BFloat16* __restrict source, float* __restrict target, int64_t n) {
  const auto* bits = reinterpret_cast<const uint16_t*>(source);
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
    std::memcpy(&target[i], &wide, sizeof(wide));
  }
}

#if defined(__F16C__)
template <>
inline void load_row(const c10::Half* __restrict source, float* __restrict target, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(
        target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
  for (; i < n; ++i) target[i] = static_cast<float>(source[i]);
}
#endif

template <typename T, typename A>
inline void store_row(const A* __restrict source, T* __restrict target, int64_t n) {
  for (int64_t i = 0; i < n; ++i) target[i] = static_cast<T>(source[i]);
}

template <typename A>
inline A dot(const A* __restrict x, const A* __restrict y, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * y[i];
  return sum;
}

// No infinity and no NaN among them.
template <typename A>
inline bool finite(const A* x, int64_t n) {
  A sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) sum += x[i] * A(0);
  return sum == A(0);
}

// y += a x
template <typename A>
inline void axpy(A a, const A* __restrict x, A* __restrict y, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) y[i] += a * x[i];
}

template <typename A>
inline void scale_row(A a, A* x, int64_t n) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) x[i] *= a;
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
