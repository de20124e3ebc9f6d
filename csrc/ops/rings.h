// Rings read in the order of positions, out of torch's own operators: for what is differentiable, and
// for devices without kernels.
#pragma once

#include <ATen/ATen.h>

#include "ctx/schedule.h"

namespace ctx::ops {

// Schedule::groups for a tensor of positions.
inline at::Tensor groups_of(const Schedule& s, const at::Tensor& t) {
  const at::Tensor boundary = t.clamp_min(0).div(s.segment, "floor").mul(s.segment);
  return boundary.sub(s.sinks + s.window).clamp_min(0).div(s.ratio, "floor");
}

// first, first + 1, ..., n numbers for each: [..., n].
inline at::Tensor count_from(const at::Tensor& first, const c10::SymInt& n) {
  return first.unsqueeze(-1) + at::arange(at::Scalar(n), first.options());
}

// The entries of a ring [B, Hkv, capacity, width] at absolute positions [B, n], in order; zero
// where `held` [B, n] is not: an index there holds something else, or what an earlier stream left.
inline at::Tensor read_ring(const at::Tensor& ring,
                            const at::Tensor& positions,
                            const at::Tensor& held) {
  const auto column = [](const at::Tensor& x) { return x.unsqueeze(1).unsqueeze(-1); };
  const at::Tensor index = column(positions.remainder(at::Scalar(ring.sym_size(2))));
  const at::Tensor rows = ring.gather(
      2,
      index.expand_symint(
          {ring.sym_size(0), ring.sym_size(1), positions.sym_size(1), ring.sym_size(3)}));
  return rows.masked_fill_(column(held).logical_not(), 0.0);
}

}  // namespace ctx::ops
