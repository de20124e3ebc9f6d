// ctx::attend by a device's own kernels, from tensors to what kernels take.
#pragma once

#include <array>
#include <optional>
#include <tuple>

#include "ops/attend.h"

namespace ctx::ops {

// The arguments of ctx::attend, checked.
struct AttendCall {
  const at::Tensor& q;
  const at::Tensor& position;
  Spans spans;
  const std::optional<at::Tensor>& bias;    // [H] or [1]
  const std::optional<at::Tensor>& slopes;  // [H] or [1]; distances follow from numbers alone
  Clock clock;
  BasedRotary rotary;
  double scale;
};

// [B, H, T, Dv] in q's dtype; the log-sum-exp [B, H, T] and the region_weights (new_region_weights) in the arithmetic's.
// A query that sees nothing gets zeros and minus infinity.
std::tuple<at::Tensor, at::Tensor, at::Tensor> spans_forward(const AttendCall& call,
                                                             bool with_region_weights);

// Of sinks, compressed slots and window but for the past's; in q's dtype, `bias` in its own.
struct SpanGradients {
  at::Tensor q;
  std::array<at::Tensor, 3> keys;
  std::array<at::Tensor, 3> values;
  at::Tensor bias;  // undefined where there is none
};

SpanGradients spans_backward(const AttendCall& call,
                             const at::Tensor& grad_out,
                             const at::Tensor& grad_logsumexp,
                             const at::Tensor& out,
                             const at::Tensor& logsumexp);

}  // namespace ctx::ops
