// How ctx::attend and its backward are entered: from the arguments of their schemas to AttendCall.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <vector>

#include "ops/attend.h"

namespace ctx::ops {

constexpr int kMemoryGrads = kSinkValues + 1;  // rings of pairs

template <Attended (*Run)(const AttendCall&, bool)>
Attended forward(const at::Tensor& q,
                 const at::Tensor& k,
                 const at::Tensor& v,
                 const at::Tensor& plan,
                 OptionalList memory,
                 at::TensorList slots,
                 const std::optional<at::Tensor>& bias,
                 const std::optional<at::Tensor>& slopes,
                 OptionalList relative,
                 at::IntArrayRef settings,
                 at::ArrayRef<double> numbers,
                 bool with_region_weights) {
  return Run(
      {q, k, v, plan, or_empty(memory), slots, bias, slopes, or_empty(relative), settings, numbers},
      with_region_weights);
}

template <std::vector<at::Tensor> (*Run)(const AttendCall&, const AttendOutputs&, bool)>
std::vector<at::Tensor> backward(const at::Tensor& grad_out,
                                 const at::Tensor& grad_logsumexp,
                                 const at::Tensor& out,
                                 const at::Tensor& logsumexp,
                                 const at::Tensor& q,
                                 const at::Tensor& k,
                                 const at::Tensor& v,
                                 const at::Tensor& plan,
                                 OptionalList memory,
                                 at::TensorList slots,
                                 const std::optional<at::Tensor>& bias,
                                 const std::optional<at::Tensor>& slopes,
                                 OptionalList relative,
                                 at::IntArrayRef settings,
                                 at::ArrayRef<double> numbers,
                                 bool memory_grads) {
  return Run(
      {q, k, v, plan, or_empty(memory), slots, bias, slopes, or_empty(relative), settings, numbers},
      {grad_out, grad_logsumexp, out, logsumexp},
      memory_grads);
}

using AttendSignature = decltype(forward<attend_by_kernels>);
std::vector<at::Tensor> no_gradients(const AttendCall&, const AttendOutputs&, bool);
using BackwardSignature = decltype(backward<no_gradients>);

// The operators themselves.
inline auto attend_op() {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("ctx::attend", "").typed<AttendSignature>();
  return op;
}
inline auto attend_backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::attend_backward", "")
                             .typed<BackwardSignature>();
  return op;
}

// Their kernels for autograd (attend_autograd.cpp).
Attended attend_autograd(const AttendCall& call, bool with_region_weights);
std::vector<at::Tensor> attend_backward_autograd(c10::DispatchKeySet keys,
                                                 const at::Tensor& grad_out,
                                                 const at::Tensor& grad_logsumexp,
                                                 const at::Tensor& out,
                                                 const at::Tensor& logsumexp,
                                                 const at::Tensor& q,
                                                 const at::Tensor& k,
                                                 const at::Tensor& v,
                                                 const at::Tensor& plan,
                                                 OptionalList memory,
                                                 at::TensorList slots,
                                                 const std::optional<at::Tensor>& bias,
                                                 const std::optional<at::Tensor>& slopes,
                                                 OptionalList relative,
                                                 at::IntArrayRef settings,
                                                 at::ArrayRef<double> numbers,
                                                 bool memory_grads);

}  // namespace ctx::ops
