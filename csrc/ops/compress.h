#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "ops/kernels.h"

namespace ctx::ops {

// keys [B, Hkv, G, c + overlap, D], values [B, Hkv, G, c + overlap, Dv] -> ([B, Hkv, G, D],
// [B, Hkv, G, Dv]); differentiable. The caller has checked the parameters.
std::tuple<at::Tensor, at::Tensor> compress_groups(const at::Tensor& keys,
                                                   const at::Tensor& values,
                                                   at::TensorList parameters,
                                                   CompressorKind kind);

}  // namespace ctx::ops
