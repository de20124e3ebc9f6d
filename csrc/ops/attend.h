#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "ops/kernels.h"

namespace ctx::ops {

// What a query attends to: three spans of keys, already rotated to their clocks, and where each
// span begins.
struct Spans {
  at::Tensor sink_keys;          // [B, Hkv, A, D], tokens 0 ... A - 1
  at::Tensor sink_values;        // [B, Hkv, A, Dv]
  at::Tensor compressed_keys;    // [B, Hkv, G, D], groups first_slot ... first_slot + G - 1
  at::Tensor compressed_values;  // [B, Hkv, G, Dv]
  at::Tensor window_keys;        // [B, Hkv, K, D], tokens first_token ... first_token + K - 1
  at::Tensor window_values;      // [B, Hkv, K, Dv]
  at::Tensor first_slot;         // int64 [B]
  at::Tensor first_token;        // int64 [B]
};

// Dispatches ctx::attend: q [B, H, T, D] un-rotated, its first token at position [B] -> [B, H, T,
// Dv]; differentiable. Keys of a span that the law does not show to a query are masked, whatever
// they hold, as long as it is finite.
at::Tensor attend(const at::Tensor& q,
                  const at::Tensor& position,
                  const Spans& spans,
                  const std::optional<at::Tensor>& bias,
                  const Clock& clock,
                  const Rotary& rotary,
                  double scale);

}  // namespace ctx::ops
