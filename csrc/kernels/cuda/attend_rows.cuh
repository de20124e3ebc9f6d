// The rows of a block: query heads of one kv head at some neighbouring tokens, and where their sums go.
#pragma once

#include "kernels/cuda/attention.cuh"

namespace ctx::cuda {

// How rows are cut into tiles of at most `most` rows.
struct RowTiling {
  int tokens;      // of a tile
  int heads;       // query heads of a tile
  int head_tiles;  // tiles that share the query heads of a kv head

  static RowTiling of(const Attention& a, int64_t most) {
    const int64_t tiles = (a.q_per_kv() + most - 1) / most;
    const int64_t heads = (a.q_per_kv() + tiles - 1) / tiles;
    const int64_t fit = tiles > 1 ? 1 : most / heads;
    const int64_t tokens = fit < a.tokens ? fit : a.tokens;
    return {static_cast<int>(tokens), static_cast<int>(heads), static_cast<int>(tiles)};
  }
  // Of one row of the batch and kv head.
  CTX_HOST_DEVICE int64_t tiles(const Attention& a) const {
    return (a.tokens + tokens - 1) / tokens * head_tiles;
  }
};

struct RowTile {
  int64_t b, kv;
  int64_t first_token, first_head;
  int64_t last_head, last_token;  // of the kv head, of the call; behind them
  int tile_tokens, tile_heads;

  // Tile `tile` of number `head` of [batch, kv heads].
  CTX_DEVICE RowTile(const Attention& a, const RowTiling& tiling, int64_t head, int64_t tile)
      : b(head / a.kv_heads), kv(head % a.kv_heads) {
    last_head = (kv + 1) * a.q_per_kv(), last_token = a.tokens;
    tile_tokens = tiling.tokens, tile_heads = tiling.heads;
    move_to(a, tiling, tile);
  }
  CTX_DEVICE void move_to(const Attention& a, const RowTiling& tiling, int64_t tile) {
    first_token = tile / tiling.head_tiles * tile_tokens;
    first_head = kv * a.q_per_kv() + tile % tiling.head_tiles * tile_heads;
  }

  CTX_DEVICE int rows() const { return tile_tokens * tile_heads; }
  CTX_DEVICE int token_of(int r) const { return r / tile_heads; }  // in the tile
  CTX_DEVICE int64_t token(int r) const { return first_token + token_of(r); }
  CTX_DEVICE int64_t head_of(int r) const { return first_head + r % tile_heads; }
  CTX_DEVICE bool used(int r) const {
    return r < rows() && head_of(r) < last_head && token(r) < last_token;
  }
};

// Partial sums of one row and split: largest score, weights of the regions, weighted values.
template <typename A>
CTX_DEVICE A* partial(const Attention& a, int64_t b, int64_t head, int64_t i, int64_t split) {
  const int64_t row = (b * a.heads + head) * a.tokens + i;
  return static_cast<A*>(a.workspace) + (row * a.splits + split) * (a.value_dim + 1 + kRegions);
}

// What a row has summed up goes to the outputs; `lane` of `lanes` threads, values(d) unscaled.
template <typename T, typename F>
CTX_DEVICE void store_row_sums(const Attention& a,
                               int64_t b,
                               int64_t head,
                               int64_t i,
                               bool present,
                               Acc<T> largest,
                               const Acc<T>* totals,
                               int64_t lane,
                               int64_t lanes,
                               const F& values) {
  using A = Acc<T>;
  const A total = totals[0] + totals[1] + totals[2];
  // Without a key: zero. All scores minus infinity: zero by zero in a memory, zero in a span.
  const bool none = !present || (a.position != nullptr && total == A(0));
  const A inverse = none ? A(0) : A(1) / total;
  T* out = row<T>(a.out, b, head, i);
  for (int64_t d = lane; d < a.value_dim; d += lanes)
    out[d] = narrow<T>(none ? A(0) : values(d) * inverse);
  if (lane != 0) return;
  const int64_t index = (b * a.heads + head) * a.tokens + i;
  if (a.logsumexp != nullptr)
    static_cast<A*>(a.logsumexp)[index] =
        present ? largest + logarithm(total) : minus_infinity<A>();
  if (a.region_weights == nullptr) return;
  A* weights = static_cast<A*>(a.region_weights) +
               ((b * a.heads + head) * a.call_tokens + a.offset + i) * kRegions;
  for (int region = 0; region < kRegions; ++region)
    weights[region] = none ? A(0) : totals[region] * inverse;
}

// The same, or to the row's partial sums where a block takes one split of it.
template <typename T, typename F>
CTX_DEVICE void store_row(const Attention& a,
                          const RowTile& tile,
                          int r,
                          int64_t split,
                          bool present,
                          Acc<T> largest,
                          const Acc<T>* totals,
                          const F& value) {
  using A = Acc<T>;
  const int64_t b = tile.b, head = tile.head_of(r), i = tile.token(r);
  if (a.split_length == 0) {
    store_row_sums<T>(a, b, head, i, present, largest, totals, threadIdx.x, blockDim.x, value);
    return;
  }
  A* to = partial<A>(a, b, head, i, split);
  for (int64_t d = threadIdx.x; d < a.value_dim; d += blockDim.x) to[1 + kRegions + d] = value(d);
  if (threadIdx.x != 0) return;
  to[0] = largest;
  for (int region = 0; region < kRegions; ++region) to[1 + region] = totals[region];
  const bool empty = largest == minus_infinity<A>();
  if (CTX_PLANTED(kUnmaskedEmptySplit) && empty) to[0] = A(0), to[1] = A(1);
}

}  // namespace ctx::cuda
