// ctx::plan and ctx::advance_: registration, checks, shapes.
#include "ops/plan.h"

#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include "ops/check.h"
#include "ops/layout.h"
#include "ops/registry.h"
#include "ops/settings.h"
#include "ops/shapes.h"
#include "ops/state.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kPlanName = "ctx.plan";

Schedule schedule_in(at::IntArrayRef x) { return {x[0], x[1], x[2], x[3], x[4], x[5]}; }

// Rows are written by whoever has them: no two of a call may be one.
void check_map(const Tensor& seen, const OptionalTensor& rows) {
  if (!rows) return;
  check_shape(kPlanName, "rows", *rows, {{"B"}});
  check_type(kPlanName, "rows", *rows, at::kLong);
  check_device(kPlanName, "rows", *rows, seen.device());
  check_dense(kPlanName, "rows", *rows);
  if (!rows->is_cpu()) return;
  std::vector<bool> taken(seen.size(0), false);
  for (int64_t b = 0; b < rows->size(0); ++b) {
    const int64_t row = rows->const_data_ptr<int64_t>()[b * rows->stride(0)];
    CTX_CHECK_INDEX(row >= 0 && row < seen.size(0),
                    kPlanName,
                    "rows must be between 0 and ",
                    seen.size(0) - 1,
                    ", got ",
                    row);
    CTX_CHECK_VALUE(!taken[row], kPlanName, "rows must be different, got ", row, " twice");
    taken[row] = true;
  }
}

Schedule check_plan(const Tensor& seen,
                    const OptionalTensor& lengths,
                    const OptionalTensor& reset_at,
                    const SymInt& tokens,
                    at::IntArrayRef settings,
                    const OptionalTensor& rows) {
  check_shape(kPlanName, "seen", seen, {{"B"}});
  check_type(kPlanName, "seen", seen, at::kLong);
  CTX_CHECK_VALUE(tokens >= 0, kPlanName, "tokens must be at least 0, got ", tokens);
  check_map(seen, rows);
  check_rows(rows ? *rows : seen, tokens, lengths, reset_at, kPlanName);
  CTX_CHECK_VALUE(settings.size() > 5, kPlanName, "settings must be 12 integers, got ", settings);
  const Schedule schedule = schedule_in(settings);
  schedule.validate();
  return schedule;
}

void check_advance(const Tensor& seen, const Tensor& rewindable, const Tensor& plan) {
  constexpr const char* where = "ctx.advance_";
  check_shape(where, "seen", seen, {{"B"}});
  const SymInt rows = seen.sym_size(0);
  check_shape(where, "plan", plan, {{"B", call_rows(plan, rows)}, {"columns"}});
  for (const auto& [x, name] : {std::pair{seen, "seen"}, {rewindable, "rewindable"}}) {
    check_shape(where, name, x, {{"B", rows}});
    check_type(where, name, x, at::kLong);
  }
}

// What a schedule says a plan of these rows has.
struct PlanSizes {
  bool resets;
  SymInt groups, columns;

  PlanSizes(const Schedule& s, const SymInt& tokens, const OptionalTensor& reset_at, bool carried)
      : resets(reset_at.has_value() && tokens > 0),
        groups(plan_groups(s, tokens, resets, carried)),
        columns(plan_columns(tokens, groups) + int64_t{resets}) {}
};

Tensor make_plan(const Tensor& seen,
                 const OptionalTensor& lengths,
                 const OptionalTensor& reset_at,
                 SymInt tokens,
                 at::IntArrayRef settings,
                 bool carried,
                 const OptionalTensor& rows) {
  const Schedule s = check_plan(seen, lengths, reset_at, tokens, settings, rows);
  if (!has_kernels(seen.device().type())) {  // a device without kernels waits for the host
    const auto host = [](const OptionalTensor& x) { return x ? OptionalTensor(x->cpu()) : x; };
    return plan(seen.cpu(), host(lengths), host(reset_at), tokens, settings, carried, host(rows))
        .to(seen.device());
  }
  check_seen(seen, kPlanName);
  check_lengths(lengths, tokens.expect_int(), kPlanName);
  const PlanSizes sizes(s, tokens, reset_at, carried);
  const int64_t batch = rows ? rows->size(0) : seen.size(0);
  const Tensor made = at::empty({batch, sizes.columns.expect_int()}, seen.options());
  const Tensor map = rows ? rows->contiguous() : Tensor();
  const Tensor clock = seen.contiguous();
  const Tensor counts = lengths ? lengths->contiguous() : Tensor();
  const Tensor begins = sizes.resets ? reset_at->contiguous() : Tensor();
  PlanArgs args;
  args.schedule = s, args.carried = carried, args.resets = sizes.resets;
  args.device = device_index(seen);
  args.batch = batch, args.tokens = tokens.expect_int();
  args.memory_rows = seen.size(0);
  if (rows) args.rows = map.const_data_ptr<int64_t>();
  args.groups = sizes.groups.expect_int();
  args.seen = clock.const_data_ptr<int64_t>();
  if (counts.defined()) args.lengths = counts.const_data_ptr<int64_t>();
  if (begins.defined()) args.reset_at = begins.const_data_ptr<bool>();
  args.plan = made.data_ptr<int64_t>();
  if (args.batch > 0) kernels_for(seen.device().type()).plan(args);
  return made;
}

Tensor plan_meta(const Tensor& seen,
                 const OptionalTensor& /*lengths*/,
                 const OptionalTensor& reset_at,
                 SymInt tokens,
                 at::IntArrayRef settings,
                 bool carried,
                 const OptionalTensor& rows) {
  const PlanSizes sizes(schedule_in(settings), tokens, reset_at, carried);
  return seen.new_empty_symint({(rows ? *rows : seen).sym_size(0), sizes.columns});
}

void advance_clock(const Tensor& seen,
                   const Tensor& rewindable,
                   const Tensor& plan,
                   SymInt max_rewind) {
  check_advance(seen, rewindable, plan);
  if (!has_kernels(seen.device().type())) {
    const Tensor tokens = seen.cpu(), back = rewindable.cpu();
    advance_(tokens, back, plan.cpu(), max_rewind);
    Tensor(seen).copy_(tokens), Tensor(rewindable).copy_(back);
    return;
  }
  const c10::InferenceMode writes(true);  // a memory that was made in it is written outside, too
  const Tensor rows = plan.contiguous();
  AdvanceArgs args;
  args.device = device_index(seen);
  args.batch = rows.size(0), args.columns = rows.size(1);
  args.memory_rows = seen.size(0);
  args.max_rewind = max_rewind.expect_int();
  args.plan = rows.const_data_ptr<int64_t>();
  for (int64_t b = 0; seen.is_cpu() && b < args.batch && args.columns > kPlanRow; ++b) {
    const int64_t row = args.plan[b * args.columns + kPlanRow];
    CTX_CHECK_VALUE(row < args.memory_rows,
                    "ctx.advance_",
                    "plan must be one of this memory's rows, 0 to ",
                    args.memory_rows - 1,
                    ", got ",
                    row);
  }
  args.seen = seen.data_ptr<int64_t>(), args.seen_stride = seen.stride(0);
  args.rewindable = rewindable.data_ptr<int64_t>(), args.rewindable_stride = rewindable.stride(0);
  if (args.batch > 0) kernels_for(seen.device().type()).advance(args);
  for (const Tensor& x : {seen, rewindable}) x.unsafeGetTensorImpl()->bump_version();
}

void advance_meta(const Tensor& /*seen*/,
                  const Tensor& /*rewindable*/,
                  const Tensor& /*plan*/,
                  SymInt /*max_rewind*/) {}

SymInt groups_in(const Tensor& plan, const SymInt& tokens, const char* where) {
  const SymInt left = plan.sym_size(1) - plan_columns(tokens, SymInt(0));
  CTX_CHECK_VALUE(left >= 0,
                  where,
                  "plan must be that of a call of ",
                  tokens,
                  " tokens, got ",
                  plan.sym_sizes());
  return left / int64_t{kPlanPerGroup};
}

void check_plan_tensor(const Tensor& plan, const SymInt& batch, const char* where) {
  check_shape(where, "plan", plan, {{"B", batch}, {"columns"}});
  check_type(where, "plan", plan, at::kLong);
}

}  // namespace

SymInt call_rows(const Tensor& plan, const SymInt& memory_rows) {
  if (plan.dim() != 2 || plan.sym_size(0) >= memory_rows || plan.sym_size(0) == 0)
    return memory_rows;
  // A device is never waited for: its kernels keep to the memory's rows.
  const bool names_none = plan.is_cpu() && plan.scalar_type() == at::kLong &&
                          plan.size(1) >= kPlanHeader && plan[0][kPlanRow].item<int64_t>() < 0;
  return names_none ? memory_rows : plan.sym_size(0);
}

SymInt plan_groups(const Schedule& schedule, const SymInt& tokens, bool resets, bool carried) {
  if (schedule.compressed == 0) return 0;
  if (!resets) return schedule.max_new_groups(tokens);
  const int64_t c = schedule.ratio, behind = carried ? schedule.max_window() : 0;
  return (tokens + (c - 1)) / c + ((behind + c - 1) / c + 1);
}

PlanTensors::PlanTensors(const Tensor& plan,
                         const SymInt& batch,
                         const SymInt& tokens,
                         const char* where)
    : plan_(plan), tokens_(tokens) {
  check_plan_tensor(plan, batch, where);
  groups_ = groups_in(plan, tokens, where);
}

Tensor PlanTensors::token(PlanToken quantity) const {
  return plan_.narrow_symint(1, int64_t{quantity} * tokens_ + int64_t{kPlanHeader}, tokens_);
}

Tensor PlanTensors::group(PlanGroup quantity) const {
  const SymInt first = tokens_ * int64_t{kPlanPerToken} + int64_t{kPlanHeader};
  return plan_.narrow_symint(1, first + int64_t{quantity} * groups_, groups_);
}

PlanRows::PlanRows(const Tensor& plan, int64_t batch, int64_t tokens, const char* where)
    : plan_(plan.contiguous()), tokens_(tokens) {
  check_plan_tensor(plan, batch, where);
  groups_ = groups_in(plan, tokens, where).expect_int();
  data_ = plan_.const_data_ptr<int64_t>();
  width_ = plan_.size(1);
}

Tensor plan(const Tensor& seen,
            const OptionalTensor& lengths,
            const OptionalTensor& reset_at,
            const SymInt& tokens,
            at::IntArrayRef settings,
            bool carried,
            const OptionalTensor& rows) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("ctx::plan", "").typed<decltype(make_plan)>();
  return op.call(seen, lengths, reset_at, tokens, settings, carried, rows);
}

void advance_(const Tensor& seen,
              const Tensor& rewindable,
              const Tensor& plan,
              const SymInt& max_rewind) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::advance_", "")
                             .typed<decltype(advance_clock)>();
  op.call(seen, rewindable, plan, max_rewind);
}

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def(
      "plan(Tensor seen, Tensor? lengths, Tensor? reset_at, SymInt tokens, int[] settings, bool "
      "carried, Tensor? rows=None) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("advance_(Tensor(a!) seen, Tensor(b!) rewindable, Tensor plan, SymInt max_rewind) -> ()",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CompositeExplicitAutograd, m) {
  m.impl("plan", make_plan);
  m.impl("advance_", advance_clock);
}

TORCH_LIBRARY_IMPL(ctx, Meta, m) {
  m.impl("plan", plan_meta);
  m.impl("advance_", advance_meta);
}

}  // namespace ctx::ops
