#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "ops/kernels.h"

namespace ctx::ops {

// Slots of groups: keys [B, Hkv, G, D], values [B, Hkv, G, Dv], and their log-mass [B, Hkv, G] in the
// keys' dtype.
using Slots = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

// keys [B, Hkv, G, c + overlap, D], values [B, Hkv, G, c + overlap, Dv]; differentiable. The caller
// has checked the parameters. mass_ratio: tokens that a slot stands for; 0: no mass is made, it is [0].
Slots compress_groups(const at::Tensor& keys,
                      const at::Tensor& values,
                      at::TensorList parameters,
                      CompressorKind kind,
                      int64_t mass_ratio);

}  // namespace ctx::ops
