// ctx::attend and ctx::attend_backward: registration, checks, shapes. The backward recomputes the
// weights from the log-sum-exp instead of keeping them.
#include "ops/attend.h"

#include <torch/library.h>

#include "ops/check.h"
#include "ops/plan.h"
#include "ops/shapes.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kAttendWhere = "ctx.attend";

// From the arguments of the schemas to AttendCall.
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

Attended forward_by_kernels(const AttendCall& call, bool with_region_weights) {
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

std::vector<Tensor> backward_by_kernels(const AttendCall& call,
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

}  // namespace

void AttendCall::check() const {
  const Settings x = settings();
  check_shape(kAttendWhere, "q", q, {{"B"}, {"H"}, {"T"}, {"D"}});
  storage_of(q.scalar_type(), kAttendWhere, "q");
  const SymInt batch = q.sym_size(0), tokens = q.sym_size(2), width = q.sym_size(3);
  check_shape(kAttendWhere, "k", k, {{"B", batch}, {"Hkv"}, {"T", tokens}, {"D", width}});
  const SymInt kv_heads = k.sym_size(1);
  check_shape(kAttendWhere, "v", v, {{"B", batch}, {"Hkv", kv_heads}, {"T", tokens}, {"Dv"}});
  for (const auto& [y, name] : {std::pair{k, "k"}, {v, "v"}})
    check_type(kAttendWhere, name, y, q.scalar_type(), " as q");
  CTX_CHECK_VALUE(kv_heads > 0 && q.sym_size(1) % kv_heads == 0,
                  kAttendWhere,
                  "q must have a multiple of Hkv = ",
                  kv_heads,
                  " heads, got ",
                  q.sym_size(1));
  check_head_dim(x, width, kAttendWhere);
  const PlanTensors tensors(plan, batch, tokens, kAttendWhere);
  CTX_CHECK_VALUE(slots.size() >= 2 && slots.size() <= 4,
                  kAttendWhere,
                  "slots must be keys, values, and perhaps mass and positions, got ",
                  slots.size());
  const SymInt groups = tensors.groups();
  check_shape(kAttendWhere,
              "slot keys",
              slots[0],
              {{"B", batch}, {"Hkv", kv_heads}, {"G", groups}, {"D", width}});
  check_shape(kAttendWhere,
              "slot values",
              slots[1],
              {{"B", batch}, {"Hkv", kv_heads}, {"G", groups}, {"Dv", v.sym_size(3)}});
  if (mass().defined())
    check_shape(
        kAttendWhere, "slot mass", slots[2], {{"B", batch}, {"Hkv", kv_heads}, {"G", groups}});
  CTX_CHECK_VALUE(mass().defined() == x.slot_mass,
                  kAttendWhere,
                  "slots must have a mass where slot_mass is set, and none elsewhere, got ",
                  mass().defined() ? "one" : "none");
  if (single_tokens()) {
    check_shape(
        kAttendWhere, "slot positions", slots[3], {{"B", batch}, {"Hkv", kv_heads}, {"G", groups}});
    check_type(kAttendWhere, "slot positions", slots[3], at::kLong);
  }
  check_score_operands(q, {bias, slopes, relative}, kAttendWhere);
  if (memory.empty()) return;
  check_rings(memory, x.schedule(), kAttendWhere);
  check_pairs(memory, k, v, kAttendWhere);
}

std::vector<Tensor> AttendGradients::list() const {
  std::vector<Tensor> all = {q, k, v, slot_keys, slot_values, slot_mass, bias};
  all.insert(all.end(), relative.begin(), relative.end());
  all.insert(all.end(), memory.begin(), memory.end());
  return all;
}

Attended attend(const AttendCall& x, bool with_region_weights) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::attend", "")
                             .typed<decltype(forward<forward_by_kernels>)>();
  return op.call(x.q,
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

std::vector<Tensor> attend_backward(const AttendCall& x,
                                    const AttendOutputs& outputs,
                                    bool memory_grads) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::attend_backward", "")
                             .typed<decltype(backward<backward_by_kernels>)>();
  return op.call(outputs.grad_out,
                 outputs.grad_logsumexp,
                 outputs.out,
                 outputs.logsumexp,
                 x.q,
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
                 memory_grads);
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
  m.impl("attend", forward<forward_by_kernels>);
  m.impl("attend_backward", backward<backward_by_kernels>);
}

TORCH_LIBRARY_IMPL(ctx, CUDA, m) {
  m.impl("attend", forward<forward_by_kernels>);
  m.impl("attend_backward", backward<backward_by_kernels>);
}

TORCH_LIBRARY_IMPL(ctx, Meta, m) {
  m.impl("attend", forward<forward_meta>);
  m.impl("attend_backward", backward<backward_meta>);
}

TORCH_LIBRARY_IMPL(ctx, Autograd, m) {
  m.impl("attend", forward<attend_autograd>);
  m.impl("attend_backward", backward<attend_backward_autograd>);
}

}  // namespace ctx::ops
