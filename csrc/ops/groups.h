// What leaves the window: the pairs of groups that may fall due in a call.
#pragma once

#include <ATen/ATen.h>

#include <tuple>

#include "ops/settings.h"

namespace ctx::ops {

using Pairs = std::tuple<at::Tensor, at::Tensor>;

// Dispatches ctx::evicted_groups.
//
//   k [B, Hkv, T, D], v [B, Hkv, T, Dv]
//   plan      of this call; `memory`: the rings, none where the plan is not of a carried memory
//   returns keys [B, Hkv, G, overlap + c, D], un-rotated, and values [.., Dv], float32 (float64 for
//     float64), zero before the stream. Groups that are not due hold some tokens.
//
// Differentiable in k and v; the memory is a constant.
Pairs evicted_groups(const at::Tensor& k,
                     const at::Tensor& v,
                     const at::Tensor& plan,
                     at::TensorList memory,
                     const PackedSettings& settings);

}  // namespace ctx::ops
