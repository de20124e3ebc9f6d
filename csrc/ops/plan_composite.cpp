#include <limits>

#include "ops/plan_ways.h"
#include "ops/rings.h"
#include "ops/state.h"

namespace ctx::ops {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

Tensor plan_composite(const Tensor& seen,
                      const OptionalTensor& lengths,
                      const OptionalTensor& reset_at,
                      SymInt tokens,
                      at::IntArrayRef settings,
                      bool carried) {
  const Schedule s = check_plan(seen, lengths, reset_at, tokens, settings);
  const bool resets = reset_at.has_value() && tokens > 0;
  const Behind behind(s, carried);
  const int64_t c = s.ratio, a = s.sinks;
  const SymInt batch = seen.sym_size(0), groups = plan_groups(s, tokens, resets, carried);
  const Tensor count = lengths ? *lengths : at::full_symint({batch}, tokens, seen.options());
  const Tensor begun = groups_of(s, seen - 1).mul(seen.gt(0));
  const Tensor block = begun.mul(c).add(a).sub(seen).div(c, "floor");
  const Tensor place = at::arange(at::Scalar(tokens), seen.options()).unsqueeze(0);
  const Tensor padding = place.ge(count.unsqueeze(1));
  const Tensor old_start = seen.neg().unsqueeze(1).expand_symint({batch, tokens});
  Tensor start = old_start;
  if (resets) {
    const Tensor begins = reset_at->logical_and(padding.logical_not());
    start = std::get<0>(at::where(begins, place, old_start).cummax(1));
  }
  const Tensor carries = start.lt(0).logical_or(start.eq(old_start));
  const Tensor slot_key =
      resets
          ? at::where(carries, begun.unsqueeze(1), block.unsqueeze(1) - (start + a).div(c, "floor"))
          : begun.unsqueeze(1).expand_symint({batch, tokens});
  const Tensor sink_key = at::where(carries, seen.clamp_max(a).unsqueeze(1), start.neg());
  Tensor number, first;
  if (!resets || s.compressed == 0) {
    number = count_from(begun, groups);
    first = number.mul(c).add(a).sub(seen.unsqueeze(1));
  } else {
    const Tensor places = count_from(block.mul(c), groups * c);  // [B, G c]
    const Tensor padded = at::constant_pad_nd(start, {0, c}, std::numeric_limits<int64_t>::max());
    const auto start_at = [&](const Tensor& x) {
      const Tensor index = x.clamp_min(0).clamp_max(at::Scalar(tokens + (c - 1)));
      return at::where(x.lt(0), seen.neg().unsqueeze(1), padded.gather(1, index));
    };
    const Tensor of = start_at(places), token = places - of;
    const Tensor whole = token.ge(a)
                             .logical_and(token.sub(a).remainder(c).eq(0))
                             .logical_and(start_at(places + (c - 1)).eq(of))
                             .logical_and(places.lt(at::Scalar(tokens)));
    const Tensor offset = whole.unflatten_symint(1, {groups, c}).to(at::kInt).argmax(-1);
    first = count_from(block, groups).mul(c) + offset;
    number = (first - start_at(first) - a).div(c, "floor").clamp_min(0);
  }
  const auto column = [](const Tensor& x) { return x.unsqueeze(1); };
  return at::cat({column(seen),
                  column(count),
                  column(block),
                  column(seen - behind.tokens),
                  column(begun - behind.slots),
                  column(seen.clamp_max(a) - behind.sinks),
                  column(begun.mul(c).add(a)),
                  column(groups_of(s, seen).sub(s.compressed).clamp_min(0)),
                  (place - start).masked_fill(padding, -1),
                  start.neg() - behind.tokens,
                  slot_key - behind.slots,
                  sink_key - behind.sinks,
                  first,
                  number},
                 1);
}

void advance_composite(const Tensor& seen,
                       const Tensor& rewindable,
                       const Tensor& plan,
                       SymInt max_rewind) {
  check_advance(seen, rewindable, plan);
  const Tensor count = plan.select(1, kPlanCount), before = plan.select(1, kPlanSeen);
  const Tensor last = count.sub(1)
                          .clamp_min(0)
                          .add(int64_t{kPlanHeader})
                          .clamp_max(at::Scalar(plan.sym_size(1) - 1));
  const Tensor length = plan.gather(1, last.unsqueeze(1)).squeeze(1).add(1);
  const Tensor some = count.gt(0), same = length.eq(before + count);
  const Tensor back = at::where(same.logical_or(some.logical_not()), rewindable + count, length);
  at::Tensor(seen).copy_(at::where(some, length, seen));
  at::Tensor(rewindable).copy_(back.clamp_max(at::Scalar(max_rewind)));
}

}  // namespace ctx::ops
