#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "ops/kernels.h"
#include "ops/past.h"
#include "ops/settings.h"
#include "ops/state.h"

namespace ctx::ops {

// What queries attend to: three spans of keys, already rotated to their clocks, and which number
// the first key of each span has in the stream of the query (a call may hold several streams of a
// row). The past's tokens and slots are the first keys of their spans.
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
  at::Tensor slot_positions;  // int64 [B, Hkv, G], of the past's slots, too: tokens that the slots
                              // are; undefined: they are groups
  Past past;
};

// The past's keys in one tensor with the others, for torch's operators; those that the next token does
// not see are zero. Spans that had a past become `type`.
Spans joined(Spans spans, const Schedule& schedule, at::ScalarType type);

// [B, H, T, 3] in the arithmetic's type where it is asked for, else [0].
inline at::Tensor new_region_weights(const at::Tensor& q, bool with_region_weights) {
  const auto options = q.options().dtype(arithmetic_type(q.scalar_type()));
  if (!with_region_weights) return at::empty({0}, options);
  return at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2), 3}, options);
}

// Dispatches ctx::attend: q [B, H, T, D] un-rotated, tokens of their streams by position [B, T] ->
// [B, H, T, Dv]; differentiable, in the operands, too, but for slopes. Keys of a span that the law
// does not show to a query are masked, whatever they hold, as long as it is finite. Also returns the
// weight of each region, [B, H, T, 3], where it is asked for: a constant.
std::tuple<at::Tensor, at::Tensor> attend(const at::Tensor& q,
                                          const at::Tensor& position,
                                          const Spans& spans,
                                          const ScoreOperands& operands,
                                          const Clock& clock,
                                          const BasedRotary& rotary,
                                          double scale,
                                          bool with_region_weights);

// The same at once, without autograd, and what each key of the window was attended to: its weights,
// averaged over the query heads of a kv head and summed over queries, [B, Hkv, K]; where it is asked
// for. Queries before their streams add nothing, and their outputs mean nothing.
struct Attended {
  at::Tensor out;
  at::Tensor region_weights;
  at::Tensor usage;
};
Attended attend_now(const at::Tensor& q,
                    const at::Tensor& position,
                    const Spans& spans,
                    const ScoreOperands& operands,
                    const Clock& clock,
                    const BasedRotary& rotary,
                    double scale,
                    bool with_region_weights,
                    bool with_usage);

}  // namespace ctx::ops
