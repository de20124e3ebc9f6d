#pragma once

#include <ATen/ATen.h>

#include "ops/kernels.h"
#include "ops/settings.h"

namespace ctx::ops {

// Dispatches ctx::rotary: x [B, heads, T, D] rotated to positions [B, T] (integers or float64);
// differentiable in x.
at::Tensor rotate(const at::Tensor& x, const at::Tensor& position, const BasedRotary& rotary);

}  // namespace ctx::ops
