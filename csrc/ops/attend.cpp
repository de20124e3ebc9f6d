// ctx::attend and ctx::attend_backward: registration, checks, autograd. The backward recomputes the
// weights from the log-sum-exp instead of keeping them.
#include "ops/attend.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/check.h"
#include "ops/derivatives.h"
#include "ops/plan.h"
#include "ops/shapes.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::variable_list;

constexpr const char* kWhere = "ctx.attend";
constexpr int kMemoryGrads = kSinkValues + 1;  // rings of pairs

Tensor nothing(const Tensor& like) { return at::zeros({0}, like.options()); }

// --- kernels by dispatch key

template <Attended (*Run)(const AttendCall&, bool)>
Attended forward(const Tensor& q,
                 const Tensor& k,
                 const Tensor& v,
                 const Tensor& plan,
                 OptionalList memory,
                 at::TensorList slots,
                 const OptionalTensor& bias,
                 const OptionalTensor& slopes,
                 OptionalList relative,
                 at::IntArrayRef settings,
                 at::ArrayRef<double> numbers,
                 bool with_region_weights) {
  return Run(
      {q, k, v, plan, or_empty(memory), slots, bias, slopes, or_empty(relative), settings, numbers},
      with_region_weights);
}

template <std::vector<Tensor> (*Run)(const AttendCall&, const AttendOutputs&, bool)>
std::vector<Tensor> backward(const Tensor& grad_out,
                             const Tensor& grad_logsumexp,
                             const Tensor& out,
                             const Tensor& logsumexp,
                             const Tensor& q,
                             const Tensor& k,
                             const Tensor& v,
                             const Tensor& plan,
                             OptionalList memory,
                             at::TensorList slots,
                             const OptionalTensor& bias,
                             const OptionalTensor& slopes,
                             OptionalList relative,
                             at::IntArrayRef settings,
                             at::ArrayRef<double> numbers,
                             bool memory_grads) {
  return Run(
      {q, k, v, plan, or_empty(memory), slots, bias, slopes, or_empty(relative), settings, numbers},
      {grad_out, grad_logsumexp, out, logsumexp},
      memory_grads);
}

Attended forward_elsewhere(const AttendCall& call, bool with_region_weights) {
  call.check();
  const auto precision = own_precision();
  return attend_composite(call, with_region_weights, /*recorded=*/false);
}

Attended forward_cpu(const AttendCall& call, bool with_region_weights) {
  call.check();
  const auto precision = own_precision();
  return has_kernels(call) ? attend_by_kernels(call, with_region_weights)
                           : attend_composite(call, with_region_weights, /*recorded=*/false);
}

Attended forward_meta(const AttendCall& call, bool with_region_weights) {
  const Tensor& q = call.q;
  auto sizes = q.sym_sizes().vec();
  const Tensor logsumexp = q.new_empty_symint(c10::SymIntArrayRef(sizes).slice(0, 3),
                                              q.options().dtype(arithmetic_type(q.scalar_type())));
  sizes[3] = call.v.sym_size(3);
  return {q.new_empty_symint(sizes), logsumexp, new_region_weights(q, with_region_weights)};
}

std::vector<Tensor> backward_elsewhere(const AttendCall& call,
                                       const AttendOutputs& outputs,
                                       bool memory_grads) {
  const auto precision = own_precision();
  return attend_backward_composite(call, outputs, memory_grads, /*recorded=*/false).list();
}

std::vector<Tensor> backward_cpu(const AttendCall& call,
                                 const AttendOutputs& outputs,
                                 bool memory_grads) {
  if (!has_kernels(call)) return backward_elsewhere(call, outputs, memory_grads);
  const auto precision = own_precision();
  return attend_backward_by_kernels(call, outputs, memory_grads).list();
}

std::vector<Tensor> backward_meta(const AttendCall& call,
                                  const AttendOutputs& /*outputs*/,
                                  bool memory_grads) {
  const auto like = [](const Tensor& x) { return x.new_empty_symint(x.sym_sizes()); };
  AttendGradients g{like(call.q),
                    like(call.k),
                    like(call.v),
                    like(call.slots[0]),
                    like(call.slots[1]),
                    call.mass().defined() ? like(call.mass()) : call.q.new_empty({0}),
                    call.bias ? like(*call.bias) : call.q.new_empty({0}),
                    {},
                    {}};
  for (const Tensor& x : call.relative) g.relative.push_back(like(x));
  for (int i = 0; memory_grads && i < kMemoryGrads; ++i) g.memory.push_back(like(call.memory[i]));
  return g.list();
}

auto forward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::attend", "")
                             .typed<decltype(forward<forward_cpu>)>();
  return op;
}

auto backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::attend_backward", "")
                             .typed<decltype(backward<backward_cpu>)>();
  return op;
}

Attended dispatch(const AttendCall& x, bool with_region_weights) {
  return forward_op().call(x.q,
                           x.k,
                           x.v,
                           x.plan,
                           x.memory,
                           x.slots,
                           x.bias,
                           x.slopes,
                           x.relative,
                           x.packed,
                           x.numbers,
                           with_region_weights);
}

// --- autograd

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

  int64_t first_bias() const { return 4 + slots; }
  int64_t first_relative() const { return first_bias() + bias; }
  int64_t first_memory() const { return first_relative() + relative; }
  int64_t first_slopes() const { return first_memory() + memory; }
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
    const auto [out, logsumexp, region_weights] = dispatch(call, with_region_weights);
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
    const Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(x[0]);
    const Tensor grad_logsumexp = grads[1].defined() ? grads[1] : at::zeros_like(x[1]);
    const auto made =
        backward_op().call(grad_out,
                           grad_logsumexp,
                           x[0],
                           x[1],
                           x[2],
                           x[3],
                           x[4],
                           x[5],
                           all.slice(first_memory, memory),
                           all.slice(6, slots),
                           bias ? OptionalTensor(x[first_bias]) : std::nullopt,
                           slopes ? OptionalTensor(x[first_memory + memory]) : std::nullopt,
                           all.slice(first_relative, relative),
                           saved->saved_data["settings"].toIntVector(),
                           saved->saved_data["numbers"].toDoubleVector(),
                           memory_grads);
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

Attended forward_autograd(const AttendCall& call, bool with_region_weights) {
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
std::vector<Tensor> backward_autograd(c10::DispatchKeySet keys,
                                      const Tensor& grad_out,
                                      const Tensor& grad_logsumexp,
                                      const Tensor& out,
                                      const Tensor& logsumexp,
                                      const Tensor& q,
                                      const Tensor& k,
                                      const Tensor& v,
                                      const Tensor& plan,
                                      OptionalList memory,
                                      at::TensorList slots,
                                      const OptionalTensor& bias,
                                      const OptionalTensor& slopes,
                                      OptionalList relative,
                                      at::IntArrayRef settings,
                                      at::ArrayRef<double> numbers,
                                      bool memory_grads) {
  const AttendCall call{
      q, k, v, plan, or_empty(memory), slots, bias, slopes, or_empty(relative), settings, numbers};
  const AttendOutputs outputs{grad_out, grad_logsumexp, out, logsumexp};
  const auto some = [&](bool (*has)(const Tensor&)) {
    return has(grad_out) || has(grad_logsumexp) || has(out) || has(logsumexp) ||
           differentiable(call, has);
  };
  if (is_transformed() || some(tangent) || (at::GradMode::is_enabled() && some(needs))) {
    const auto precision = own_precision();
    return attend_backward_composite(call, outputs, memory_grads, /*recorded=*/true).list();
  }
  return backward_op().redispatch(keys & c10::after_autograd_keyset,
                                  grad_out,
                                  grad_logsumexp,
                                  out,
                                  logsumexp,
                                  q,
                                  k,
                                  v,
                                  plan,
                                  memory,
                                  slots,
                                  bias,
                                  slopes,
                                  relative,
                                  settings,
                                  numbers,
                                  memory_grads);
}

}  // namespace

void AttendCall::check() const {
  const Settings x = settings();
  check_shape(kWhere, "q", q, {{"B"}, {"H"}, {"T"}, {"D"}});
  storage_of(q.scalar_type(), kWhere, "q");
  const SymInt batch = q.sym_size(0), tokens = q.sym_size(2), width = q.sym_size(3);
  check_shape(kWhere, "k", k, {{"B", batch}, {"Hkv"}, {"T", tokens}, {"D", width}});
  const SymInt kv_heads = k.sym_size(1);
  check_shape(kWhere, "v", v, {{"B", batch}, {"Hkv", kv_heads}, {"T", tokens}, {"Dv"}});
  for (const auto& [y, name] : {std::pair{k, "k"}, {v, "v"}})
    check_type(kWhere, name, y, q.scalar_type(), " as q");
  CTX_CHECK_VALUE(kv_heads > 0 && q.sym_size(1) % kv_heads == 0,
                  kWhere,
                  "q must have a multiple of Hkv = ",
                  kv_heads,
                  " heads, got ",
                  q.sym_size(1));
  check_head_dim(x, width, kWhere);
  const PlanTensors tensors(plan, batch, tokens, kWhere);
  CTX_CHECK_VALUE(slots.size() >= 2 && slots.size() <= 4,
                  kWhere,
                  "slots must be keys, values, and perhaps mass and positions, got ",
                  slots.size());
  const SymInt groups = tensors.groups();
  check_shape(kWhere,
              "slot keys",
              slots[0],
              {{"B", batch}, {"Hkv", kv_heads}, {"G", groups}, {"D", width}});
  check_shape(kWhere,
              "slot values",
              slots[1],
              {{"B", batch}, {"Hkv", kv_heads}, {"G", groups}, {"Dv", v.sym_size(3)}});
  if (mass().defined())
    check_shape(kWhere, "slot mass", slots[2], {{"B", batch}, {"Hkv", kv_heads}, {"G", groups}});
  CTX_CHECK_VALUE(mass().defined() == x.slot_mass,
                  kWhere,
                  "slots must have a mass where slot_mass is set, and none elsewhere, got ",
                  mass().defined() ? "one" : "none");
  if (single_tokens()) {
    check_shape(
        kWhere, "slot positions", slots[3], {{"B", batch}, {"Hkv", kv_heads}, {"G", groups}});
    check_type(kWhere, "slot positions", slots[3], at::kLong);
  }
  check_score_operands(q, {bias, slopes, relative}, kWhere);
  if (memory.empty()) return;
  check_rings(memory, x.schedule(), kWhere);
  check_pairs(memory, k, v, kWhere);
}

std::vector<Tensor> AttendGradients::list() const {
  std::vector<Tensor> all = {q, k, v, slot_keys, slot_values, slot_mass, bias};
  all.insert(all.end(), relative.begin(), relative.end());
  all.insert(all.end(), memory.begin(), memory.end());
  return all;
}

Attended attend(const AttendCall& call, bool with_region_weights) {
  return dispatch(call, with_region_weights);
}

#define CTX_ATTEND_SCHEMA                                                                       \
  "Tensor q, Tensor k, Tensor v, Tensor plan, Tensor[]? memory, Tensor[] slots, Tensor? bias, " \
  "Tensor? slopes, Tensor[]? relative, int[] settings, float[] numbers, "

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def("attend(" CTX_ATTEND_SCHEMA
        "bool with_region_weights) -> (Tensor out, Tensor logsumexp, Tensor region_weights)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "attend_backward(Tensor grad_out, Tensor grad_logsumexp, Tensor out, Tensor "
      "logsumexp, " CTX_ATTEND_SCHEMA "bool memory_grads) -> Tensor[]",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CompositeExplicitAutograd, m) {
  m.impl("attend", forward<forward_elsewhere>);
  m.impl("attend_backward", backward<backward_elsewhere>);
}

TORCH_LIBRARY_IMPL(ctx, CPU, m) {
  m.impl("attend", forward<forward_cpu>);
  m.impl("attend_backward", backward<backward_cpu>);
}

TORCH_LIBRARY_IMPL(ctx, Meta, m) {
  m.impl("attend", forward<forward_meta>);
  m.impl("attend_backward", backward<backward_meta>);
}

TORCH_LIBRARY_IMPL(ctx, Autograd, m) {
  m.impl("attend", forward<forward_autograd>);
  m.impl("attend_backward", backward_autograd);
}

}  // namespace ctx::ops
