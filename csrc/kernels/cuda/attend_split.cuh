// How attention is cut into blocks, and which kernel takes it. All of it follows from shapes, none from
// what a memory holds, so that a CUDA graph can hold the launches.
#pragma once

#include "kernels/cuda/attend_rows.cuh"

namespace ctx::cuda {

constexpr int kMmaRows = 16;  // of a tile of mma

// The part of a split, and where it begins in it.
struct SplitPlace {
  int part;
  int64_t begin, end;
};
CTX_DEVICE SplitPlace split_place(const Attention& a, int64_t split) {
  for (int p = 0; p < a.parts; ++p) {
    const int64_t count = (a.part[p].size + a.split_length - 1) / a.split_length;
    if (split < count) {
      const int64_t begin = split * a.split_length;
      const int64_t end = begin + a.split_length + (CTX_PLANTED(kWrongSplitBorder) ? 1 : 0);
      return {p, begin, end < a.part[p].size ? end : a.part[p].size};
    }
    split -= count;
  }
  return {0, 0, 0};
}

// Calls walk(part, begin, end) for all parts, or for what a split is.
template <typename F>
CTX_DEVICE void for_parts(const Attention& a, int64_t split, const F& walk) {
  if (a.split_length > 0) {
    const SplitPlace place = split_place(a, split);
    return walk(place.part, place.begin, place.end);
  }
  for (int p = 0; p < a.parts; ++p) walk(p, int64_t{0}, a.part[p].size);
}

// Keys that a block of a decode step takes: partial sums are then below a twentieth of the traffic.
inline int64_t default_split_length(const Attention& a) {
  int64_t smallest = size_of(a.storage);
  for (int p = 0; p < a.parts; ++p)
    smallest = size_of(a.part[p].storage) < smallest ? size_of(a.part[p].storage) : smallest;
  int64_t length = 128;
  while (length < 80 * a.q_per_kv() / smallest) length *= 2;
  return length;
}

// Few enough for one tile of rows; the heads of a kv head may need several.
inline bool has_few_queries(const Attention& a) {
  const int64_t heads = a.q_per_kv() < kMmaRows ? a.q_per_kv() : kMmaRows;
  return a.tokens * heads <= kMmaRows;
}

// Few queries: parts are cut into splits of `length` keys (0: the default).
inline void set_splits(Attention& a, int64_t length) {
  if (length == 0) length = default_split_length(a);
  int64_t keys = 0;
  a.splits = 0;
  for (int p = 0; p < a.parts; ++p) {
    keys += a.part[p].size;
    a.splits += (a.part[p].size + length - 1) / length;
  }
  a.split_length = length;
  if (!has_few_queries(a) || keys <= length || a.splits > 65535) a.split_length = 0, a.splits = 1;
}

inline int64_t arithmetic_size(const Attention& a) {
  return a.storage == Storage::kFloat64 ? 8 : 4;
}
inline int64_t rows_of(const Attention& a) { return a.batch * a.heads * a.tokens; }
inline int64_t partial_bytes(const Attention& a) {
  if (a.split_length == 0) return 0;
  return (rows_of(a) * a.splits * (a.value_dim + 1 + kRegions) * arithmetic_size(a) + 15) / 16 * 16;
}

// Whether mma takes this: its types, sizes and alignment, and enough rows to be worth it.
inline bool fits_mma(const Attention& a) {
  const bool half = a.storage == Storage::kBFloat16 || a.storage == Storage::kFloat16;
  if (!half || a.head_dim % 16 != 0 || a.value_dim % 16 != 0) return false;
  if (a.head_dim > 256 || a.value_dim > 128 || a.relative.dim > 0) return false;
  // Not by tokens, where these are few: a step's bits do not depend on how the stream was cut.
  if (a.q_per_kv() < 4 && has_few_queries(a)) return false;
  if (a.slopes != nullptr && a.slot_positions != nullptr) return false;
  for (int p = 0; p < a.parts; ++p) {
    const Part& part = a.part[p];
    if (part.storage != a.storage && part.storage != Storage::kInt8) return false;
    const int64_t align = part.storage == Storage::kInt8 ? 4 : 16;
    for (const Strided* x : {&part.keys, &part.values}) {
      const auto at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x->data) % 16);
      if (at % align != 0 || x->batch % align != 0 || x->head % align != 0 || x->token % align != 0)
        return false;
    }
  }
  return true;
}

}  // namespace ctx::cuda
