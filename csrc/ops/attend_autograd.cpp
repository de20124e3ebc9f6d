// Gradients of ctx::attend, of every order and mode.
#include <torch/csrc/autograd/custom_function.h>

#include <algorithm>

#include "ops/attend.h"
#include "ops/derivatives.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::variable_list;

// A call as one list of tensors, and how to read it.
struct CallList {
  std::vector<Tensor> tensors;
  int64_t slots = 0, relative = 0, memory = 0;
  bool bias = false, slopes = false;

  explicit CallList(const AttendCall& x)
      : tensors{x.q, x.k, x.v, x.plan},
        slots(static_cast<int64_t>(x.slots.size())),
        relative(static_cast<int64_t>(x.relative.size())),
        memory(static_cast<int64_t>(x.memory.size())),
        bias(x.bias.has_value()),
        slopes(x.slopes.has_value()) {
    const auto add = [&](at::TensorList list) {
      tensors.insert(tensors.end(), list.begin(), list.end());
    };
    add(x.slots);
    if (x.bias) tensors.push_back(*x.bias);
    add(x.relative);
    add(x.memory);
    if (x.slopes) tensors.push_back(*x.slopes);
  }
};

class AttendFunction : public torch::autograd::Function<AttendFunction> {
 public:
  static variable_list forward(torch::autograd::AutogradContext* saved,
                               at::TensorList /*for autograd*/,
                               const AttendCall& call,
                               const CallList& list,
                               bool memory_grads,
                               bool with_region_weights) {
    at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, logsumexp, region_weights] = attend(call, with_region_weights);
    saved->mark_non_differentiable({region_weights});
    variable_list kept = {out, logsumexp};
    kept.insert(kept.end(), list.tensors.begin(), list.tensors.end());
    saved->save_for_backward(kept);
    saved->saved_data["lists"] = std::vector<int64_t>{
        list.slots, list.relative, list.memory, list.bias, list.slopes, memory_grads};
    saved->saved_data["settings"] = call.packed.vec();
    saved->saved_data["numbers"] = call.numbers.vec();
    return {out, logsumexp, region_weights};
  }

  static variable_list backward(torch::autograd::AutogradContext* saved, variable_list grads) {
    const variable_list x = saved->get_saved_variables();
    const auto lists = saved->saved_data["lists"].toIntVector();
    const int64_t slots = lists[0], relative = lists[1], memory = lists[2];
    const bool bias = lists[3] != 0, slopes = lists[4] != 0, memory_grads = lists[5] != 0;
    const int64_t first_bias = 6 + slots, first_relative = first_bias + bias;
    const int64_t first_memory = first_relative + relative;
    const at::TensorList all(x);
    const auto optional = [&](bool given, int64_t at) {
      return given ? OptionalTensor(x[at]) : std::nullopt;
    };
    const OptionalTensor bias_of_slots = optional(bias, first_bias);
    const OptionalTensor slopes_of_heads = optional(slopes, first_memory + memory);
    const auto settings = saved->saved_data["settings"].toIntVector();
    const auto numbers = saved->saved_data["numbers"].toDoubleVector();
    const AttendCall call{x[2],
                          x[3],
                          x[4],
                          x[5],
                          all.slice(first_memory, memory),
                          all.slice(6, slots),
                          bias_of_slots,
                          slopes_of_heads,
                          all.slice(first_relative, relative),
                          settings,
                          numbers};
    const Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(x[0]);
    const Tensor grad_logsumexp = grads[1].defined() ? grads[1] : at::zeros_like(x[1]);
    const auto made = attend_backward(call, {grad_out, grad_logsumexp, x[0], x[1]}, memory_grads);
    // One for each tensor of the list, and for each other argument of forward.
    variable_list result(x.size() - 2 + 4);
    for (int i = 0; i < 3; ++i) result[i] = made[i];
    result[4] = made[3], result[5] = made[4];
    if (slots > 2 && x[8].dim() == 3) result[6] = made[5];
    if (bias) result[first_bias - 2] = made[6];
    for (int64_t i = 0; i < relative; ++i) result[first_relative - 2 + i] = made[7 + i];
    for (int64_t i = 0; memory_grads && i < kMemoryGrads; ++i)
      result[first_memory - 2 + i] = made[7 + relative + i];
    return result;
  }
};

bool differentiable(const AttendCall& x, bool (*has)(const Tensor&)) {
  const auto any = [&](at::TensorList list) {
    return std::any_of(list.begin(), list.end(), [&](const Tensor& y) { return has(y); });
  };
  return has(x.q) || has(x.k) || has(x.v) || any(x.slots) || (x.bias && has(*x.bias)) ||
         any(x.relative) || any(x.memory);
}

bool needs(const Tensor& x) { return needs_grad(x); }
bool tangent(const Tensor& x) { return has_tangent(x); }

}  // namespace

Attended attend_autograd(const AttendCall& call, bool with_region_weights) {
  if (is_transformed() || differentiable(call, tangent)) {
    call.check();
    const auto precision = own_precision();
    return attend_composite(call, with_region_weights, /*recorded=*/true);
  }
  // Autograd keeps the rings, and cannot keep a tensor that was made in inference mode.
  std::vector<Tensor> memory = call.memory.vec();
  if (at::GradMode::is_enabled()) {
    for (Tensor& ring : memory)
      if (ring.is_inference()) ring = ring.clone();
  }
  const AttendCall own{call.q,
                       call.k,
                       call.v,
                       call.plan,
                       memory,
                       call.slots,
                       call.bias,
                       call.slopes,
                       call.relative,
                       call.packed,
                       call.numbers};
  const bool memory_grads = std::any_of(memory.begin(), memory.end(), needs);
  const CallList list(own);
  const auto made = AttendFunction::apply(
      at::TensorList(list.tensors), own, list, memory_grads, with_region_weights);
  return {made[0], made[1], made[2]};
}

// Where a backward is differentiated it is recorded, too, so every order has its value.
std::vector<Tensor> attend_backward_autograd(const AttendCall& call,
                                             const AttendOutputs& x,
                                             bool memory_grads) {
  const auto some = [&](bool (*has)(const Tensor&)) {
    return has(x.grad_out) || has(x.grad_logsumexp) || has(x.out) || has(x.logsumexp) ||
           differentiable(call, has);
  };
  if (is_transformed() || some(tangent) || (at::GradMode::is_enabled() && some(needs))) {
    const auto precision = own_precision();
    return attend_backward_composite(call, x, memory_grads, /*recorded=*/true).list();
  }
  at::AutoDispatchBelowADInplaceOrView below;
  return attend_backward(call, x, memory_grads);
}

}  // namespace ctx::ops
