// The two ways in which a layer computes a call: streaming into the rings, and differentiably over
// rings that stay as they are. Both give the same numbers. Python's are in ctx/attention_calls.py.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <string>
#include <vector>

#include "core/module_call.h"
#include "ctx/compressor.h"
#include "ctx/rows.h"
#include "ctx/settings.h"
#include "ops/settings.h"
#include "ops/state.h"

namespace ctx {

// What follows from a layer's options alone.
struct LayerLaw {
  AttentionSettings settings;  // resolved, without tensors
  ops::PackedSettings packed;  // for operators that attend, or make slots
  ops::PackedSettings given;   // where the slots are given
  LayerShape shape;
  std::string compressor;
  bool constant_slots;  // to the task

  bool chooses() const { return shape.counts_attention; }
  int64_t mass_ratio() const { return settings.slot_mass ? settings.schedule.ratio : 0; }
};

// What scores are made of besides queries and keys.
struct LayerScores {
  std::optional<at::Tensor> bias;    // [H], of compressed slots
  std::optional<at::Tensor> slopes;  // [H], of ALiBi
  std::vector<at::Tensor> relative;

  ops::ScoreOperands operands() const { return {bias, slopes, relative}; }
};

struct LayerCall {
  const at::Tensor& q;  // [B, H, T, D]
  const at::Tensor& k;  // [B, Hkv, T, D], in the dtype of the memory
  const at::Tensor& v;
  const LayerLaw& law;
  const Compressor& compressor;  // with its parameters
  const LayerScores& scores;
  at::TensorList held;  // the rings of a carried memory, else none
  ModuleCall& call;
};

// The output [B, H, T, D]. `rings` becomes what the rings are after the call; nothing where nothing is
// remembered.
at::Tensor attend_layer(const LayerCall& x, std::vector<at::Tensor>& rings);

}  // namespace ctx
