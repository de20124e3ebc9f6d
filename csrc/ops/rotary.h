#pragma once

#include <ATen/ATen.h>

#include "ops/kernels.h"

namespace ctx::ops {

// Dispatches ctx::rotary: x [B, heads, T, D] rotated to positions [B, T] (integers or float64);
// differentiable in x. Rotating to the negative positions is its transpose.
at::Tensor rotate(const at::Tensor& x, const at::Tensor& position, const Rotary& rotary);

// The same at once by the device's kernels, without autograd; `inverse`: rotated back.
at::Tensor rotated(const at::Tensor& x,
                   const at::Tensor& position,
                   const Rotary& rotary,
                   bool inverse = false);

// With frequencies that kernels of the device can read, kept for as long as the program runs. The first
// use of numbers waits for the device.
Rotary on_device(const Rotary& rotary, at::Device device);

}  // namespace ctx::ops
