// A tile of the backward of attention (spans_backward.cuh). Gradients of one softmax over three spans: weights are made again out of the log-sum-exp, a tile of
// queries against a tile of keys at a time (Dao et al. 2022, arXiv:2205.14135, appendix B.2). Two
// kernels of the same tiles: one sums over keys and makes the gradients of queries, the other sums over
// queries and makes those of keys and values. Every sum has one owner and one order, so that its bits follow
// from sizes alone.
//
// A pair that the law does not show is left out of every sum by selection: zero times NaN is NaN. A
// query whose outputs have no gradient takes part in nothing.
#pragma once

#include "kernels/cuda/attend_rows.cuh"
#include "kernels/cuda/attention_build.cuh"

namespace ctx::cuda {

constexpr int kBackwardThreads = 128;

struct BackwardLaunch {
  Attention a;
  Strided grad_out;
  const void* grad_logsumexp;
  Strided grad_queries, grad_relative, grad_compressed_relative;
  int64_t key_width, value_width;
  void *grad_keys[kRegions], *grad_values[kRegions], *grad_mass[kRegions];
  void* bias_parts;  // [B, H, T]: sums of each query; null: no bias
  int tile;          // rows, and keys, of a tile
  RowTiling tiling;
};

// How a block's memory is cut, in numbers of A; rows are one number longer, for other banks.
struct BackwardRoom {
  int64_t query, key, value, out, sums_of_keys, sums_of_values, total, weights, grads, slopes;
  int64_t relative, relative_sums;
  int64_t states, views, all;
  CTX_HOST_DEVICE explicit BackwardRoom(const BackwardLaunch& l) {
    int64_t next = 0;
    const auto take = [&](int64_t numbers) {
      const int64_t place = next;
      next += (numbers + 3) / 4 * 4;
      return place;
    };
    const int64_t n = l.tile, d = l.a.head_dim + 1, dv = l.a.value_dim + 1, z = l.a.relative.dim;
    query = take(n * d), key = take(n * d), sums_of_keys = take(n * d), total = take(n * d);
    value = take(n * dv), out = take(n * dv), sums_of_values = take(n * dv);
    weights = take(n * (n + 1)), grads = take(n * (n + 1)), slopes = take(n * (n + 1));
    relative = take(2 * n * z), relative_sums = take(2 * n * z);
    states = take(4 * n);
    views = next;  // multiples of 16 bytes so far
    all = next;
  }
  CTX_HOST_DEVICE int64_t bytes(const BackwardLaunch& l, int64_t size) const {
    return all * size + l.tile * static_cast<int64_t>(sizeof(TokenView));
  }
};

template <typename T>
struct BackwardTile : RowTile {
  using A = Acc<T>;
  const BackwardLaunch& l;
  const Attention& a;
  int64_t query_stride, value_stride;
  A *query, *key, *value, *out, *sums_of_keys, *sums_of_values, *total, *weights, *grads, *slopes;
  A *relative, *relative_sums, *logsumexp, *base, *bias, *mass;
  TokenView* views;

  CTX_DEVICE BackwardTile(const BackwardLaunch& launch, int64_t head)
      : RowTile(launch.a, launch.tiling, head, 0), l(launch), a(launch.a) {
    const BackwardRoom room(l);
    A* memory = reinterpret_cast<A*>(shared_memory());
    query_stride = a.head_dim + 1, value_stride = a.value_dim + 1;
    query = memory + room.query, key = memory + room.key, value = memory + room.value;
    out = memory + room.out, weights = memory + room.weights, grads = memory + room.grads;
    slopes = memory + room.slopes, total = memory + room.total;
    sums_of_keys = memory + room.sums_of_keys, sums_of_values = memory + room.sums_of_values;
    relative = memory + room.relative, relative_sums = memory + room.relative_sums;
    logsumexp = memory + room.states, base = logsumexp + l.tile;
    bias = base + l.tile, mass = bias + l.tile;
    views = reinterpret_cast<TokenView*>(memory + room.views);
  }

  CTX_DEVICE int64_t index_of(int r) const {
    return (b * a.heads + head_of(r)) * a.tokens + token(r);
  }

  CTX_DEVICE void place(int64_t tile) {
    move_to(a, l.tiling, tile);
    fill_views(a, b, first_token, tile_tokens, views);
  }

  // Gradients of the outputs, and what every weight's gradient is relative to: sum_j p_j dp_j =
  // grad . out; the log-sum-exp's own gradient enters with the other sign.
  CTX_DEVICE void load_rows() {
    for (int r = threadIdx.x; r < l.tile; r += kBackwardThreads) {
      A sum = 0;
      logsumexp[r] = -minus_infinity<A>(), base[r] = A(0);  // exp(score - infinity) = 0
      if (!used(r) || views[token_of(r)].t < 0) continue;
      const T* grad = row<T>(l.grad_out, b, head_of(r), token(r));
      const T* made = row<T>(a.out, b, head_of(r), token(r));
      const A grad_logsumexp = static_cast<const A*>(l.grad_logsumexp)[index_of(r)];
      bool none = grad_logsumexp == A(0);
      for (int64_t d = 0; d < a.value_dim; ++d) {
        const A g = wide<A>(grad[d]);
        none = none && g == A(0);
        out[r * value_stride + d] = g;
        sum += g * wide<A>(made[d]);
      }
      const A known = static_cast<const A*>(a.logsumexp)[index_of(r)];
      if (none || known == minus_infinity<A>()) continue;
      // A score that is infinite: weights of what the query sees are NaN.
      logsumexp[r] = known == -minus_infinity<A>() ? known - known : known;
      base[r] = sum - grad_logsumexp;
    }
  }
  CTX_DEVICE bool takes_part(int r) const { return logsumexp[r] != -minus_infinity<A>(); }

  CTX_DEVICE void load_queries(int region) {
    const int64_t pieces = query_pieces(a);
    for (int64_t task = threadIdx.x; task < l.tile * pieces; task += kBackwardThreads) {
      const int r = static_cast<int>(task / pieces);
      const bool present = used(r) && views[token_of(r)].t >= 0;
      const double position = present ? views[token_of(r)].clock[region] : 0;
      const auto piece = query_piece<T>(a,
                                        b,
                                        present ? head_of(r) : first_head,
                                        present ? token(r) : 0,
                                        position,
                                        present,
                                        task % pieces);
      query[r * query_stride + piece.first] = piece.x;
      if (piece.second >= 0) query[r * query_stride + piece.second] = piece.y;
    }
    const int64_t dim = a.relative.dim;
    const Strided& from = region == kCompressed ? a.relative.compressed : a.relative.queries;
    for (int64_t task = threadIdx.x; task < l.tile * dim; task += kBackwardThreads) {
      const int r = static_cast<int>(task / dim);
      const bool present = used(r) && views[token_of(r)].t >= 0 && from.data != nullptr;
      relative[task] = present ? wide<A>(row<T>(from, b, head_of(r), token(r))[task % dim]) : A(0);
    }
  }

  CTX_DEVICE void load_keys(const PartView& part, int64_t x, int count) {
    const Storage storage = part.part.storage;
    const auto load = [&](const char* from, int64_t width, int64_t d) {
      if constexpr (std::is_same_v<A, double>) {
        return reinterpret_cast<const double*>(from)[d];
      } else {
        float number[1];
        load_numbers(storage, from + d * size_of(storage), number);
        if (storage == Storage::kInt8)
          number[0] *= scale_of(reinterpret_cast<const int8_t*>(from), width);
        return number[0];
      }
    };
    for (int64_t task = threadIdx.x; task < l.tile * a.head_dim; task += kBackwardThreads) {
      const int64_t j = task / a.head_dim, d = task % a.head_dim;
      key[j * query_stride + d] = j < count ? load(part.key(x + j), a.head_dim, d) : A(0);
    }
    for (int64_t task = threadIdx.x; task < l.tile * a.value_dim; task += kBackwardThreads) {
      const int64_t j = task / a.value_dim, d = task % a.value_dim;
      value[j * value_stride + d] = j < count ? load(part.value(x + j), a.value_dim, d) : A(0);
    }
  }

  // weights[r][j], and grads[r][j] of the products, but for the scale. Those of the scores are added to
  // `bias` of each row (kRows) or `mass` of each key.
  template <bool kRows>
  CTX_DEVICE void make_grads(const PartView& part, int64_t x, int count) {
    const int stride = l.tile + 1;
    for (int task = threadIdx.x; task < l.tile * l.tile; task += kBackwardThreads) {
      const int r = task / l.tile, j = task % l.tile;
      A weight = 0, grad = 0, slope = 1;
      if (takes_part(r) && j < count && sees(views[token_of(r)], part, x + j)) {
        A product = 0, by_weight = 0;
        for (int64_t d = 0; d < a.head_dim; ++d)
          product += query[r * query_stride + d] * key[j * query_stride + d];
        for (int64_t d = 0; d < a.value_dim; ++d)
          by_weight += out[r * value_stride + d] * value[j * value_stride + d];
        const int64_t half = a.relative.dim / 2;
        for (int64_t w = 0; w < half; ++w) {
          A sine, cosine;
          sinusoid(part, r, x + j, w, sine, cosine);
          product += relative[r * 2 * half + w] * sine + relative[r * 2 * half + half + w] * cosine;
        }
        const A score =
            finish_score(a, views[token_of(r)], part, x + j, head_of(r), product, &slope);
        weight = exponential(score - logsumexp[r]);
        grad = (by_weight - base[r]) * weight;
      }
      weights[r * stride + j] = weight;
      grads[r * stride + j] = grad;
      slopes[r * stride + j] = slope;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < l.tile; i += kBackwardThreads) {
      A sum = 0;
      for (int k = 0; k < l.tile; ++k) sum += kRows ? grads[i * stride + k] : grads[k * stride + i];
      if (kRows && part.part.region == kCompressed) bias[i] += sum;
      if (!kRows) mass[i] += sum;
    }
    __syncthreads();
    for (int task = threadIdx.x; task < l.tile * l.tile; task += kBackwardThreads) {
      const int place = task / l.tile * stride + task % l.tile;
      if (grads[place] != A(0)) grads[place] *= slopes[place];
    }
    __syncthreads();
  }

  CTX_DEVICE void sinusoid(
      const PartView& part, int r, int64_t x, int64_t w, A& sine, A& cosine) const {
    sine_and_cosine(
        distance(a, views[token_of(r)], part, x) * relative_frequency(w, a.relative.dim),
        sine,
        cosine);
  }
};

}  // namespace ctx::cuda
