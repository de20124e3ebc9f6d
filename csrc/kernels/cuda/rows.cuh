// Rows of tensors and rings, and indices that stay inside them whatever a device's counters hold.
#pragma once

#include "kernels/cuda/numbers.cuh"

namespace ctx::cuda {

template <typename T>
CTX_DEVICE T* row(const Strided& tensor, int64_t b, int64_t h, int64_t t) {
  return static_cast<T*>(tensor.data) + b * tensor.batch + h * tensor.head + t * tensor.token;
}

// Row `index` of head h in a contiguous ring [B, Hkv, capacity, width].
template <typename T>
CTX_DEVICE T* ring_row(void* ring,
                       int64_t kv_heads,
                       int64_t capacity,
                       int64_t width,
                       int64_t b,
                       int64_t h,
                       int64_t index) {
  return static_cast<T*>(ring) + ((b * kv_heads + h) * capacity + index) * width;
}

// Elements from one row of slots to the next: int8 rows end with their scale.
template <typename S>
CTX_DEVICE constexpr int64_t stored_width(int64_t width) {
  return std::is_same_v<S, int8_t> ? width + kScaleBytes : width;
}

// Bytes from one row of a ring to the next.
CTX_HOST_DEVICE inline int64_t row_bytes(Storage storage, int64_t width) {
  return width * size_of(storage) + (storage == Storage::kInt8 ? kScaleBytes : 0);
}

CTX_DEVICE float scale_of(const int8_t* row, int64_t width) {
  float scale;
  memcpy(&scale, row + width, sizeof(scale));
  return scale;
}

CTX_HOST_DEVICE inline int64_t clamped(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

// x modulo n, 0 ... n - 1, of any x.
CTX_HOST_DEVICE inline int64_t place_in_ring(int64_t x, int64_t n) {
  const auto small = static_cast<uint32_t>(x), size = static_cast<uint32_t>(n);
  if (small == x && size == n) return small % size;  // a fraction of the cost
  const int64_t rest = x % n;
  return rest < 0 ? rest + n : rest;
}

// Row b of a block, read once: a counter that is damaged becomes one that is not, so that what is
// computed from it stays inside int64 and the rings.
struct BlockRow {
  int64_t first;  // number of the block's first token; negative before the stream
  int64_t count;  // tokens of the block that this row has
  int64_t start;  // place in the call at which the stream starts

  CTX_DEVICE BlockRow(const Block& block, int64_t b) {
    constexpr int64_t kLast = Schedule::kLastPosition / 2;
    const int64_t origin = clamped(block.origin[b * block.row_stride], -kLast, kLast);
    first = origin + (block.offset - block.origin_at);
    count = block.count(b);
    start = block.offset - first;
  }
  CTX_DEVICE bool has(int64_t i) const { return i < count && first + i >= 0; }
};

// evicted_groups() of such a row.
CTX_DEVICE EvictedGroups due_groups(const MemoryView& memory, const Block& block, int64_t b) {
  const BlockRow row(block, b);
  const Block one{&row.first, nullptr, 0, row.count};
  return evicted_groups(memory, one, 0);
}

// Copies a row, 16 bytes at a time where both addresses allow it; for `lanes` threads together.
template <typename T>
CTX_DEVICE void copy_row(const T* from, T* to, int64_t width, int64_t lane, int64_t lanes) {
  struct alignas(16) Piece {
    uint32_t words[4];
  };
  constexpr int64_t kPiece = 16 / sizeof(T);
  const bool aligned =
      (reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to)) % 16 == 0;
  const int64_t pieces = aligned ? width / kPiece : 0;
  for (int64_t i = lane; i < pieces; i += lanes)
    reinterpret_cast<Piece*>(to)[i] = reinterpret_cast<const Piece*>(from)[i];
  for (int64_t i = pieces * kPiece + lane; i < width; i += lanes) to[i] = from[i];
}

// Stores a slot's row out of shared memory; for the 32 lanes of a warp together. int8: multiples of
// a 127th of the largest number; a row that is not finite stays so.
template <typename A, typename S>
CTX_DEVICE void store_slot(const A* from, S* to, int64_t width, int lane) {
  if constexpr (std::is_same_v<S, int8_t>) {
    float largest = 0.0f;
    for (int64_t i = lane; i < width; i += 32) {
      const float size = fabsf(static_cast<float>(from[i]));
      largest = size > largest || size != size ? size : largest;
      if (largest != largest) break;
    }
    CTX_UNROLL for (int bits = 16; bits > 0; bits /= 2) {
      const float other = __shfl_xor_sync(0xffffffffu, largest, bits);
      largest = other > largest || other != other ? other : largest;
    }
    const bool finite = is_finite(largest);
    const float scale = largest / 127.0f;
    const float inverse = scale > 0.0f ? 1.0f / scale : 0.0f;
    for (int64_t i = lane; i < width; i += 32) {
      const float steps = finite ? rintf(static_cast<float>(from[i]) * inverse) : 1.0f;
      to[i] = static_cast<int8_t>(steps < -127.0f ? -127.0f : steps > 127.0f ? 127.0f : steps);
    }
    const float stored = CTX_PLANTED(kSwappedScale) ? inverse : scale;
    if (lane == 0) memcpy(to + width, &stored, sizeof(stored));
  } else {
    for (int64_t i = lane; i < width; i += 32) to[i] = narrow<S>(from[i]);
  }
}

}  // namespace ctx::cuda
