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
  const std::optional<at::Tensor>& bias;
  Clock clock;
  Rotary rotary;
  double scale;
};

// [B, H, T, Dv] in q's dtype, and the log-sum-exp [B, H, T] in the arithmetic's.
std::tuple<at::Tensor, at::Tensor> spans_forward(const AttendCall& call);

// Of sinks, compressed slots and window; in q's dtype, `bias` in its own.
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
