// Attention by mma.sync.m16n8k16, for bfloat16 and float16 with slots of the same type or int8. A tile of
// kMmaKeys keys lies in shared memory, the next one on its way. Few queries (kByKeys): one tile of 16 rows, whose
// keys are shared out over the four warps of a block, each with a softmax of its own; they are merged
// at the end, in the order of the warps. Many queries: four tiles of 16 rows, one per warp.
//
// Fragments (PTX manual, m16n8k16): lane l holds rows l / 4 and l / 4 + 8, columns 2 (l % 4) and + 1.
#pragma once

#include "kernels/cuda/attend_mma_tiles.cuh"

namespace ctx::cuda {

template <typename T, int kValues, bool kByKeys>
struct MmaBlock : MmaTiles<T>, RowTile {
  using Tiles = MmaTiles<T>;
  using Tiles::a;
  using Tiles::describe;
  using Tiles::key_layout;
  using Tiles::memory;
  using Tiles::room;
  using Tiles::value_layout;
  using Tiles::widen;
  static constexpr int kRows = kByKeys ? kMmaRows : 4 * kMmaRows;
  static constexpr int kChunks = kByKeys ? 1 : kMmaKeys / 16;  // of 16 keys, of a warp

  const MmaLaunch& l;
  TokenView* views;
  int warp, lane, row_base;
  // Of the rows lane / 4 and lane / 4 + 8 of the warp's tile:
  float largest[2], totals[2][kRegions];
  float sums[kValues / 8][4];
  // of a part:
  int low[2], high[2];
  float bias[2], slope[2], distance_of_first[2];

  CTX_DEVICE MmaBlock(const MmaLaunch& launch, int64_t head, int64_t tile)
      : Tiles(launch, kRows), RowTile(launch.a, launch.tiling, head, tile), l(launch) {
    views = reinterpret_cast<TokenView*>(memory + room.views);
    warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    row_base = kByKeys ? 0 : warp * kMmaRows;
  }

  CTX_DEVICE int row_of(int half) const { return row_base + lane / 4 + 8 * half; }

  CTX_DEVICE void begin() {
    auto* query = reinterpret_cast<uint32_t*>(memory + room.query);
    for (int i = threadIdx.x; i < kRows * key_layout.stride / 4; i += kMmaThreads) query[i] = 0;
    CTX_UNROLL for (int half = 0; half < 2; ++half) {
      largest[half] = minus_infinity<float>();
      CTX_UNROLL for (int region = 0; region < kRegions; ++region) totals[half][region] = 0;
    }
    CTX_UNROLL for (int n = 0; n < kValues / 8; ++n) CTX_UNROLL for (int e = 0; e < 4; ++e)
        sums[n][e] = 0;
    fill_views(a, b, first_token, tile_tokens, views);
  }

  // Queries at the clock of a part's region, and what its scores are made of.
  CTX_DEVICE void enter(const PartView& part) {
    const int region = part.part.region;
    const int pieces = static_cast<int>(query_pieces(a));
    char* query = memory + room.query;
    for (int task = threadIdx.x; task < rows() * pieces; task += kMmaThreads) {
      const int r = task / pieces;
      if (!used(r) || views[token_of(r)].t < 0) continue;  // zero since begin()
      const auto piece = query_piece<T>(
          a, b, head_of(r), token(r), views[token_of(r)].clock[region], true, task % pieces);
      const auto put = [&](int64_t d, float x) {
        *reinterpret_cast<T*>(query + key_layout.place(r, static_cast<int>(d))) = narrow<T>(x);
      };
      put(piece.first, piece.x);
      if (piece.second >= 0) put(piece.second, piece.y);
    }
    for (int half = 0; half < 2; ++half) {
      const int r = row_of(half);
      low[half] = high[half] = 0, bias[half] = slope[half] = distance_of_first[half] = 0;
      if (!used(r) || views[token_of(r)].t < 0) continue;
      const TokenView& view = views[token_of(r)];
      const int64_t size = part.seen;
      low[half] = static_cast<int>(clamped(view.low[region] - part.hull.begin, 0, size));
      high[half] = static_cast<int>(clamped(view.high[region] - part.hull.begin, 0, size));
      if (region == kCompressed && a.bias != nullptr)
        bias[half] = static_cast<const float*>(a.bias)[head_of(r)];
      if (a.slopes == nullptr) continue;
      slope[half] = static_cast<const float*>(a.slopes)[head_of(r)];
      distance_of_first[half] = static_cast<float>(
          view.clock[region] - key_clock(a.clock, region, part.hull.begin + view.shift[region]));
    }
  }

  template <bool kInt8>
  CTX_DEVICE void walk(const PartView& part, int64_t begin, int64_t end) {
    const auto next = [&](int64_t x) {
      while (x < end && !part.touches(x, x + kMmaKeys < end ? kMmaKeys : end - x)) x += kMmaKeys;
      return x;
    };
    int stage = 0;
    int64_t x = next(begin);
    this->template fetch<kInt8>(part, x, end, 0, false),
        this->template fetch<kInt8>(part, x, end, 0, true);
    enter(part);  // while the first tile is on its way
    while (x < end) {
      const int64_t after = next(x + kMmaKeys);
      this->template fetch<kInt8>(part, after, end, 1 - stage, false);
      this->template fetch<kInt8>(part, after, end, 1 - stage, true);
      describe(part, x, end);
      wait_copies<3>();
      __syncthreads();
      if constexpr (kInt8) {
        widen(stage, false);
        __syncthreads();
      }
      float scores[2 * kChunks][4];
      multiply_keys(kInt8 ? 0 : stage, scores);
      weigh<kInt8>(part.part.region, scores);
      wait_copies<2>();
      __syncthreads();
      if constexpr (kInt8) {
        widen(stage, true);
        __syncthreads();
        scale_weights(scores);
      }
      char* tile = memory + room.values + (kInt8 ? 0 : stage * room.value_stage);
      if (!kInt8 && tile_tokens > 1) keep_apart(tile, scores);
      add_values(tile, scores);
      __syncthreads();
      x = after, stage = 1 - stage;
    }
    wait_copies<0>();
    __syncthreads();
  }

  CTX_DEVICE int first_key(int chunk) const { return (kByKeys ? warp : chunk) * 16; }

  CTX_DEVICE void multiply_keys(int stage, float (&scores)[2 * kChunks][4]) const {
    const char* query = memory + room.query;
    const char* keys = memory + room.keys + stage * room.key_stage;
    CTX_UNROLL for (int n = 0; n < 2 * kChunks; ++n) CTX_UNROLL for (int e = 0; e < 4; ++e)
        scores[n][e] = 0;
    for (int k = 0; k < a.head_dim; k += 16) {
      uint32_t q[4];
      load_matrices<false>(q, query + key_layout.place(row_base + lane % 16, k + lane / 16 * 8));
      CTX_UNROLL for (int chunk = 0; chunk < kChunks; ++chunk) {
        uint32_t x[4];
        const int j = first_key(chunk) + lane / 16 * 8 + lane % 8;
        load_matrices<false>(x, keys + key_layout.place(j, k + lane / 8 % 2 * 8));
        multiply_tile<T>(scores[2 * chunk], q, x[0], x[1]);
        multiply_tile<T>(scores[2 * chunk + 1], q, x[2], x[3]);
      }
    }
  }

  CTX_DEVICE int key_of(int n, int e) const {
    return first_key(n / 2) + n % 2 * 8 + lane % 4 * 2 + e % 2;
  }

  // Products to weights relative to the largest score so far of each row.
  template <bool kInt8>
  CTX_DEVICE void weigh(int region, float (&scores)[2 * kChunks][4]) {
    const auto* offset = reinterpret_cast<const int*>(memory + room.key_offset);
    const auto* mass = reinterpret_cast<const float*>(memory + room.mass);
    const auto* key_scale = reinterpret_cast<const float*>(memory + room.key_scale);
    const auto scale = static_cast<float>(a.scale), cap = static_cast<float>(a.softcap);
    const auto step =
        static_cast<float>(key_clock(a.clock, region, 1) - key_clock(a.clock, region, 0));
    float most[2] = {minus_infinity<float>(), minus_infinity<float>()};
    CTX_UNROLL for (int n = 0; n < 2 * kChunks; ++n) {
      CTX_UNROLL for (int e = 0; e < 4; ++e) {
        const int j = key_of(n, e), half = e / 2, place = offset[j];
        float score = scores[n][e] * scale;
        if constexpr (kInt8) score *= key_scale[j];
        if (cap > 0) score = cap * tanhf(score / cap);
        score += bias[half] + mass[j];
        score -= slope[half] * (distance_of_first[half] - step * static_cast<float>(place));
        const bool seen = place >= low[half] && place < high[half];
        scores[n][e] = seen ? score : minus_infinity<float>();
        most[half] = maximum(most[half], scores[n][e]);
      }
    }
    float factor[2];
    CTX_UNROLL for (int half = 0; half < 2; ++half) {
      most[half] = maximum(most[half], __shfl_xor_sync(0xffffffffu, most[half], 1));
      most[half] = maximum(most[half], __shfl_xor_sync(0xffffffffu, most[half], 2));
      const float now = maximum(largest[half], most[half]);
      const float reference = now == minus_infinity<float>() ? 0.0f : now;
      factor[half] = exponential(largest[half] - reference);
      largest[half] = now;
      float total = 0;
      CTX_UNROLL for (int n = 0; n < 2 * kChunks; ++n) {
        CTX_UNROLL for (int e = 0; e < 2; ++e) {
          float& score = scores[n][2 * half + e];
          score = exponential(score - reference);
          total += score;
        }
      }
      CTX_UNROLL for (int r = 0; r < kRegions; ++r) totals[half][r] =
          totals[half][r] * factor[half] + (r == region ? total : 0.0f);
    }
    CTX_UNROLL for (int n = 0; n < kValues / 8; ++n) CTX_UNROLL for (int e = 0; e < 4; ++e)
        sums[n][e] *= factor[e / 2];
  }

  CTX_DEVICE void scale_weights(float (&scores)[2 * kChunks][4]) const {
    const auto* value_scale = reinterpret_cast<const float*>(memory + room.value_scale);
    CTX_UNROLL for (int n = 0; n < 2 * kChunks; ++n) CTX_UNROLL for (int e = 0; e < 4; ++e) {
      if (scores[n][e] != 0.0f) scores[n][e] *= value_scale[key_of(n, e)];
    }
  }

  // Zero times NaN is NaN: values that are not finite are added here to the queries that see them, and
  // are zero in the tile behind.
  CTX_DEVICE void keep_apart(char* tile, const float (&scores)[2 * kChunks][4]) {
    int any = 0;
    for (int64_t task = threadIdx.x; task < kMmaKeys * a.value_dim; task += kMmaThreads) {
      const int j = static_cast<int>(task / a.value_dim), d = static_cast<int>(task % a.value_dim);
      any |= !is_finite(wide<float>(*reinterpret_cast<T*>(tile + value_layout.place(j, d))));
    }
    if (__syncthreads_or(any) == 0) return;
    CTX_ROLLED for (int column = 0; column < 16 * kChunks; ++column) {
      const int j = first_key(0) + column, source = lane / 4 * 4 + column % 8 / 2;
      float mine[4] = {0, 0, 0, 0};
      CTX_UNROLL for (int n = 0; n < 2 * kChunks; ++n) CTX_UNROLL for (int e = 0; e < 4; ++e) {
        if (n == column / 8) mine[e] = scores[n][e];
      }
      float weight[2];
      CTX_UNROLL for (int half = 0; half < 2; ++half) {
        const float even = __shfl_sync(0xffffffffu, mine[2 * half], source);
        const float odd = __shfl_sync(0xffffffffu, mine[2 * half + 1], source);
        weight[half] = column % 2 == 0 ? even : odd;
      }
      CTX_UNROLL for (int m = 0; m < kValues / 8; ++m) CTX_UNROLL for (int e = 0; e < 4; ++e) {
        const int d = m * 8 + lane % 4 * 2 + e % 2;
        if (d >= a.value_dim) continue;
        const float v = wide<float>(*reinterpret_cast<T*>(tile + value_layout.place(j, d)));
        if (!is_finite(v) && weight[e / 2] != 0.0f) sums[m][e] += weight[e / 2] * v;
      }
    }
    __syncthreads();
    for (int64_t task = threadIdx.x; task < kMmaKeys * a.value_dim; task += kMmaThreads) {
      const int j = static_cast<int>(task / a.value_dim), d = static_cast<int>(task % a.value_dim);
      T* place = reinterpret_cast<T*>(tile + value_layout.place(j, d));
      if (!is_finite(wide<float>(*place))) *place = T{0};
    }
    __syncthreads();
  }

  CTX_DEVICE void add_values(const char* tile, const float (&scores)[2 * kChunks][4]) {
    CTX_UNROLL for (int chunk = 0; chunk < kChunks; ++chunk) {
      const float (&one)[4] = scores[2 * chunk];
      const float (&two)[4] = scores[2 * chunk + 1];
      const uint32_t weights[4] = {packed(T::bits_of(one[0]), T::bits_of(one[1])),
                                   packed(T::bits_of(one[2]), T::bits_of(one[3])),
                                   packed(T::bits_of(two[0]), T::bits_of(two[1])),
                                   packed(T::bits_of(two[2]), T::bits_of(two[3]))};
      const int j = first_key(chunk) + lane % 16;
      CTX_UNROLL for (int n = 0; n < kValues / 8; n += 2) {
        if (n * 8 >= a.value_dim) break;
        uint32_t v[4];
        load_matrices<true>(v, tile + value_layout.place(j, n * 8 + lane / 16 * 8));
        multiply_tile<T>(sums[n], weights, v[0], v[1]);
        multiply_tile<T>(sums[n + 1], weights, v[2], v[3]);
      }
    }
  }

  // All warps lay down their sums, [warps, 16, value_dim + 1 + regions]; then rows are merged and stored.
  CTX_DEVICE void end(int64_t split) {
    auto* all = reinterpret_cast<float*>(memory + room.keys);
    const int width = static_cast<int>(a.value_dim) + 1 + kRegions;
    CTX_UNROLL for (int half = 0; half < 2; ++half) {
      float* mine = all + (warp * kMmaRows + lane / 4 + 8 * half) * width;
      CTX_UNROLL for (int region = 0; region < kRegions; ++region) {
        totals[half][region] += __shfl_xor_sync(0xffffffffu, totals[half][region], 1);
        totals[half][region] += __shfl_xor_sync(0xffffffffu, totals[half][region], 2);
        if (lane % 4 == 0) mine[1 + region] = totals[half][region];
      }
      if (lane % 4 == 0) mine[0] = largest[half];
      CTX_UNROLL for (int n = 0; n < kValues / 8; ++n) CTX_UNROLL for (int e = 0; e < 2; ++e) {
        const int d = n * 8 + lane % 4 * 2 + e;
        if (d < a.value_dim) mine[1 + kRegions + d] = sums[n][2 * half + e];
      }
    }
    __syncthreads();
    for (int r = 0; r < kRows; ++r) {
      if (!used(r)) continue;
      const float* first = all + r * width;
      const int parts = kByKeys ? 4 : 1, step = kMmaRows * width;
      float most = minus_infinity<float>();
      for (int w = 0; w < parts; ++w) most = maximum(most, first[w * step]);
      const float reference = most == minus_infinity<float>() ? 0.0f : most;
      float factor[4];
      CTX_UNROLL for (int w = 0; w < 4; ++w) factor[w] =
          w < parts ? exponential(first[w * step] - reference) : 0.0f;
      const auto sum_of = [&](int64_t place) {
        float sum = 0;
        CTX_UNROLL for (int w = 0; w < 4; ++w) {
          if (w < parts) sum += factor[w] * first[w * step + place];
        }
        return sum;
      };
      const float whole[kRegions] = {sum_of(1), sum_of(2), sum_of(3)};
      const auto value = [&](int64_t d) { return sum_of(1 + kRegions + d); };
      store_row<T>(a, *this, r, split, views[token_of(r)].t >= 0, most, whole, value);
    }
  }

  CTX_DEVICE void walk_part(int p, int64_t begin, int64_t end) {
    const Part& part = a.part[p];
    const Range hull = hull_of(views, tile_tokens, part.region);
    if (hull.size() <= 0) return;
    const PartView view(a, part, b, kv, hull);
    if (part.storage == Storage::kInt8) {
      walk<true>(view, begin, end);
    } else {
      walk<false>(view, begin, end);
    }
  }
};

// Grid [token tiles * head tiles, kv heads * batch, splits].
template <typename T, int kValues, bool kByKeys>
__global__ void __launch_bounds__(kMmaThreads, 2) attend_mma(const __grid_constant__ MmaLaunch l) {
  MmaBlock<T, kValues, kByKeys> block(l, blockIdx.y, blockIdx.x);
  block.begin();
  for_parts(
      l.a, blockIdx.z, [&](int p, int64_t begin, int64_t end) { block.walk_part(p, begin, end); });
  block.end(blockIdx.z);
}

}  // namespace ctx::cuda
