#include "ops/spans.h"

#include <algorithm>

#include "ops/rings.h"
#include "ops/rotary.h"

namespace ctx::ops {

using at::Tensor;

namespace {

int keys_of(Region region) {
  return region == kSinks ? kSinkKeys : region == kCompressed ? kCompressedKeys : kWindowKeys;
}

Tensor column(const Tensor& x) { return x.unsqueeze(1); }

// [B, n] as a mask or an index of [B, heads, n, width].
Tensor wide(const Tensor& x) { return x.unsqueeze(1).unsqueeze(-1); }

}  // namespace

CallSpans::CallSpans(const AttendCall& call)
    : call_(call),
      settings_(call.settings()),
      plan_(call.plan, call.q.sym_size(0), call.q.sym_size(2), "ctx.attend"),
      own_sinks_(find_own_sinks()) {}

int64_t CallSpans::past(Region region) const {
  if (call_.memory.empty()) return 0;
  const Schedule& s = settings_.schedule();
  return region == kSinks ? s.sinks : region == kCompressed ? s.compressed : s.max_window();
}

// Where rows begin anew a sink may stand anywhere.
int64_t CallSpans::find_own_sinks() const {
  const int64_t sinks = settings_.schedule().sinks, tokens = call_.k.size(2);
  return plan_.resets() && sinks > 0 ? tokens : std::min(tokens, sinks);
}

Tensor CallSpans::own_keys() const {
  const Rotary& rotary = settings_.rotary;
  return rotary.keys_rotated ? call_.k : rotate(call_.k, plan_.token(kPlanPosition), rotary);
}

Tensor CallSpans::clock() const {
  const Schedule& s = settings_.schedule();
  const Tensor number = plan_.group(kPlanNumber);
  if (!settings_.clock.token_distance) return number;
  return s.centre(number.to(at::kDouble));
}

Tensor CallSpans::rotate_slots(const Tensor& x, bool transposed) const {
  const Rotary& rotary = settings_.rotary;
  if (rotary.dim == 0) return x;
  const auto towards = [&](const Tensor& position) {
    return transposed ? position.neg() : position;
  };
  if (!call_.single_tokens() || !settings_.clock.token_distance)
    return rotate(x, towards(clock()), rotary);
  const Tensor rows = x.flatten(0, 1).unsqueeze(1);
  return rotate(rows, towards(call_.slots[3].flatten(0, 1)), rotary).squeeze(1).view_as(x);
}

Tensor CallSpans::own_slots() const {
  return rotate_slots(call_.slots[0], false).to(call_.k.scalar_type());
}

Tensor CallSpans::numbers(Region region) const {
  const PlanColumn first = region == kSinks        ? kPlanFirstSink
                           : region == kCompressed ? kPlanFirstSlot
                                                   : kPlanFirstToken;
  return count_from(plan_.header(first), past(region));
}

Tensor CallSpans::held(Region region) const {
  const Tensor number = numbers(region);
  if (region == kSinks) return number.ge(0);
  return number.ge(column(plan_.header(region == kWindow ? kPlanOldestToken : kPlanOldestSlot)));
}

Tensor CallSpans::read(const Tensor& ring, Region region) const {
  return read_ring(ring, numbers(region), held(region));
}

Tensor CallSpans::join(int index, Region region, const Tensor& own) const {
  const auto type = arithmetic_type(call_.k.scalar_type());
  if (past(region) == 0) return own.to(type);
  return at::cat({slots_as(read(ring(index), region), type), own.to(type)}, 2);
}

Tensor CallSpans::keys(Region region) const {
  const Tensor own = region == kCompressed ? own_slots()
                     : region == kSinks    ? own_keys().narrow(2, 0, own_sinks_)
                                           : own_keys();
  return join(keys_of(region), region, own);
}

Tensor CallSpans::values(Region region) const {
  const Tensor own = region == kCompressed ? call_.slots[1].to(call_.v.scalar_type())
                     : region == kSinks    ? call_.v.narrow(2, 0, own_sinks_)
                                           : call_.v;
  return join(keys_of(region) + 1, region, own);
}

Tensor CallSpans::mass() const {
  if (!call_.mass().defined()) return {};
  const auto type = arithmetic_type(call_.k.scalar_type());
  if (past(kCompressed) == 0) return call_.mass().to(type);
  const Tensor held = read(ring(kSlotMass).unsqueeze(-1), kCompressed).squeeze(-1);
  return at::cat({held, call_.mass().to(type)}, 2);
}

Tensor CallSpans::positions() const {
  if (!call_.single_tokens() || !settings_.clock.token_distance) return {};
  if (past(kCompressed) == 0) return call_.slots[3];
  const Tensor held = read(ring(kSlotPositions).unsqueeze(-1), kCompressed).squeeze(-1);
  return at::cat({held, call_.slots[3]}, 2);
}

Tensor CallSpans::first(Region region) const {
  return plan_.token(region == kSinks        ? kPlanSinkKey
                     : region == kCompressed ? kPlanSlotKey
                                             : kPlanTokenKey);
}

void CallSpans::backward(const std::array<Tensor, kRegions>& grad_keys,
                         const std::array<Tensor, kRegions>& grad_values,
                         const Tensor& grad_mass,
                         bool memory_grads,
                         AttendGradients& to) const {
  const auto own = [](const Tensor& grad, const c10::SymInt& count) {
    return grad.narrow_symint(2, grad.sym_size(2) - count, count);
  };
  const auto tokens = [&](const std::array<Tensor, kRegions>& grads) {
    const Tensor window = own(grads[kWindow], call_.k.sym_size(2));
    if (own_sinks_ == 0) return window;
    const int64_t rest = call_.k.size(2) - own_sinks_;
    return window + at::constant_pad_nd(own(grads[kSinks], own_sinks_), {0, 0, 0, rest});
  };
  Tensor k = tokens(grad_keys);
  if (!settings_.rotary.keys_rotated)
    k = rotate(k, plan_.token(kPlanPosition).neg(), settings_.rotary);
  to.k = k.to(call_.k.scalar_type()).contiguous();
  to.v = tokens(grad_values).to(call_.v.scalar_type()).contiguous();
  const auto like = [](const Tensor& grad, const Tensor& x) {
    return grad.to(x.scalar_type()).contiguous();
  };
  const c10::SymInt groups = call_.slots[0].sym_size(2);
  to.slot_keys = like(rotate_slots(own(grad_keys[kCompressed], groups), true), call_.slots[0]);
  to.slot_values = like(own(grad_values[kCompressed], groups), call_.slots[1]);
  to.slot_mass = call_.mass().defined() ? like(own(grad_mass, groups), call_.mass())
                                        : at::zeros({0}, call_.q.options());
  if (!memory_grads) return;
  to.memory.resize(6);
  for (const Region region : {kSinks, kCompressed, kWindow}) {
    for (int i = 0; i < 2; ++i) {
      const Tensor& x = ring(keys_of(region) + i);
      const Tensor& grads = (i == 0 ? grad_keys : grad_values)[region];
      Tensor& sum = to.memory[keys_of(region) + i];
      sum = at::zeros_like(x);
      const int64_t count = past(region);
      if (count == 0) continue;
      const Tensor rows =
          grads.narrow(2, 0, count).masked_fill(wide(held(region).logical_not()), 0.0);
      const Tensor index = wide(numbers(region).remainder(x.size(2))).expand_as(rows);
      sum = sum.scatter_add(2, index, rows.to(x.scalar_type()));
    }
  }
}

}  // namespace ctx::ops
