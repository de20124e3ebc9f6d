// Attention by plain multiply-adds: every type, every size, every kind of position. A block holds the
// queries of up to R rows (query heads of a kv head, at one or more neighbouring tokens) and walks over
// tiles of kTileKeys keys with a running maximum and sum (Milakov & Gimelshein 2018, arXiv:1805.02867),
// the next tile on its way while one is worked on. It takes all parts, or one split of one part: a
// piece of fixed length in the ring's own coordinates, so that which sums are made depends neither on
// the batch nor on how the stream was cut.
#pragma once

#include "kernels/cuda/attend_core_room.cuh"
#include "kernels/cuda/attend_split.cuh"

namespace ctx::cuda {

template <typename T, int R>
struct CoreBlock : RowTile {
  using A = Acc<T>;
  static constexpr int kVector = 16 / sizeof(T);  // numbers that a thread takes at once

  const CoreLaunch& l;
  const Attention& a;
  A *query, *relative, *table, *weights, *largest, *shrink, *totals;
  TokenView* views;
  char *keys, *values;
  int64_t query_width;
  int columns, groups;  // of threads: who holds which values, and who shares them
  A sums[R][kVector];

  CTX_DEVICE CoreBlock(const CoreLaunch& launch, int64_t head, int64_t tile)
      : RowTile(launch.a, launch.tiling, head, tile), l(launch), a(launch.a) {
    const CoreRoom room(l, R, sizeof(A));
    char* memory = shared_memory();
    query_width = room.query_width;
    query = reinterpret_cast<A*>(memory + room.query);
    relative = reinterpret_cast<A*>(memory + room.relative);
    table = reinterpret_cast<A*>(memory + room.table);
    weights = reinterpret_cast<A*>(memory + room.weights);
    largest = reinterpret_cast<A*>(memory + room.states);
    shrink = largest + R;
    totals = shrink + R;
    views = reinterpret_cast<TokenView*>(memory + room.views);
    keys = memory + room.keys;
    values = memory + room.values;
    const int64_t chunks = (a.value_dim + kVector - 1) / kVector;
    columns = 1;
    while (columns < chunks) columns *= 2;
    groups = kCoreThreads / columns;
  }

  CTX_DEVICE void begin() {
    const int tid = threadIdx.x;
    for (int r = tid; r < R; r += kCoreThreads) {
      largest[r] = minus_infinity<A>(), shrink[r] = A(1);
      for (int region = 0; region < kRegions; ++region) totals[r * kRegions + region] = A(0);
    }
    for (int64_t i = tid; i < R * query_width; i += kCoreThreads) query[i] = A(0);
    CTX_UNROLL for (int r = 0; r < R; ++r) CTX_UNROLL for (int e = 0; e < kVector; ++e) sums[r][e] =
        0;
    fill_views(a, b, first_token, tile_tokens, views);
  }

  // Queries at the clock of a region.
  CTX_DEVICE void load_queries(int region) {
    const int pieces = static_cast<int>(query_pieces(a));
    for (int task = threadIdx.x; task < rows() * pieces; task += kCoreThreads) {
      const int r = task / pieces;
      const bool present = used(r) && views[token_of(r)].t >= 0;
      const double position = present ? views[token_of(r)].clock[region] : 0;
      const auto piece = query_piece<T>(a,
                                        b,
                                        present ? head_of(r) : first_head,
                                        present ? token(r) : 0,
                                        position,
                                        present,
                                        task % pieces);
      query[r * query_width + piece.first] = piece.x;
      if (piece.second >= 0) query[r * query_width + piece.second] = piece.y;
    }
    const Strided& from = region == kCompressed ? a.relative.compressed : a.relative.queries;
    for (int64_t task = threadIdx.x; task < rows() * a.relative.dim; task += kCoreThreads) {
      const int r = static_cast<int>(task / a.relative.dim);
      const bool present = used(r) && views[token_of(r)].t >= 0 && from.data != nullptr;
      relative[task] =
          present ? wide<A>(row<T>(from, b, head_of(r), token(r))[task % a.relative.dim]) : A(0);
    }
  }

  // Keys begin ... end - 1 of a part; `all` threads.
  // kSame: they are stored as T, else as part.storage says.
  template <bool kSame>
  CTX_DEVICE void walk(const PartView& part, int64_t begin, int64_t end) {
    const Storage storage = kSame ? storage_of<T>() : part.part.storage;
    const int64_t key_row = row_bytes(storage, a.head_dim);
    const int64_t value_row = row_bytes(storage, a.value_dim);
    const CoreLayout key_layout(key_row), value_layout(value_row);
    const int key_piece = piece_of(part.part.keys, part.keys, key_row);
    const int value_piece = piece_of(part.part.values, part.values, value_row);
    clear_tails(keys, l.stages * kTileKeys, key_layout.bytes, key_layout.stride);
    clear_tails(values, l.stages * kTileKeys, value_layout.bytes, value_layout.stride);
    const auto next = [&](int64_t x) {
      while (x < end && !part.touches(x, x + kTileKeys < end ? kTileKeys : end - x)) x += kTileKeys;
      return x;
    };
    const auto fetch_keys = [&](int64_t x, int stage) {
      if (x < end)
        copy_rows(part,
                  x,
                  kTileKeys,
                  key_piece,
                  key_row,
                  keys + stage * kTileKeys * key_layout.stride,
                  key_layout.stride,
                  part.keys,
                  [&](int64_t i) { return part.key(i); });
      commit_copies();
    };
    const auto fetch_values = [&](int64_t x, int stage) {
      if (x < end)
        copy_rows(part,
                  x,
                  kTileKeys,
                  value_piece,
                  value_row,
                  values + stage * kTileKeys * value_layout.stride,
                  value_layout.stride,
                  part.values,
                  [&](int64_t i) { return part.value(i); });
      commit_copies();
    };
    int stage = 0;
    int64_t x = next(begin);
    if (l.stages > 1) fetch_keys(x, 0), fetch_values(x, 0);
    load_queries(part.part.region);  // while the first tile is on its way
    while (x < end) {
      const int64_t after = next(x + kTileKeys);
      if (l.stages > 1) {
        fetch_keys(after, 1 - stage), fetch_values(after, 1 - stage);
        wait_copies<3>();
      } else {
        fetch_keys(x, 0), fetch_values(x, 0);
        wait_copies<1>();
      }
      __syncthreads();
      const char* key_tile = keys + stage * kTileKeys * key_layout.stride;
      const char* value_tile = values + stage * kTileKeys * value_layout.stride;
      multiply_keys<kSame>(storage, key_tile, key_layout.stride);
      __syncthreads();
      if (a.relative.dim > 0) add_relative(part, x, end);
      weigh(part, x, end);
      if (l.stages > 1) {
        wait_copies<2>();
      } else {
        wait_copies<0>();
      }
      __syncthreads();
      add_values<kSame>(storage, value_tile, value_layout.stride);
      __syncthreads();
      x = after;
      if (l.stages > 1) stage = 1 - stage;
    }
    wait_copies<0>();
    __syncthreads();
  }

  // Vector c of a row in shared memory.
  template <bool kSame>
  CTX_DEVICE static void load_vector(Storage storage, const char* row, int c, A (&to)[kVector]) {
    if constexpr (kSame) {
      const auto x = reinterpret_cast<const Vector<T>*>(row)[c];
      CTX_UNROLL for (int e = 0; e < kVector; ++e) to[e] = wide<A>(x.x[e]);
    } else {
      load_numbers(storage, row + c * kVector * size_of(storage), to);
    }
  }

  // weights[r][j] = query r . key j; four threads share a key.
  template <bool kSame>
  CTX_DEVICE void multiply_keys(Storage storage, const char* tile, int64_t stride) {
    const int j = threadIdx.x / 4, quarter = threadIdx.x % 4;
    const char* key = tile + j * stride;
    const int chunks = static_cast<int>((a.head_dim + kVector - 1) / kVector);
    A sum[R];
    CTX_UNROLL for (int r = 0; r < R; ++r) sum[r] = A(0);
    for (int c = quarter; c < chunks; c += 4) {
      A k[kVector];
      load_vector<kSame>(storage, key, c, k);
      CTX_UNROLL for (int r = 0; r < R; ++r) {
        const A* q = query + r * query_width + c * kVector;
        CTX_UNROLL for (int e = 0; e < kVector; ++e) sum[r] += q[e] * k[e];
      }
    }
    A scale = 1;
    if (!kSame && storage == Storage::kInt8)
      scale = static_cast<A>(scale_of(reinterpret_cast<const int8_t*>(key), a.head_dim));
    CTX_UNROLL for (int r = 0; r < R; ++r) {
      A whole = sum[r];
      whole += __shfl_xor_sync(0xffffffffu, whole, 1);
      whole += __shfl_xor_sync(0xffffffffu, whole, 2);
      if (quarter == r % 4) weights[r * kTileKeys + j] = whole * scale;
    }
  }

  // Products of the relative queries with the sinusoids of each token's distances.
  CTX_DEVICE void add_relative(const PartView& part, int64_t x, int64_t end) {
    const int64_t dim = a.relative.dim, half = dim / 2;
    for (int i = 0; i < tile_tokens; ++i) {
      const TokenView& view = views[i];
      for (int64_t task = threadIdx.x; task < kTileKeys * half; task += kCoreThreads) {
        const int64_t j = task / half, w = task % half;
        A sine = 0, cosine = 0;
        if (x + j < end && view.t >= 0)
          sine_and_cosine(
              distance(a, view, part, x + j) * relative_frequency(w, dim), sine, cosine);
        table[j * dim + w] = sine;
        table[j * dim + half + w] = cosine;
      }
      __syncthreads();
      for (int task = threadIdx.x; task < tile_heads * kTileKeys; task += kCoreThreads) {
        const int r = i * tile_heads + task / kTileKeys, j = task % kTileKeys;
        A sum = 0;
        for (int64_t w = 0; w < dim; ++w) sum += relative[r * dim + w] * table[j * dim + w];
        weights[r * kTileKeys + j] += sum;
      }
      __syncthreads();
    }
  }

  // Products to weights, a warp per row and a lane per key.
  CTX_DEVICE void weigh(const PartView& part, int64_t x, int64_t end) {
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int r = warp; r < rows(); r += kCoreThreads / 32) {
      A* place = weights + r * kTileKeys + lane;
      A score = minus_infinity<A>();
      if (used(r) && x + lane < end && sees(views[token_of(r)], part, x + lane))
        score = finish_score(a, views[token_of(r)], part, x + lane, head_of(r), *place);
      A most = score;
      CTX_UNROLL for (int bits = 16; bits > 0; bits /= 2) most =
          maximum(most, __shfl_xor_sync(0xffffffffu, most, bits));
      const A before = largest[r];
      const A now = maximum(before, most);
      // All scores minus infinity so far (a bias may be): their weights are zero, not NaN.
      const A reference = now == minus_infinity<A>() ? A(0) : now;
      const A weight = exponential(score - reference);
      *place = weight;
      A total = weight;
      CTX_UNROLL for (int bits = 16; bits > 0; bits /= 2) total +=
          __shfl_xor_sync(0xffffffffu, total, bits);
      __syncwarp();  // all lanes have read what lane 0 writes
      if (lane == 0) {
        const A factor = exponential(before - reference);
        largest[r] = now, shrink[r] = factor;
        for (int region = 0; region < kRegions; ++region) totals[r * kRegions + region] *= factor;
        totals[r * kRegions + part.part.region] += total;
      }
    }
  }

  // sums += weights . values; a thread holds some columns, for every groups-th key.
  template <bool kSame>
  CTX_DEVICE void add_values(Storage storage, const char* tile, int64_t stride) {
    const int column = threadIdx.x % columns * kVector, group = threadIdx.x / columns;
    CTX_UNROLL for (int r = 0; r < R; ++r) {
      const A factor = r < rows() ? shrink[r] : A(1);
      CTX_UNROLL for (int e = 0; e < kVector; ++e) sums[r][e] *= factor;
    }
    if (column >= a.value_dim) return;
    for (int j = group; j < kTileKeys; j += groups) {
      const char* value = tile + j * stride;
      A scale = 1;
      if (!kSame && storage == Storage::kInt8)
        scale = static_cast<A>(scale_of(reinterpret_cast<const int8_t*>(value), a.value_dim));
      A v[kVector];
      load_vector<kSame>(storage, value, column / kVector, v);
      if (!kSame) CTX_UNROLL for (int e = 0; e < kVector; ++e) v[e] *= scale;
      CTX_UNROLL for (int r = 0; r < R; ++r) {
        const A weight = r < rows() ? weights[r * kTileKeys + j] : A(0);
        if (weight == A(0)) continue;  // zero times NaN is NaN
        CTX_UNROLL for (int e = 0; e < kVector; ++e) sums[r][e] += weight * v[e];
      }
    }
  }

  // Adds up what threads of the same columns hold, in their order, and stores all rows.
  CTX_DEVICE void end(int64_t split) {
    auto* room = reinterpret_cast<A*>(keys);  // [groups, R, columns * kVector]
    const int wide_columns = columns * kVector;
    const int column = threadIdx.x % columns, group = threadIdx.x / columns;
    CTX_UNROLL for (int r = 0; r < R; ++r) CTX_UNROLL for (int e = 0; e < kVector; ++e)
        room[(group * R + r) * wide_columns + column * kVector + e] = sums[r][e];
    __syncthreads();
    for (int r = 0; r < rows(); ++r) {
      if (!used(r)) continue;
      const auto value = [&](int64_t d) {
        A sum = 0;
        for (int g = 0; g < groups; ++g) sum += room[(g * R + r) * wide_columns + d];
        return sum;
      };
      store_row<T>(
          a, *this, r, split, views[token_of(r)].t >= 0, largest[r], totals + r * kRegions, value);
    }
  }

  CTX_DEVICE void walk_part(int p, int64_t begin, int64_t end) {
    const Part& part = a.part[p];
    const Range hull = hull_of(views, tile_tokens, part.region);
    if (hull.size() <= 0) return;
    const PartView view(a, part, b, kv, hull);
    if (part.storage == storage_of<T>()) return walk<true>(view, begin, end);
    if constexpr (!std::is_same_v<T, double>) walk<false>(view, begin, end);
  }
};

// Blocks that a multiprocessor should hold: where the compiler aims at three by itself and spills for it,
// two is what it is told.
template <typename T, int R>
constexpr int kCoreBlocks = R == 4 || sizeof(T) == 8 ? 2 : 1;

// Grid [token tiles * head tiles, kv heads * batch, splits].
template <typename T, int R>
__global__ void __launch_bounds__(kCoreThreads, kCoreBlocks<T, R>)
    attend_core(const __grid_constant__ CoreLaunch l) {
  CoreBlock<T, R> block(l, blockIdx.y, blockIdx.x);
  block.begin();
  for_parts(
      l.a, blockIdx.z, [&](int p, int64_t begin, int64_t end) { block.walk_part(p, begin, end); });
  block.end(blockIdx.z);
}

}  // namespace ctx::cuda
