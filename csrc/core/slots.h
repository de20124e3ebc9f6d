// What a compressor makes of the groups that may fall due in a call, differentiably.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "ctx/compressor.h"
#include "ops/settings.h"
#include "ops/state.h"

namespace ctx {

struct GroupsCall {
  const at::Tensor& q;  // [B, H, T, D]; read where slots are chosen by the attention received
  const at::Tensor& k;
  const at::Tensor& v;
  const at::Tensor& plan;
  at::TensorList memory;  // the rings, none where the plan is not of a carried memory
  const ops::ScoreOperands& scores;
  const ops::PackedSettings& packed;
  const Compressor& compressor;
  int64_t mass_ratio;  // tokens of a slot where slots have a mass; 0: they have none
};

// Slots as ctx::attend takes them: keys, values, log-mass or [0], and where slots are tokens, which
// ones. Those are the ones that streaming keeps: the call is streamed into `written`, rings of the
// memory's shapes that hold what it holds, and left there. Other compressors do not look at it.
std::vector<at::Tensor> slots_of(const GroupsCall& call, at::TensorList written);

}  // namespace ctx
