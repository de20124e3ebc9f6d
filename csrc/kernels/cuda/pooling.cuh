// What compressors make of the tokens of a group, for all threads of a block together: rows of numbers
// in, one row out. Callers put a barrier before and behind.
#pragma once

#include "kernels/cuda/rows.cuh"

namespace ctx::cuda {

template <typename A>
CTX_DEVICE void pool_mean(const A* x, int64_t c, int64_t width, A* slot) {
  for (int64_t d = threadIdx.x; d < width; d += blockDim.x) {
    A sum = 0;
    for (int64_t i = 0; i < c; ++i) sum += x[i * width + d];
    slot[d] = sum * (A(1) / static_cast<A>(c));
  }
}

template <typename A>
CTX_DEVICE void pool_max(const A* x, int64_t c, int64_t width, A* slot) {
  for (int64_t d = threadIdx.x; d < width; d += blockDim.x) {
    A largest = x[d];
    for (int64_t i = 1; i < c; ++i) {
      const A candidate = x[i * width + d];
      if (candidate > largest || candidate != candidate) largest = candidate;  // a NaN stays
    }
    slot[d] = largest;
  }
}

// slot = sum_i x_i W_i (+ bias); x [k, inner], weight [k, inner, width] of one head.
template <typename A, typename P>
CTX_DEVICE void convolve(
    const A* x, const P* weight, const P* bias, int64_t k, int64_t inner, int64_t width, A* slot) {
  for (int64_t e = threadIdx.x; e < width; e += blockDim.x) {
    A sum = bias == nullptr ? A(0) : wide<A>(bias[e]);
    for (int64_t j = 0; j < k * inner; ++j) sum += x[j] * wide<A>(weight[j * width + e]);
    slot[e] = sum;
  }
}

// y_i = ReLU(x_i W_0 + x_(i + dilation) W_1), i < rows; x [rows + dilation, inner], y [rows, width],
// weight [2, inner, width] of one head. A NaN stays a NaN.
template <typename A, typename P>
CTX_DEVICE void dilate(const A* x,
                       const P* weight,
                       int64_t rows,
                       int64_t dilation,
                       int64_t inner,
                       int64_t width,
                       A* y) {
  for (int64_t task = threadIdx.x; task < rows * width; task += blockDim.x) {
    const int64_t i = task / width, e = task % width;
    A sum = 0;
    for (int64_t tap = 0; tap < 2; ++tap) {
      for (int64_t d = 0; d < inner; ++d)
        sum += x[(i + tap * dilation) * inner + d] * wide<A>(weight[(tap * inner + d) * width + e]);
    }
    y[task] = sum < A(0) ? A(0) : sum;
  }
}

// weights = softmax_i(key_i . direction + position_i); returns their entropy. Has barriers; the weights
// are there behind the last one.
template <typename A, typename P>
CTX_DEVICE A
gate(const A* keys, const P* direction, const P* position, int64_t c, int64_t width, A* weights) {
  for (int64_t i = threadIdx.x; i < c; i += blockDim.x) {
    A score = wide<A>(position[i]);
    for (int64_t d = 0; d < width; ++d) score += keys[i * width + d] * wide<A>(direction[d]);
    weights[i] = score;
  }
  __syncthreads();
  A largest = minus_infinity<A>();
  for (int64_t i = 0; i < c; ++i) largest = maximum(largest, weights[i]);
  A total = 0;
  A mean_score = 0;  // relative to the largest, times `total`
  for (int64_t i = 0; i < c; ++i) {
    const A score = weights[i] - largest;
    const A weight = exponential(score);
    total += weight;
    if (weight != A(0)) mean_score += weight * score;
  }
  __syncthreads();
  for (int64_t i = threadIdx.x; i < c; i += blockDim.x)
    weights[i] = exponential(weights[i] - largest) / total;
  __syncthreads();
  return logarithm(total) - mean_score / total;
}

template <typename A>
CTX_DEVICE void pool_weighted(const A* x, const A* weights, int64_t c, int64_t width, A* slot) {
  for (int64_t d = threadIdx.x; d < width; d += blockDim.x) {
    A sum = 0;
    for (int64_t i = 0; i < c; ++i) sum += weights[i] * x[i * width + d];
    slot[d] = sum;
  }
}

}  // namespace ctx::cuda
