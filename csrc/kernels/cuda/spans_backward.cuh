// The kernels and launches of the backward; backward_tile.cuh says how.
#pragma once

#include "kernels/cuda/backward_tile.cuh"

namespace ctx::cuda {

// Gradients of queries. Grid [row tiles, kv heads * batch].
template <typename T>
struct QueryGradients : BackwardTile<T> {
  using A = Acc<T>;
  using Base = BackwardTile<T>;
  using Base::a;
  using Base::l;

  CTX_DEVICE QueryGradients(const BackwardLaunch& launch, int64_t head) : Base(launch, head) {}

  CTX_DEVICE void clear(A* numbers, int64_t count) const {
    for (int64_t i = threadIdx.x; i < count; i += kBackwardThreads) numbers[i] = A(0);
  }

  CTX_DEVICE void run(int64_t tile) {
    this->place(tile);
    this->load_rows();
    clear(this->total, l.tile * this->query_stride);
    clear(this->bias, l.tile);
    clear(this->relative_sums, 2 * l.tile * a.relative.dim);
    __syncthreads();
    for (int region = 0; region < kRegions; ++region) {
      const Range hull = hull_of(this->views, this->tile_tokens, region);
      if (hull.size() <= 0) continue;
      this->load_queries(region);
      clear(this->sums_of_keys, l.tile * this->query_stride);
      __syncthreads();
      for (int p = 0; p < a.parts; ++p) {
        if (a.part[p].region != region) continue;
        const PartView part(a, a.part[p], this->b, this->kv, hull);
        for (int64_t x = 0; x < a.part[p].size; x += l.tile) {
          const int64_t left = a.part[p].size - x;
          const int count = static_cast<int>(left < l.tile ? left : l.tile);
          if (part.touches(x, count)) add(part, x, count);
        }
      }
      turn_back(region);
      __syncthreads();
    }
    store();
  }

  CTX_DEVICE void add(const PartView& part, int64_t x, int count) {
    this->load_keys(part, x, count);
    __syncthreads();
    this->template make_grads<true>(part, x, count);
    const int stride = l.tile + 1;
    for (int64_t task = threadIdx.x; task < l.tile * a.head_dim; task += kBackwardThreads) {
      const int64_t r = task / a.head_dim, d = task % a.head_dim;
      A sum = this->sums_of_keys[r * this->query_stride + d];
      for (int j = 0; j < count; ++j) {
        const A grad = this->grads[r * stride + j];
        if (grad != A(0)) sum += grad * this->key[j * this->query_stride + d];
      }
      this->sums_of_keys[r * this->query_stride + d] = sum;
    }
    const int64_t dim = a.relative.dim, half = dim / 2;
    A* sums = this->relative_sums + (part.part.region == kCompressed) * l.tile * dim;
    for (int64_t task = threadIdx.x; task < l.tile * half; task += kBackwardThreads) {
      const int r = static_cast<int>(task / half);
      const int64_t w = task % half;
      for (int j = 0; j < count; ++j) {
        const A grad = this->grads[r * stride + j];
        if (grad == A(0)) continue;
        A sine, cosine;
        this->sinusoid(part, r, x + j, w, sine, cosine);
        sums[r * dim + w] += grad * sine;
        sums[r * dim + half + w] += grad * cosine;
      }
    }
    __syncthreads();
  }

  // The transpose of the rotation to a region's clock, and the scale.
  CTX_DEVICE void turn_back(int region) const {
    const int64_t half = a.rotary.dim / 2, pieces = query_pieces(a);
    const A scale = static_cast<A>(a.scale);
    for (int64_t task = threadIdx.x; task < l.tile * pieces; task += kBackwardThreads) {
      const int r = static_cast<int>(task / pieces);
      const int64_t piece = task % pieces;
      if (!this->used(r) || this->views[this->token_of(r)].t < 0) continue;
      const A* grad = this->sums_of_keys + r * this->query_stride;
      A* to = this->total + r * this->query_stride;
      if (piece >= half) {
        to[piece + half] += scale * grad[piece + half];
        continue;
      }
      const PairPlace at = pair_place(a.rotary, piece);
      const double position = this->views[this->token_of(r)].clock[region];
      A sine, cosine;
      sine_and_cosine(position * a.rotary.inv_freq[piece], sine, cosine);
      const A factor = static_cast<A>(a.rotary.attention_factor);
      const A c = cosine * factor, s = sine * factor;
      to[at.first] += scale * (grad[at.first] * c + grad[at.second] * s);
      to[at.second] += scale * (grad[at.second] * c - grad[at.first] * s);
    }
  }

  CTX_DEVICE void store() const {
    for (int64_t task = threadIdx.x; task < l.tile * a.head_dim; task += kBackwardThreads) {
      const int r = static_cast<int>(task / a.head_dim);
      const int64_t d = task % a.head_dim;
      if (!this->used(r)) continue;
      T* to = row<T>(l.grad_queries, this->b, this->head_of(r), this->token(r));
      to[d] = narrow<T>(this->total[r * this->query_stride + d]);
    }
    const int64_t dim = a.relative.dim;
    for (int64_t task = threadIdx.x; task < 2 * l.tile * dim; task += kBackwardThreads) {
      const bool compressed = task >= l.tile * dim;
      const int r = static_cast<int>(task / dim % l.tile);
      const Strided& to = compressed ? l.grad_compressed_relative : l.grad_relative;
      if (!this->used(r) || to.data == nullptr) continue;
      T* place = row<T>(to, this->b, this->head_of(r), this->token(r));
      place[task % dim] = narrow<T>(static_cast<A>(a.scale) * this->relative_sums[task]);
    }
    for (int r = threadIdx.x; r < l.tile; r += kBackwardThreads) {
      if (l.bias_parts != nullptr && this->used(r))
        static_cast<A*>(l.bias_parts)[this->index_of(r)] = this->bias[r];
    }
  }
};

// Gradients of keys, values and masses. Grid [key tiles of all fresh parts, kv heads * batch].
template <typename T>
struct KeyGradients : BackwardTile<T> {
  using A = Acc<T>;
  using Base = BackwardTile<T>;
  using Base::a;
  using Base::l;

  CTX_DEVICE KeyGradients(const BackwardLaunch& launch, int64_t head) : Base(launch, head) {}

  CTX_DEVICE void run(int p, int64_t x) {
    const Part& keys = a.part[p];
    const int64_t left = keys.size - x;
    const int count = static_cast<int>(left < l.tile ? left : l.tile);
    for (int64_t i = threadIdx.x; i < l.tile * this->query_stride; i += kBackwardThreads)
      this->sums_of_keys[i] = A(0);
    for (int64_t i = threadIdx.x; i < l.tile * this->value_stride; i += kBackwardThreads)
      this->sums_of_values[i] = A(0);
    for (int i = threadIdx.x; i < l.tile; i += kBackwardThreads) this->mass[i] = A(0);
    this->load_keys(PartView(a, keys, this->b, this->kv, Range{}), x, count);
    __syncthreads();
    const int64_t tiles = l.tiling.tiles(a);
    for (int64_t tile = 0; tile < tiles; ++tile) {
      this->place(tile);
      const Range hull = hull_of(this->views, this->tile_tokens, keys.region);
      const PartView part(a, keys, this->b, this->kv, hull);
      if (part.touches(x, count)) add(part, x, count);
      __syncthreads();
    }
    store(keys, x, count);
  }

  CTX_DEVICE void add(const PartView& part, int64_t x, int count) {
    this->load_rows();
    this->load_queries(part.part.region);
    __syncthreads();
    this->template make_grads<false>(part, x, count);
    const int stride = l.tile + 1;
    const auto sum =
        [&](const A* factors, const A* rows, int64_t width, int64_t row_stride, A* to) {
          for (int64_t task = threadIdx.x; task < count * width; task += kBackwardThreads) {
            const int64_t j = task / width, d = task % width;
            A all = to[j * row_stride + d];
            for (int r = 0; r < l.tile; ++r) {
              const A factor = factors[r * stride + j];
              if (factor != A(0)) all += factor * rows[r * row_stride + d];
            }
            to[j * row_stride + d] = all;
          }
        };
    sum(this->grads, this->query, a.head_dim, this->query_stride, this->sums_of_keys);
    sum(this->weights, this->out, a.value_dim, this->value_stride, this->sums_of_values);
  }

  CTX_DEVICE void store(const Part& keys, int64_t x, int count) const {
    const int64_t first = (this->b * a.kv_heads + this->kv) * keys.size + x;
    auto* to_keys = static_cast<A*>(l.grad_keys[keys.region]) + first * l.key_width;
    auto* to_values = static_cast<A*>(l.grad_values[keys.region]) + first * l.value_width;
    for (int64_t task = threadIdx.x; task < count * a.head_dim; task += kBackwardThreads) {
      const int64_t j = task / a.head_dim, d = task % a.head_dim;
      to_keys[j * l.key_width + d] +=
          static_cast<A>(a.scale) * this->sums_of_keys[j * this->query_stride + d];
    }
    for (int64_t task = threadIdx.x; task < count * a.value_dim; task += kBackwardThreads) {
      const int64_t j = task / a.value_dim, d = task % a.value_dim;
      to_values[j * l.value_width + d] += this->sums_of_values[j * this->value_stride + d];
    }
    if (l.grad_mass[keys.region] == nullptr) return;
    for (int j = threadIdx.x; j < count; j += kBackwardThreads)
      static_cast<A*>(l.grad_mass[keys.region])[first + j] += this->mass[j];
  }
};

template <typename T>
__global__ void __launch_bounds__(kBackwardThreads)
    query_gradients(const __grid_constant__ BackwardLaunch l) {
  QueryGradients<T> tile(l, blockIdx.y);
  tile.run(blockIdx.x);
}

template <typename T>
__global__ void __launch_bounds__(kBackwardThreads)
    key_gradients(const __grid_constant__ BackwardLaunch l) {
  KeyGradients<T> tile(l, blockIdx.y);
  int64_t left = blockIdx.x;
  for (int p = 0; p < l.a.parts; ++p) {
    if (l.a.part[p].kind != Part::kFresh) continue;
    const int64_t tiles = (l.a.part[p].size + l.tile - 1) / l.tile;
    if (left < tiles) return tile.run(p, left * l.tile);
    left -= tiles;
  }
}

// Adds the queries' sums of a head to its bias, in the order of the tokens. Grid [batch * heads].
struct BiasLaunch {
  const void* parts;  // [B, H, T]
  int64_t tokens;
  void* grad_bias;  // [B, H]
};
template <typename A>
__global__ void bias_gradients(const __grid_constant__ BiasLaunch l) {
  auto* sums = reinterpret_cast<A*>(shared_memory());
  const A* parts = static_cast<const A*>(l.parts) + blockIdx.x * l.tokens;
  A sum = 0;
  for (int64_t i = threadIdx.x; i < l.tokens; i += 32) sum += parts[i];
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  A all = 0;
  for (int i = 0; i < 32; ++i) all += sums[i];
  static_cast<A*>(l.grad_bias)[blockIdx.x] += all;
}

inline BackwardLaunch backward_launch(const SpansBackwardArgs& args) {
  BackwardLaunch l{};
  l.a = attention_of(args.forward);
  const int64_t size = args.forward.storage == Storage::kFloat64 ? 8 : 4;
  l.grad_out = args.grad_out, l.grad_logsumexp = args.grad_logsumexp;
  l.grad_queries = args.grad_queries, l.grad_relative = args.grad_relative;
  l.grad_compressed_relative = args.grad_compressed_relative;
  l.key_width = args.key_width, l.value_width = args.value_width;
  for (int i = 0; i < kRegions; ++i)
    l.grad_keys[i] = args.grad_keys[i], l.grad_values[i] = args.grad_values[i],
    l.grad_mass[i] = args.grad_mass[i];
  constexpr int64_t kMost = 200 * 1024;
  for (l.tile = 32; l.tile > 4 && BackwardRoom(l).bytes(l, size) > kMost; l.tile /= 2) {
  }
  if (BackwardRoom(l).bytes(l, size) > kMost)
    throw std::runtime_error(
        "ctx: the backward on CUDA: head_dim and value_dim must be smaller, got " +
        std::to_string(l.a.head_dim) + " and " + std::to_string(l.a.value_dim));
  l.tiling = RowTiling::of(l.a, l.tile);
  return l;
}

// Bytes of device memory that spans_backward() needs.
inline int64_t backward_workspace(const SpansBackwardArgs& args) {
  const SpansArgs& f = args.forward;
  if (args.grad_bias == nullptr) return 0;
  return f.batch * f.heads * f.tokens * (f.storage == Storage::kFloat64 ? 8 : 4);
}

inline void spans_backward(const SpansBackwardArgs& args, void* workspace, cudaStream_t stream) {
  const SpansArgs& f = args.forward;
  if (f.batch * f.heads * f.tokens == 0 || f.kv_heads == 0) return;
  BackwardLaunch l = backward_launch(args);
  if (args.grad_bias != nullptr) l.bias_parts = workspace;
  int64_t key_tiles = 0;
  for (int p = 0; p < l.a.parts; ++p)
    if (l.a.part[p].kind == Part::kFresh) key_tiles += (l.a.part[p].size + l.tile - 1) / l.tile;
  const int64_t row_tiles = l.tiling.tiles(l.a);
  dispatch(f.storage, [&](auto type) {
    using T = decltype(type);
    using A = Acc<T>;
    const size_t shared = BackwardRoom(l).bytes(l, sizeof(A));
    const int64_t heads = f.batch * f.kv_heads;
    launch(&query_gradients<T>, grid_of(row_tiles, heads), kBackwardThreads, shared, stream, l);
    launch(&key_gradients<T>, grid_of(key_tiles, heads), kBackwardThreads, shared, stream, l);
    if (args.grad_bias == nullptr) return;
    const BiasLaunch bias{workspace, f.tokens, args.grad_bias};
    launch(&bias_gradients<A>, grid_of(f.batch * f.heads), 32, 32 * sizeof(A), stream, bias);
  });
}

}  // namespace ctx::cuda
