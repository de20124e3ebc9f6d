// How C++ reaches the operators: through the dispatcher, as Python does, so that modes and other
// devices see them.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ctx/attention.h"
#include "ops/settings.h"
#include "ops/state.h"

namespace ctx::calls {

// What a call brings, and what it says about its rows.
struct Tokens {
  const at::Tensor& k;  // [B, Hkv, T, D]
  const at::Tensor& v;  // [B, Hkv, T, Dv]
  const std::optional<at::Tensor>& lengths;
  const std::optional<at::Tensor>& reset_at;
};

// The compressor of the engine by name, or "custom" and the slots that were made.
struct Slots {
  const std::vector<at::Tensor>& parameters;
  const std::string& compressor;
  std::vector<at::Tensor> made;
};

// Each dispatches the operator of its name. Scale is as the options have it, resolved.
std::tuple<at::Tensor, at::Tensor> step_(const at::Tensor& q,
                                         const Tokens& tokens,
                                         const ops::State& state,
                                         const Slots& slots,
                                         const std::optional<at::Tensor>& bias,
                                         const AttentionOptions& options,
                                         bool with_region_weights);

void append_(const Tokens& tokens,
             const ops::State& state,
             const Slots& slots,
             const AttentionOptions& options);

std::tuple<at::Tensor, at::Tensor> choose_(const at::Tensor& q,
                                           const Tokens& tokens,
                                           const ops::State& state,
                                           const std::optional<at::Tensor>& bias,
                                           const AttentionOptions& options,
                                           const at::Tensor& block,
                                           const c10::SymInt& slots);

std::tuple<at::Tensor, at::Tensor> attend_memory(const at::Tensor& q,
                                                 const ops::State& state,
                                                 const std::optional<at::Tensor>& bias,
                                                 const AttentionOptions& options,
                                                 bool with_region_weights);

std::tuple<at::Tensor, at::Tensor, at::Tensor> evicted_groups(const Tokens& tokens,
                                                              at::TensorList memory,
                                                              const AttentionOptions& options);

std::tuple<at::Tensor, at::Tensor> attend_sequence(const at::Tensor& q,
                                                   const Tokens& tokens,
                                                   at::TensorList memory,
                                                   const at::Tensor& slot_keys,
                                                   const at::Tensor& slot_values,
                                                   const std::optional<at::Tensor>& slot_positions,
                                                   const std::optional<at::Tensor>& bias,
                                                   const AttentionOptions& options,
                                                   bool with_region_weights);

}  // namespace ctx::calls
