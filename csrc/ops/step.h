// ctx::step_ and ctx::append_: streaming into a memory.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "ops/settings.h"
#include "ops/state.h"

namespace ctx::ops {

// Output [B, H, T, Dv]; region weights; and, of a compressor that chooses by attention, which tokens
// became slots (writer.h).
using Stepped = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// Dispatches ctx::step_: writes the call's pairs and slots into the rings and attends.
//
//   q [B, H, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv]; or no tokens in k and v: q are then the
//     queries of the last T tokens of the memory, of which the plan is, and nothing is written
//   plan      of this call, for a carried memory
//   memory    the rings
//   operands  of the compressor: its parameters, or what it made of evicted_groups
Stepped step_(const at::Tensor& q,
              const at::Tensor& k,
              const at::Tensor& v,
              const at::Tensor& plan,
              at::TensorList memory,
              at::TensorList operands,
              const ScoreOperands& scores,
              const PackedSettings& settings,
              bool with_region_weights);

// Dispatches ctx::append_: step_ without queries.
void append_(const at::Tensor& k,
             const at::Tensor& v,
             const at::Tensor& plan,
             at::TensorList memory,
             at::TensorList operands,
             const PackedSettings& settings);

}  // namespace ctx::ops
