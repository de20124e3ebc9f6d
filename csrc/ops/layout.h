// From tensors to what kernels take: rows and strides.
#pragma once

#include <ATen/ATen.h>

#include "ops/kernels.h"

namespace ctx::ops {

// [B, heads, T, width] with a contiguous last dimension: kernels read rows, at any other strides.
inline at::Tensor rows(const at::Tensor& x) {
  return x.size(3) <= 1 || x.stride(3) == 1 ? x : x.contiguous();
}

inline Strided strided(const at::Tensor& x) {
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

inline int device_index(const at::Tensor& x) {
  return x.device().has_index() ? x.device().index() : 0;
}

}  // namespace ctx::ops
