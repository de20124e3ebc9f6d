// ctx::attend: attention of a call's queries to what a memory holds and to the call's own pairs and
// slots, as a function without side effects.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

#include "ops/settings.h"
#include "ops/state.h"

namespace ctx::ops {

// [B, H, T, 3] in the arithmetic's type where it is asked for, else [0].
inline at::Tensor new_region_weights(const at::Tensor& q, bool with_region_weights) {
  const auto options = q.options().dtype(arithmetic_type(q.scalar_type()));
  if (!with_region_weights) return at::empty({0}, options);
  return at::empty_symint({q.sym_size(0), q.sym_size(1), q.sym_size(2), 3}, options);
}

// The arguments of ctx::attend; the caller keeps them.
//
//   q [B, H, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv] as the memory is given them
//   plan      of this call
//   memory    the rings, none where the plan is not of a carried memory
//   slots     of the groups that the plan lays out: keys [B, Hkv, G, D] and values [B, Hkv, G, Dv],
//             un-rotated; their log-mass [B, Hkv, G], or [0] for none; and, where slots are tokens,
//             which ones, int64 [B, Hkv, G]. The last two may be left out.
//   bias, slopes, relative   ScoreOperands
struct AttendCall {
  const at::Tensor& q;
  const at::Tensor& k;
  const at::Tensor& v;
  const at::Tensor& plan;
  at::TensorList memory;
  at::TensorList slots;
  const std::optional<at::Tensor>& bias;
  const std::optional<at::Tensor>& slopes;
  at::TensorList relative;
  at::IntArrayRef packed;
  at::ArrayRef<double> numbers;

  Settings settings() const { return unpack(packed, numbers, "ctx.attend"); }
  // Raises unless the arguments belong together.
  void check() const;
  // The log-mass of the call's slots; undefined: they have none.
  at::Tensor mass() const {
    return slots.size() > 2 && slots[2].dim() == 3 ? slots[2] : at::Tensor();
  }
  // Whether slots are tokens that keep their own positions.
  bool single_tokens() const { return slots.size() > 3; }
};

// out [B, H, T, Dv] in q's dtype, zero at padding; log-sum-exp [B, H, T] in the arithmetic's, minus
// infinity there; region weights (new_region_weights).
using Attended = std::tuple<at::Tensor, at::Tensor, at::Tensor>;

constexpr int kMemoryGrads = kSinkValues + 1;  // rings of pairs

// Gradients of a call's arguments; [0] of what is not there.
struct AttendGradients {
  at::Tensor q, k, v;
  at::Tensor slot_keys, slot_values, slot_mass;
  at::Tensor bias;
  std::vector<at::Tensor> relative;  // as many as the call has
  std::vector<at::Tensor> memory;    // of the first six rings, where they are asked for

  std::vector<at::Tensor> list() const;
};

struct AttendOutputs {
  const at::Tensor& grad_out;
  const at::Tensor& grad_logsumexp;
  const at::Tensor& out;
  const at::Tensor& logsumexp;
};

// By the device's kernels (attend_kernels.cpp), for what they know.
bool has_kernels(const AttendCall& call);
Attended attend_by_kernels(const AttendCall& call, bool with_region_weights);
AttendGradients attend_backward_by_kernels(const AttendCall& call,
                                           const AttendOutputs& outputs,
                                           bool memory_grads);

// Out of torch's own operators (attend_composite.cpp); `recorded`: autograd records them.
Attended attend_composite(const AttendCall& call, bool with_region_weights, bool recorded);
AttendGradients attend_backward_composite(const AttendCall& call,
                                          const AttendOutputs& outputs,
                                          bool memory_grads,
                                          bool recorded);

// With the gradients of autograd, of every order and mode (attend_autograd.cpp).
Attended attend_autograd(const AttendCall& call, bool with_region_weights);
std::vector<at::Tensor> attend_backward_autograd(const AttendCall& call,
                                                 const AttendOutputs& outputs,
                                                 bool memory_grads);

// Dispatch ctx::attend and its backward.
Attended attend(const AttendCall& call, bool with_region_weights);
std::vector<at::Tensor> attend_backward(const AttendCall& call,
                                        const AttendOutputs& outputs,
                                        bool memory_grads);

}  // namespace ctx::ops
