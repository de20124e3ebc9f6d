// Rows of the compressed ring, whose storage may be another than the window's.
#pragma once

#include <algorithm>
#include <cmath>

#include "kernels/cpu/dispatch.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

// Elements from one row to the next: int8 rows end with their scale.
template <typename S>
inline int64_t stored_width(int64_t width) {
  return std::is_same_v<S, int8_t> ? width + kScaleBytes : width;
}

// What the numbers of an int8 row are multiples of.
inline float scale_of(const int8_t* row, int64_t width) {
  float scale;
  std::memcpy(&scale, row + width, sizeof(scale));
  return scale;
}

// Slots of compressed storage for a memory whose pairs are stored as T: run(S{}).
template <typename T, typename F>
inline void dispatch_slots(Storage storage, F&& run) {
  if constexpr (std::is_same_v<T, double>) {
    run(double{});
  } else {
    if (storage == Storage::kInt8) return run(int8_t{});
    if (storage == Storage::kFloat32) return run(float{});
    if (storage == Storage::kBFloat16) return run(c10::BFloat16{});
    run(c10::Half{});
  }
}

// The scales of some rows that lie together.
inline void load_scales(
    const int8_t* rows, int64_t stride, int64_t width, int64_t count, float* scales) {
  int64_t j = 0;
#if defined(__AVX512F__)
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i place = _mm512_mullo_epi32(lane, _mm512_set1_epi32(static_cast<int>(stride)));
  for (; j + 16 <= count; j += 16)
    _mm512_storeu_ps(scales + j, _mm512_i32gather_ps(place, rows + j * stride + width, 1));
#endif
  for (; j < count; ++j) scales[j] = scale_of(rows + j * stride, width);
}

template <typename S, typename A>
inline void load_slot(const S* source, A* target, int64_t width) {
  load_row(source, target, width);
  if constexpr (std::is_same_v<S, int8_t>) scale_row(scale_of(source, width), target, width);
}

// Multiples of a 127th of the largest number; a row that is not finite stays so.
inline void store_slot(const float* row, int8_t* target, int64_t width) {
  float largest = 0.0f;
  for (int64_t i = 0; i < width; ++i) {
    const float size = std::abs(row[i]);
    largest = size > largest || size != size ? size : largest;
    if (largest != largest) break;
  }
  const bool finite = std::isfinite(largest);
  const float scale = largest / 127.0f;
  const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
  for (int64_t i = 0; i < width; ++i) {
    const float steps = finite ? std::nearbyint(row[i] * inverse) : 1.0f;
    target[i] = static_cast<int8_t>(std::clamp(steps, -127.0f, 127.0f));
  }
  std::memcpy(target + width, &scale, sizeof(scale));
}

template <typename A, typename S>
inline void store_slot(const A* row, S* target, int64_t width) {
  store_row(row, target, width);
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
