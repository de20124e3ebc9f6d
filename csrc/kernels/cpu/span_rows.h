// Blocks of keys of the differentiable path, and their rows in the arithmetic's type.
#pragma once

#include <algorithm>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/lanes.h"
#include "kernels/cpu/slots.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

constexpr int64_t kBlockLanes = 64;  // queries of a block, where so many belong together
constexpr int64_t kBlockKeys = 120;  // scores of both fit the first-level cache

// out [columns, rows] = in [rows, columns]
template <typename A>
inline void transpose(
    const A* in, int64_t in_stride, int64_t rows, int64_t columns, A* out, int64_t out_stride) {
  constexpr int64_t kSide = 8;  // lines of both that are touched at once
  for (int64_t r = 0; r < rows; r += kSide) {
    for (int64_t c = 0; c < columns; ++c) {
      const int64_t count = std::min(kSide, rows - r);
      for (int64_t i = 0; i < count; ++i) out[c * out_stride + r + i] = in[(r + i) * in_stride + c];
    }
  }
}

// Keys of a span that lie together: rows from `row` on of the past's ring, or of the call's tensors.
struct KeyBlock {
  Range keys;  // of the span
  bool past = false;
  int64_t row = 0;
  int64_t size() const { return keys.size(); }
};

// Their rows in the arithmetic's type: where they lie, or widened copies.
template <typename A>
struct SpanRows {
  const A* data;
  int64_t stride;
};
template <typename S, typename A>
inline SpanRows<A> widened(const S* rows, int64_t stride, int64_t count, int64_t width, A* buffer) {
  if constexpr (std::is_same_v<S, A>) {
    return {rows, stride};
  } else {
    for (int64_t j = 0; j < count; ++j) load_slot(rows + j * stride, buffer + j * width, width);
    return {buffer, width};
  }
}

// Rows of a block of a span's keys or values: `x` are the call's, `ring` the past's.
template <typename T>
inline SpanRows<Acc<T>> rows_of(const SpansArgs& args,
                                const PastSpan& past,
                                int64_t b,
                                int64_t kv,
                                const KeyBlock& block,
                                const Strided& x,
                                void* ring,
                                int64_t width,
                                Acc<T>* buffer) {
  if (!block.past)
    return widened(row<T>(x, b, kv, block.row), x.token, block.size(), width, buffer);
  SpanRows<Acc<T>> found{};
  dispatch_slots<T>(past.storage, [&](auto type) {
    using S = decltype(type);
    const int64_t stride = stored_width<S>(width);
    const S* rows =
        ring_row<S>(ring, args.kv_heads, past.capacity, stride, past.row(b), kv, block.row);
    found = widened(rows, stride, block.size(), width, buffer);
  });
  return found;
}

template <typename T>
inline SpanRows<Acc<T>> key_rows(const SpansArgs& args,
                                 int64_t span,
                                 int64_t b,
                                 int64_t kv,
                                 const KeyBlock& block,
                                 Acc<T>* buffer) {
  const Span& s = args.spans[span];
  return rows_of<T>(args, s.past, b, kv, block, s.keys, s.past.keys, args.head_dim, buffer);
}

template <typename T>
inline SpanRows<Acc<T>> value_rows(const SpansArgs& args,
                                   int64_t span,
                                   int64_t b,
                                   int64_t kv,
                                   const KeyBlock& block,
                                   Acc<T>* buffer) {
  const Span& s = args.spans[span];
  return rows_of<T>(args, s.past, b, kv, block, s.values, s.past.values, args.value_dim, buffer);
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
