// ctx::evicted_groups: registration, checks, shapes, autograd.
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "ops/derivatives.h"
#include "ops/groups_ways.h"
#include "ops/shapes.h"
#include "ops/state.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using c10::SymInt;

Pairs groups_meta(const Tensor& k,
                  const Tensor& v,
                  const Tensor& plan,
                  OptionalList list,
                  at::IntArrayRef packed,
                  at::ArrayRef<double> numbers) {
  const Settings settings = check_groups(k, v, or_empty(list), packed, numbers, plan);
  const PlanTensors tensors(plan, k.sym_size(0), k.sym_size(2), kGroups);
  const auto made = [&](const Tensor& x) {
    return x.new_empty_symint({x.sym_size(0),
                               x.sym_size(1),
                               tensors.groups(),
                               tokens_read(settings.schedule()),
                               x.sym_size(3)},
                              x.options().dtype(arithmetic_type(x.scalar_type())));
  };
  return {made(k), made(v)};
}

Pairs groups_backward_meta(const Tensor& grad_k,
                           const Tensor& grad_v,
                           const Tensor& /*plan*/,
                           SymInt tokens,
                           at::ScalarType type,
                           at::IntArrayRef /*packed*/,
                           at::ArrayRef<double> /*numbers*/) {
  const auto made = [&](const Tensor& grad) {
    return grad.new_empty_symint({grad.sym_size(0), grad.sym_size(1), tokens, grad.sym_size(4)},
                                 grad.options().dtype(type));
  };
  return {made(grad_k), made(grad_v)};
}

auto groups_backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::evicted_groups_backward", "")
                             .typed<decltype(groups_backward_cpu)>();
  return op;
}

auto groups_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::evicted_groups", "")
                             .typed<decltype(groups_cpu)>();
  return op;
}

class GroupsFunction : public torch::autograd::Function<GroupsFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* saved,
                                                const Tensor& k,
                                                const Tensor& v,
                                                const Tensor& plan,
                                                OptionalList memory,
                                                at::IntArrayRef settings,
                                                at::ArrayRef<double> numbers) {
    at::AutoDispatchBelowADInplaceOrView guard;
    saved->save_for_backward({plan});
    saved->saved_data["tokens"] = k.sym_size(2);
    saved->saved_data["type"] = static_cast<int64_t>(k.scalar_type());
    saved->saved_data["settings"] = settings.vec();
    saved->saved_data["numbers"] = numbers.vec();
    const auto [keys, values] = groups_op().call(k, v, plan, memory, settings, numbers);
    return {keys, values};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* saved,
                                                 torch::autograd::variable_list grads) {
    const auto& data = saved->saved_data;
    const Tensor plan = saved->get_saved_variables()[0];
    torch::autograd::variable_list result(6);
    std::tie(result[0], result[1]) =
        groups_backward_op().call(grads[0],
                                  grads[1],
                                  plan,
                                  data.at("tokens").toSymInt(),
                                  static_cast<at::ScalarType>(data.at("type").toInt()),
                                  data.at("settings").toIntVector(),
                                  data.at("numbers").toDoubleVector());
    return result;
  }
};

Pairs groups_autograd(const Tensor& k,
                      const Tensor& v,
                      const Tensor& plan,
                      OptionalList memory,
                      at::IntArrayRef settings,
                      at::ArrayRef<double> numbers) {
  const auto precision = own_precision();
  if (is_recorded(k, v)) return groups_composite(k, v, plan, memory, settings, numbers);
  const auto made = GroupsFunction::apply(k, v, plan, memory, settings, numbers);
  return {made[0], made[1]};
}

// Where a backward is differentiated torch's own operators do it, which autograd records.
Pairs groups_backward_autograd(c10::DispatchKeySet keys,
                               const Tensor& grad_k,
                               const Tensor& grad_v,
                               const Tensor& plan,
                               SymInt tokens,
                               at::ScalarType type,
                               at::IntArrayRef settings,
                               at::ArrayRef<double> numbers) {
  const bool differentiated =
      at::GradMode::is_enabled() && (needs_grad(grad_k) || needs_grad(grad_v));
  if (differentiated || is_recorded(grad_k, grad_v))
    return groups_backward_composite(grad_k, grad_v, plan, tokens, type, settings, numbers);
  return groups_backward_op().redispatch(
      keys & c10::after_autograd_keyset, grad_k, grad_v, plan, tokens, type, settings, numbers);
}

}  // namespace

Settings check_groups(const Tensor& k,
                      const Tensor& v,
                      at::TensorList memory,
                      at::IntArrayRef settings,
                      at::ArrayRef<double> numbers,
                      const Tensor& plan) {
  const Settings x = unpack(settings, numbers, kGroups);
  check_shape(kGroups, "k", k, {{"B"}, {"Hkv"}, {"T"}, {"D"}});
  check_shape(kGroups,
              "v",
              v,
              {{"B", k.sym_size(0)}, {"Hkv", k.sym_size(1)}, {"T", k.sym_size(2)}, {"Dv"}});
  check_type(kGroups, "v", v, k.scalar_type(), " as k");
  storage_of(k.scalar_type(), kGroups, "k");
  check_head_dim(x, k.sym_size(3), kGroups);
  if (memory.empty()) return x;
  check_rings(memory, x.schedule(), kGroups);
  const SymInt rows = memory[kWindowKeys].sym_size(0);
  check_pairs(memory, k, v, kGroups, plan.defined() ? call_rows(plan, rows) : rows);
  return x;
}

Pairs evicted_groups(const Tensor& k,
                     const Tensor& v,
                     const Tensor& plan,
                     at::TensorList memory,
                     const PackedSettings& settings) {
  return groups_op().call(k, v, plan, memory, settings.settings, settings.numbers);
}

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def(
      "evicted_groups(Tensor k, Tensor v, Tensor plan, Tensor[]? memory, int[] settings, float[] "
      "numbers) -> (Tensor keys, Tensor values)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "evicted_groups_backward(Tensor grad_keys, Tensor grad_values, Tensor plan, SymInt tokens, "
      "ScalarType dtype, int[] settings, float[] numbers) -> (Tensor k, Tensor v)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CompositeExplicitAutograd, m) {
  m.impl("evicted_groups", groups_composite);
  m.impl("evicted_groups_backward", groups_backward_composite);
}

TORCH_LIBRARY_IMPL(ctx, CPU, m) {
  m.impl("evicted_groups", groups_cpu);
  m.impl("evicted_groups_backward", groups_backward_cpu);
}

TORCH_LIBRARY_IMPL(ctx, Meta, m) {
  m.impl("evicted_groups", groups_meta);
  m.impl("evicted_groups_backward", groups_backward_meta);
}

TORCH_LIBRARY_IMPL(ctx, Autograd, m) {
  m.impl("evicted_groups", groups_autograd);
  m.impl("evicted_groups_backward", groups_backward_autograd);
}

}  // namespace ctx::ops
