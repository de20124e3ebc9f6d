#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "ops/kernels.h"

namespace ctx::ops {

// What queries attend to: three spans of keys, already rotated to their clocks, and which number
// the first key of each span has in the stream of the query (a call may hold several streams of a
// row).
struct Spans {
  at::Tensor sink_keys;          // [B, Hkv, sinks, D]
  at::Tensor sink_values;        // [B, Hkv, sinks, Dv]
  at::Tensor compressed_keys;    // [B, Hkv, G, D]
  at::Tensor compressed_values;  // [B, Hkv, G, Dv]
  at::Tensor window_keys;        // [B, Hkv, K, D]
  at::Tensor window_values;      // [B, Hkv, K, Dv]
  at::Tensor first_sink;         // int64 [B, T]: token, negative where the stream begins later
  at::Tensor first_slot;         // int64 [B, T]: group
  at::Tensor first_token;        // int64 [B, T]: token
};

// Dispatches ctx::attend: q [B, H, T, D] un-rotated, tokens of their streams by position [B, T] ->
// [B, H, T, Dv]; differentiable. Keys of a span that the law does not show to a query are masked,
// whatever they hold, as long as it is finite.
at::Tensor attend(const at::Tensor& q,
                  const at::Tensor& position,
                  const Spans& spans,
                  const std::optional<at::Tensor>& bias,
                  const Clock& clock,
                  const Rotary& rotary,
                  double scale);

}  // namespace ctx::ops
