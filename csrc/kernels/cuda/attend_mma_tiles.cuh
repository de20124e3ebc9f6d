// Tiles of keys and values in shared memory, as ldmatrix reads them.
#pragma once

#include "kernels/cuda/attend_split.cuh"
#include "kernels/cuda/tile_copy.cuh"

namespace ctx::cuda {

constexpr int kMmaThreads = 128;
constexpr int kMmaKeys = 64;

// Rows of 16-bit numbers in shared memory; 16-byte pieces are swizzled, or rows are padded where they
// are too short for that, so that the eight rows that ldmatrix reads lie in different banks.
struct MmaLayout {
  int stride;
  int mask;
  CTX_HOST_DEVICE explicit MmaLayout(int64_t width) {
    const int pieces = static_cast<int>(width / 8);
    mask = pieces % 8 == 0 ? 7 : 0;
    stride = pieces * 16 + (mask == 0 && pieces % 2 == 0 ? 16 : 0);
  }
  CTX_HOST_DEVICE int place(int row, int column) const {  // in bytes
    return row * stride + ((column / 8) ^ (row & mask)) * 16 + column % 8 * 2;
  }
};

// How a block's memory is cut; in bytes.
struct MmaRoom {
  int views, query, key_offset, key_scale, value_scale, mass, keys, values, all;
  int key_stage, value_stage, raw_keys, raw_values, raw_key_stride, raw_value_stride;
  CTX_HOST_DEVICE MmaRoom(const Attention& a, int rows, bool has_int8) {
    int next = 0;
    const auto take = [&](int64_t bytes) {
      const int place = next;
      next += static_cast<int>((bytes + 127) / 128 * 128);
      return place;
    };
    views = take(rows * static_cast<int64_t>(sizeof(TokenView)));
    query = take(rows * MmaLayout(a.head_dim).stride);
    key_offset = take(kMmaKeys * 4);
    key_scale = take(kMmaKeys * 4);
    value_scale = take(kMmaKeys * 4);
    mass = take(kMmaKeys * 4);
    key_stage = kMmaKeys * MmaLayout(a.head_dim).stride;
    value_stage = kMmaKeys * MmaLayout(a.value_dim).stride;
    raw_key_stride = static_cast<int>(a.head_dim) + 16;
    raw_value_stride = static_cast<int>(a.value_dim) + 16;
    keys = take(2 * key_stage);
    values = take(2 * value_stage);
    raw_keys = take(has_int8 ? 2 * kMmaKeys * raw_key_stride : 0);
    raw_values = take(has_int8 ? 2 * kMmaKeys * raw_value_stride : 0);
    // At the end the sums of all warps lie where keys and values were.
    const int sums = keys + 4 * kMmaRows * static_cast<int>(a.value_dim + 1 + kRegions) * 4;
    all = sums > next ? sums : next;
  }
};

struct MmaLaunch {
  Attention a;
  RowTiling tiling;
  bool has_int8;
};

CTX_DEVICE uint32_t packed(uint16_t low, uint16_t high) {
  return static_cast<uint32_t>(low) | static_cast<uint32_t>(high) << 16;
}

// A block's shared memory, and what brings tiles there.
template <typename T>
struct MmaTiles {
  const Attention& a;
  const MmaRoom room;
  const MmaLayout key_layout, value_layout;
  char* const memory;

  CTX_DEVICE MmaTiles(const MmaLaunch& l, int rows)
      : a(l.a),
        room(l.a, rows, l.has_int8),
        key_layout(l.a.head_dim),
        value_layout(l.a.value_dim),
        memory(shared_memory()) {}

  template <bool kInt8>
  CTX_DEVICE void fetch(
      const PartView& part, int64_t x, int64_t end, int stage, bool values) const {
    const int64_t width = values ? a.value_dim : a.head_dim;
    if (x < end) {
      if constexpr (kInt8) {
        const int stride = values ? room.raw_value_stride : room.raw_key_stride;
        char* to = memory + (values ? room.raw_values : room.raw_keys) + stage * kMmaKeys * stride;
        copy_pieces<4>(
            part, x, kMmaKeys, width + kScaleBytes, to, stride, part.keys, [&](int64_t i) {
              return values ? part.value(i) : part.key(i);
            });
      } else {
        const MmaLayout& layout = values ? value_layout : key_layout;
        char* to = memory + (values ? room.values + stage * room.value_stage
                                    : room.keys + stage * room.key_stage);
        const char* nowhere = values ? part.values : part.keys;
        for_pieces<kMmaThreads>(kMmaKeys, static_cast<int>(width / 8), [&](int j, int c) {
          const bool there = x + j < end && part.in_hull(x + j);
          const char* from = there ? (values ? part.value(x + j) : part.key(x + j)) : nowhere;
          copy_async<16>(to + layout.place(j, c * 8), from + (there ? c * 16 : 0), there ? 16 : 0);
        });
      }
    }
    commit_copies();
  }

  // int8 rows of a stage become 16-bit rows of stage 0, and their scales numbers beside them.
  CTX_DEVICE void widen(int stage, bool values) const {
    const int64_t width = values ? a.value_dim : a.head_dim;
    const int stride = values ? room.raw_value_stride : room.raw_key_stride;
    const MmaLayout& layout = values ? value_layout : key_layout;
    const char* from =
        memory + (values ? room.raw_values : room.raw_keys) + stage * kMmaKeys * stride;
    char* to = memory + (values ? room.values : room.keys);
    const int pieces = static_cast<int>(width / 4);
    for (int task = threadIdx.x; task < kMmaKeys * pieces; task += kMmaThreads) {
      const int j = task / pieces, c = task % pieces * 4;
      const char* bytes = from + j * stride + c;
      const auto bits = [&](int e) {
        return T::bits_of(static_cast<float>(static_cast<int8_t>(bytes[e])));
      };
      auto* pair = reinterpret_cast<uint32_t*>(to + layout.place(j, c));
      pair[0] = packed(bits(0), bits(1)), pair[1] = packed(bits(2), bits(3));
    }
    auto* scales = reinterpret_cast<float*>(memory + (values ? room.value_scale : room.key_scale));
    for (int j = threadIdx.x; j < kMmaKeys; j += kMmaThreads)
      scales[j] = scale_of(reinterpret_cast<const int8_t*>(from + j * stride), width);
  }

  // What is known of every key of a tile before the scores.
  CTX_DEVICE void describe(const PartView& part, int64_t x, int64_t end) const {
    auto* offset = reinterpret_cast<int*>(memory + room.key_offset);
    auto* mass = reinterpret_cast<float*>(memory + room.mass);
    for (int j = threadIdx.x; j < kMmaKeys; j += kMmaThreads) {
      const bool there = x + j < end && part.in_hull(x + j);
      offset[j] = there ? part.offset(static_cast<int>(x + j)) : -1;
      mass[j] = there ? part.mass<float>(x + j) : 0.0f;
    }
  }
};

}  // namespace ctx::cuda
