// What a block of the plain attention kernel is given, and how its shared memory is cut.
#pragma once

#include "kernels/cuda/attend_rows.cuh"
#include "kernels/cuda/tile_copy.cuh"

namespace ctx::cuda {

constexpr int kTileKeys = 32;  // a warp's lanes hold the scores of a row
constexpr int kMostTokens = 8;

struct CoreLaunch {
  Attention a;
  RowTiling tiling;
  int stages;                        // tiles in shared memory
  int64_t key_stride, value_stride;  // of the widest part
};

// How a block's memory is cut; in bytes.
struct CoreRoom {
  int64_t query, relative, table, weights, states, views, keys, values, all;
  CTX_HOST_DEVICE CoreRoom(const CoreLaunch& l, int rows, int64_t size) {
    const Attention& a = l.a;
    query_width = (a.head_dim + 15) / 16 * 16;
    int64_t next = 0;
    const auto take = [&](int64_t bytes) {
      const int64_t place = next;
      next += (bytes + 15) / 16 * 16;
      return place;
    };
    query = take(rows * query_width * size);
    relative = take(rows * a.relative.dim * size);
    table = take(a.relative.dim > 0 ? kTileKeys * a.relative.dim * size : 0);
    weights = take(rows * kTileKeys * size);
    states = take(rows * (2 + kRegions) * size);
    views = take(kMostTokens * static_cast<int64_t>(sizeof(TokenView)));
    keys = take(l.stages * kTileKeys * l.key_stride);
    values = take(l.stages * kTileKeys * l.value_stride);
    all = next;
    // At the end the sums of threads that share columns lie where keys and values were.
    const int64_t sums = keys + kCoreThreads * rows * 32;
    all = sums > next ? sums : next;
  }
  int64_t query_width;
};

}  // namespace ctx::cuda
