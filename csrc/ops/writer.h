// What writes a call's pairs into a memory, and makes the slots that fall due.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "ops/memory.h"
#include "ops/plan.h"

namespace ctx::ops {

// The pairs of one call, kept alive and laid out for the kernels.
class Writer {
 public:
  // The plan must outlive it. `operands`: the compressor's parameters; of one that is not the engine's the slots that it made,
  // keys, values and perhaps log-mass, where the plan lays out the groups.
  Writer(const Memory& memory,
         const PlanRows& plan,
         const at::Tensor& k,
         const at::Tensor& v,
         at::TensorList operands,
         const char* where);

  void write(const Block& block);

  // Of a compressor that chooses by attention: which tokens became the slots that the plan lays out,
  // as places among those of evicted_groups and as numbers in their streams, int64 [B, Hkv, G]; a
  // group that is not due has its first. [0] for others.
  const at::Tensor& chosen() const { return chosen_; }
  const at::Tensor& chosen_positions() const { return chosen_positions_; }

 private:
  void take_slots(const PlanRows& plan, at::TensorList slots, const char* where);
  void take_parameters(at::TensorList parameters, const char* where);
  void report_chosen(const PlanRows& plan, bool reports);

  const Memory& memory_;
  at::Tensor k_;
  at::Tensor v_;
  std::vector<at::Tensor> kept_;
  at::Tensor chosen_;
  at::Tensor chosen_positions_;
  AppendArgs append_;
  CompressArgs compress_;
};

}  // namespace ctx::ops
