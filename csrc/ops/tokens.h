// Tokens of a stream by their place in a call, whether the call brings them or a memory holds them.
#pragma once

#include <ATen/ATen.h>

namespace ctx::ops {

// Rows of x [B, heads, T, width] at places [B, n]; a place outside reads some row.
at::Tensor take_rows(const at::Tensor& x, const at::Tensor& place);

// The same of a stream that goes on: places below zero are tokens seen + place of the memory, in its
// ring [B, heads, capacity, width] or among its sinks [B, heads, sinks, width]; zero before `oldest`
// [B], the first that it still holds. Differentiable in x; the memory is a constant.
at::Tensor take_tokens(const at::Tensor& x,
                       const at::Tensor& ring,
                       const at::Tensor& sinks,
                       const at::Tensor& seen,
                       const at::Tensor& oldest,
                       const at::Tensor& place);

}  // namespace ctx::ops
