// Derivatives that a torch::autograd::Function does not give: forward-mode ones, those of a
// function transform (torch.func), and those of a backward. An operator that has such a Function
// asks `is_recorded` and then lets autograd record torch's own operators instead; one that writes
// into its arguments refuses.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <optional>

namespace ctx::ops {

// Whether a tensor carries a tangent of forward-mode differentiation.
inline bool has_tangent(const at::Tensor& x) {
  return x.defined() && x._fw_grad(/*level=*/0).defined();
}
inline bool has_tangent(const std::optional<at::Tensor>& x) { return x && has_tangent(*x); }
inline bool has_tangent(at::TensorList list) {
  for (const at::Tensor& x : list) {
    if (has_tangent(x)) return true;
  }
  return false;
}
inline bool has_tangent(const std::optional<at::TensorList>& list) {
  return list && has_tangent(*list);
}
template <typename T>
inline bool has_tangent(const T& /*number*/) {
  return false;
}

inline bool needs_grad(const at::Tensor& x) { return x.defined() && x.requires_grad(); }
inline bool needs_grad(const std::optional<at::Tensor>& x) { return x && needs_grad(*x); }

// Whether a transform of torch.func is active on this thread.
bool is_transformed();

template <typename... Args>
bool is_recorded(const Args&... args) {
  return is_transformed() || (has_tangent(args) || ...);
}

// What torch's own operators say where they have no forward-mode derivative.
void refuse_tangent(const char* name);

// An Autograd kernel for an operator that records nothing: passes the call on, but refuses an
// argument with a tangent, which would be dropped without a word. `Op` has the operator's name.
template <typename Op, typename Function>
struct WithoutTangents;
template <typename Op, typename Result, typename... Args>
struct WithoutTangents<Op, Result(Args...)> {
  static Result call(c10::DispatchKeySet keys, Args... args) {
    if ((has_tangent(args) || ...)) refuse_tangent(Op::kName);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow(Op::kName, "")
                               .template typed<Result(Args...)>();
    return op.redispatch(keys & c10::after_autograd_keyset, std::forward<Args>(args)...);
  }
};

}  // namespace ctx::ops
