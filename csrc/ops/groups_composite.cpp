// ctx::evicted_groups and its backward out of torch's own operators.
#include "ops/groups_ways.h"
#include "ops/rings.h"
#include "ops/rotary.h"
#include "ops/state.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using c10::SymInt;

// The tokens that each group reads: their places in the call, [B, G read], their numbers in their
// streams, and where they are the call's: a place below zero is the memory's.
struct Reading {
  Tensor place;
  Tensor number;

  Reading(const PlanTensors& plan, const Schedule& s) {
    const int64_t read = tokens_read(s);
    place = count_from(plan.group(kPlanPlace) - s.overlap, read).flatten(1);
    const Tensor first = s.first_token(plan.group(kPlanNumber)) - s.overlap;
    number = count_from(first, read).flatten(1);
  }

  Tensor wide(const Tensor& mask) const { return mask.unsqueeze(1).unsqueeze(-1); }
};

// Rows of x [B, heads, T, width] at places [B, n]; out-of-range places are clamped.
Tensor take_rows(const Tensor& x, const Tensor& place) {
  const Tensor inside =
      place.clamp_min(0).clamp_max(at::Scalar(x.sym_size(2) - 1)).unsqueeze(1).unsqueeze(-1);
  return x.gather(
      2, inside.expand_symint({x.sym_size(0), x.sym_size(1), place.sym_size(1), x.sym_size(3)}));
}

// Pairs of the carried stream that a memory holds, by their places in the call.
Tensor held_rows(at::TensorList memory,
                 StateIndex ring,
                 StateIndex sinks,
                 const PlanTensors& plan,
                 const Schedule& s,
                 const Tensor& place) {
  const auto column = [](const Tensor& x) { return x.unsqueeze(1); };
  const Tensor token = column(plan.header(kPlanSeen)) + place;
  const Tensor held = token.ge(column(plan.header(kPlanOldestToken).sub(s.overlap).clamp_min(0)));
  const Tensor rows = read_ring(memory[ring], token, held);
  if (s.sinks == 0) return rows;
  const Tensor sink = token.lt(s.sinks).logical_and(held);
  return at::where(sink.unsqueeze(1).unsqueeze(-1), take_rows(memory[sinks], token), rows);
}

// x are rows as a memory holds them: keys are rotated.
Tensor group_elsewhere(const Tensor& x,
                       const PlanTensors& plan,
                       at::TensorList memory,
                       StateIndex ring,
                       StateIndex sinks,
                       const Schedule& s) {
  const auto type = arithmetic_type(x.scalar_type());
  const Reading reading(plan, s);
  Tensor rows = x.sym_size(2) == 0 ? Tensor() : take_rows(x, reading.place);
  if (!memory.empty()) {
    const Tensor held = held_rows(memory, ring, sinks, plan, s, reading.place);
    rows = rows.defined() ? at::where(reading.wide(reading.place.lt(0)), held, rows) : held;
  }
  if (!rows.defined())
    rows = at::zeros_symint(
        {x.sym_size(0), x.sym_size(1), reading.place.sym_size(1), x.sym_size(3)}, x.options());
  return rows.to(type);
}

// Rotating by the negative angle is the transpose; the inverse divides by the factor twice.
Tensor rotated_back(const Tensor& rows, const Tensor& position, const Rotary& rotary) {
  if (rotary.dim == 0) return rows;
  const double factor = rotary.attention_factor;
  const Tensor turned = rotate(rows, position.neg(), rotary);
  if (factor == 1.0) return turned;
  return at::cat(
      {turned.slice(-1, 0, rotary.dim) / (factor * factor), turned.slice(-1, rotary.dim)}, -1);
}

}  // namespace

Pairs groups_composite(const Tensor& k,
                       const Tensor& v,
                       const Tensor& plan,
                       OptionalList list,
                       at::IntArrayRef packed,
                       at::ArrayRef<double> numbers) {
  const at::TensorList memory = or_empty(list);
  const Settings settings = check_groups(k, v, memory, packed, numbers);
  const PlanTensors tensors(plan, k.sym_size(0), k.sym_size(2), kGroups);
  const Schedule& s = settings.schedule();
  const Rotary& rotary = settings.rotary;
  const Tensor stored = rotary.keys_rotated ? k : rotate(k, tensors.token(kPlanPosition), rotary);
  const Reading reading(tensors, s);
  const auto grouped = [&](const Tensor& rows) {
    return rows.masked_fill(reading.wide(reading.number.lt(0)), 0.0)
        .reshape_symint({rows.sym_size(0),
                         rows.sym_size(1),
                         tensors.groups(),
                         tokens_read(s),
                         rows.sym_size(3)});
  };
  const Tensor keys = group_elsewhere(stored, tensors, memory, kWindowKeys, kSinkKeys, s);
  return {grouped(rotated_back(keys, reading.number, rotary)),
          grouped(group_elsewhere(v, tensors, memory, kWindowValues, kSinkValues, s))};
}

Pairs groups_backward_composite(const Tensor& grad_k,
                                const Tensor& grad_v,
                                const Tensor& plan,
                                SymInt tokens,
                                at::ScalarType type,
                                at::IntArrayRef packed,
                                at::ArrayRef<double> numbers) {
  const Settings settings = unpack(packed, numbers, kGroups);
  const PlanTensors tensors(plan, grad_k.sym_size(0), tokens, kGroups);
  const Reading reading(tensors, settings.schedule());
  const Tensor outside = reading.wide(reading.place.lt(0).logical_or(
      reading.place.ge(at::Scalar(tokens)).logical_or(reading.number.lt(0))));
  const auto sum = [&](const Tensor& grad, bool rotates) {
    const SymInt batch = grad.sym_size(0), heads = grad.sym_size(1), width = grad.sym_size(4);
    const Tensor total = at::zeros_symint({batch, heads, tokens, width}, grad.options());
    if (tokens == 0) return total.to(type);
    Tensor rows = grad.flatten(2, 3).masked_fill(outside, 0.0);
    if (rotates && settings.rotary.dim > 0) {  // the transpose of the inverse
      const double factor = settings.rotary.attention_factor;
      const int64_t dim = settings.rotary.dim;
      rows = rotate(rows, reading.number, settings.rotary);
      rows = at::cat({rows.slice(-1, 0, dim) / (factor * factor), rows.slice(-1, dim)}, -1);
    }
    const Tensor index = reading.wide(reading.place.clamp_min(0).clamp_max(at::Scalar(tokens - 1)));
    return total.scatter_add(2, index.expand_symint(rows.sym_sizes()), rows).to(type);
  };
  return {sum(grad_k, settings.rotary.keys_rotated), sum(grad_v, false)};
}

}  // namespace ctx::ops
