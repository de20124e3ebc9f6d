// The three spans of keys that a call's queries attend to, as tensors: what the memory holds, in order,
// and behind it the call's own.
#pragma once

#include <ATen/ATen.h>

#include <array>

#include "ops/attend.h"
#include "ops/plan.h"

namespace ctx::ops {

class CallSpans {
 public:
  explicit CallSpans(const AttendCall& call);

  // The call's own keys and slots, rotated to their clocks, in q's dtype; differentiable.
  at::Tensor own_keys() const;
  at::Tensor own_slots() const;

  const PlanTensors& plan() const { return plan_; }

  // New tokens that may be sinks, from the call's first on.
  int64_t own_sinks() const { return own_sinks_; }

  // All keys and values of a region in the arithmetic's type, [B, Hkv, keys, width], those of the
  // memory zero where the next token does not see them; differentiable, in the memory, too.
  at::Tensor keys(Region region) const;
  at::Tensor values(Region region) const;

  // Log-mass of all slots, and the tokens that they are, [B, Hkv, keys]; undefined: none.
  at::Tensor mass() const;
  at::Tensor positions() const;

  // Number of the first key of a region in each query's stream, [B, T].
  at::Tensor first(Region region) const;

  // Gradients of k, v, slots and memory out of those of keys and values, be they of all or of the
  // call's own alone; q, bias and relative are left alone. Masses are given as [B, Hkv, keys].
  void backward(const std::array<at::Tensor, kRegions>& grad_keys,
                const std::array<at::Tensor, kRegions>& grad_values,
                const at::Tensor& grad_mass,
                bool memory_grads,
                AttendGradients& to) const;

 private:
  int64_t find_own_sinks() const;
  int64_t past(Region region) const;
  at::Tensor numbers(Region region) const;  // of the memory's keys, [B, past]
  at::Tensor held(Region region) const;     // bool [B, past]
  at::Tensor ring(int index) const { return call_.memory[index]; }
  at::Tensor read(const at::Tensor& ring, Region region) const;
  at::Tensor join(int index, Region region, const at::Tensor& own) const;
  at::Tensor clock() const;  // of the call's slots, [B, G]
  at::Tensor rotate_slots(const at::Tensor& x, bool transposed) const;

  const AttendCall& call_;
  Settings settings_;
  PlanTensors plan_;
  int64_t own_sinks_;
};

}  // namespace ctx::ops
