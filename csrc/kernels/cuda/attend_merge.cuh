// The splits of every row become its output, in the order of the splits; and, where a memory counts
// usage, the weights that its window got, which are known only then.
#pragma once

#include "kernels/cuda/attend_rows.cuh"

namespace ctx::cuda {

constexpr int kMergeThreads = 128;

// Grid [batch * heads * tokens].
template <typename T>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Attention a) {
  using A = Acc<T>;
  const int64_t row = blockIdx.x;
  const int64_t i = row % a.tokens, head = row / a.tokens % a.heads, b = row / a.tokens / a.heads;
  const A* parts = partial<A>(a, b, head, i, 0);
  const int64_t width = a.value_dim + 1 + kRegions;
  A largest = minus_infinity<A>();
  for (int64_t s = 0; s < a.splits; ++s) largest = maximum(largest, parts[s * width]);
  const A reference = largest == minus_infinity<A>() ? A(0) : largest;
  A totals[kRegions] = {A(0), A(0), A(0)};
  for (int64_t s = 0; s < a.splits; ++s) {
    const A factor = exponential(parts[s * width] - reference);
    for (int region = 0; region < kRegions; ++region)
      totals[region] += factor * parts[s * width + 1 + region];
  }
  const auto value = [&](int64_t d) {
    A sum = 0;
    for (int64_t s = 0; s < a.splits; ++s)
      sum += exponential(parts[s * width] - reference) * parts[s * width + 1 + kRegions + d];
    return sum;
  };
  const bool present = token_view(a, b, i).t >= 0;
  store_row_sums<T>(a, b, head, i, present, largest, totals, threadIdx.x, kMergeThreads, value);
}

// Grid [blocks of window entries, kv heads * batch]: a thread takes one entry and all queries in the
// order of their tokens, and makes its scores a second time.
struct UsageLaunch {
  Attention a;
  int part;  // the window
  void* usage;
};

template <typename T>
__global__ void __launch_bounds__(kMergeThreads)
    usage_kernel(const __grid_constant__ UsageLaunch l) {
  using A = Acc<T>;
  const Attention& a = l.a;
  const Part& p = a.part[l.part];
  const int64_t b = blockIdx.y / a.kv_heads, kv = blockIdx.y % a.kv_heads;
  const int64_t x = static_cast<int64_t>(blockIdx.x) * kMergeThreads + threadIdx.x;
  auto* query = reinterpret_cast<A*>(shared_memory());
  const int64_t pieces = query_pieces(a), q_per_kv = a.q_per_kv();
  A used = 0;
  for (int64_t i = 0; i < a.tokens; ++i) {
    const TokenView view = token_view(a, b, i);
    if (view.t < 0) continue;
    const PartView part(a, p, b, kv, hull_of(&view, 1, kWindow));
    const double position = query_position(a, kWindow, view.t);
    for (int64_t task = threadIdx.x; task < q_per_kv * pieces; task += kMergeThreads) {
      const int64_t g = task / pieces;
      const auto piece = query_piece<T>(a, b, kv * q_per_kv + g, i, position, true, task % pieces);
      query[g * a.head_dim + piece.first] = piece.x;
      if (piece.second >= 0) query[g * a.head_dim + piece.second] = piece.y;
    }
    __syncthreads();
    if (x < p.size && part.in_hull(x)) {
      const T* key = reinterpret_cast<const T*>(part.key(x));
      for (int64_t g = 0; g < q_per_kv; ++g) {
        const int64_t head = kv * q_per_kv + g;
        A product = 0;
        for (int64_t d = 0; d < a.head_dim; ++d)
          product += query[g * a.head_dim + d] * wide<A>(key[d]);
        if (a.relative.dim > 0) {
          const int64_t half = a.relative.dim / 2;
          const T* z = row<T>(a.relative.queries, b, head, i);
          const double apart = distance(a, view, part, x);
          for (int64_t w = 0; w < half; ++w) {
            A sine, cosine;
            sine_and_cosine(apart * relative_frequency(w, a.relative.dim), sine, cosine);
            product += wide<A>(z[w]) * sine + wide<A>(z[half + w]) * cosine;
          }
        }
        const A score = finish_score(a, view, part, x, head, product);
        const A logsumexp = static_cast<const A*>(a.logsumexp)[(b * a.heads + head) * a.tokens + i];
        used += exponential(score - logsumexp) / static_cast<A>(q_per_kv);
      }
    }
    __syncthreads();
  }
  const int64_t head = a.block.row(b) * a.kv_heads + kv;
  if (x < p.size) static_cast<A*>(l.usage)[head * p.capacity + x] += used;
}

}  // namespace ctx::cuda
