// ctx::plan and ctx::advance_: registration, checks, and on the CPU one loop over rows.
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>

#include "ops/check.h"
#include "ops/kernels.h"
#include "ops/plan_ways.h"
#include "ops/rings.h"
#include "ops/settings.h"
#include "ops/shapes.h"
#include "ops/state.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }

SymInt columns(const SymInt& tokens, const SymInt& groups) {
  return SymInt(int64_t{kPlanHeader}) + tokens * int64_t{kPlanPerToken} +
         groups * int64_t{kPlanPerGroup};
}

// One row of the plan.
class PlanRow {
 public:
  PlanRow(const Schedule& schedule, bool carried, int64_t tokens, int64_t groups)
      : s_(schedule),
        behind_(schedule, carried),
        tokens_(tokens),
        groups_(groups),
        start_(tokens) {}

  void fill(int64_t seen, int64_t count, const bool* resets, int64_t* row) {
    seen_ = seen;
    begun_ = s_.groups(seen - 1);
    block_ = floor_div(begun_ * s_.ratio + s_.sinks - seen, s_.ratio);
    row[kPlanSeen] = seen;
    row[kPlanCount] = count;
    row[kPlanBlock] = block_;
    row[kPlanFirstToken] = seen - behind_.tokens;
    row[kPlanFirstSlot] = begun_ - behind_.slots;
    row[kPlanFirstSink] = std::min(seen, s_.sinks) - behind_.sinks;
    row[kPlanOldestToken] = s_.first_token(begun_);
    row[kPlanOldestSlot] = std::max<int64_t>(0, s_.groups(seen) - s_.compressed);
    fill_tokens(count, resets, row + kPlanHeader);
    fill_groups(resets != nullptr, row + kPlanHeader + kPlanPerToken * tokens_);
  }

 private:
  void fill_tokens(int64_t count, const bool* resets, int64_t* row) {
    int64_t start = -seen_;
    bool carried = true;
    for (int64_t i = 0; i < tokens_; ++i) {
      if (resets != nullptr && i < count && resets[i]) start = i, carried = false;
      start_[i] = start;
      row[kPlanPosition * tokens_ + i] = i < count ? i - start : -1;
      row[kPlanTokenKey * tokens_ + i] = -start - behind_.tokens;
      row[kPlanSlotKey * tokens_ + i] =
          (carried ? begun_ : block_ - floor_div(start + s_.sinks, s_.ratio)) - behind_.slots;
      row[kPlanSinkKey * tokens_ + i] =
          (carried ? std::min(seen_, s_.sinks) : -start) - behind_.sinks;
    }
  }

  void fill_groups(bool resets, int64_t* row) {
    for (int64_t g = 0; g < groups_; ++g) {
      int64_t& place = row[kPlanPlace * groups_ + g];
      int64_t& number = row[kPlanNumber * groups_ + g];
      if (resets) {
        place = whole_group(block_ + g);
        const int64_t token = place - start_at(place) - s_.sinks;
        number = place < tokens_ && token > 0 ? token / s_.ratio : 0;
      } else {
        number = begun_ + g;
        place = number * s_.ratio + s_.sinks - seen_;
      }
    }
  }

  // Where the stream of a place of the call starts.
  int64_t start_at(int64_t place) const {
    return place < 0 ? -seen_ : place < tokens_ ? start_[place] : tokens_;
  }

  // The place in a block at which a group begins that is whole within the call; else the first.
  int64_t whole_group(int64_t block) const {
    const int64_t c = s_.ratio, first = block * c;
    for (int64_t place = first; place < std::min(first + c, tokens_); ++place) {
      const int64_t start = start_at(place);
      const int64_t token = place - start - s_.sinks;
      if (token >= 0 && token % c == 0 && start_at(place + c - 1) == start) return place;
    }
    return first;
  }

  const Schedule& s_;
  Behind behind_;
  int64_t tokens_;
  int64_t groups_;
  int64_t seen_ = 0;
  int64_t begun_ = 0;
  int64_t block_ = 0;
  std::vector<int64_t> start_;
};

Tensor plan_cpu(const Tensor& seen,
                const OptionalTensor& lengths,
                const OptionalTensor& reset_at,
                SymInt symbolic_tokens,
                at::IntArrayRef settings,
                bool carried) {
  const Schedule s = check_plan(seen, lengths, reset_at, symbolic_tokens, settings);
  const int64_t tokens = symbolic_tokens.expect_int(), batch = seen.size(0);
  check_seen(seen, kPlanName);
  check_lengths(lengths, tokens, kPlanName);
  const bool resets = reset_at.has_value() && tokens > 0;
  const int64_t groups = plan_groups(s, tokens, resets, carried).expect_int();
  const int64_t width = columns(tokens, groups).expect_int();
  const Tensor made = at::empty({batch, width}, seen.options());
  const Tensor counts = lengths ? lengths->contiguous() : Tensor();
  const Tensor begins = resets ? reset_at->contiguous() : Tensor();
  const Tensor clock = seen.contiguous();
  PlanRow row(s, carried, tokens, groups);
  for (int64_t b = 0; b < batch; ++b)
    row.fill(clock.const_data_ptr<int64_t>()[b],
             counts.defined() ? counts.const_data_ptr<int64_t>()[b] : tokens,
             resets ? begins.const_data_ptr<bool>() + b * tokens : nullptr,
             made.data_ptr<int64_t>() + b * width);
  return made;
}

Tensor plan_meta(const Tensor& seen,
                 const OptionalTensor& /*lengths*/,
                 const OptionalTensor& reset_at,
                 SymInt tokens,
                 at::IntArrayRef settings,
                 bool carried) {
  const Schedule s{settings[0], settings[1], settings[2], settings[3], settings[4], settings[5]};
  const bool resets = reset_at.has_value() && tokens > 0;
  return seen.new_empty_symint(
      {seen.sym_size(0), columns(tokens, plan_groups(s, tokens, resets, carried))});
}

// The last token's position says how long the row's stream is now.
void advance_cpu(const Tensor& seen, const Tensor& rewindable, const Tensor& plan, SymInt most) {
  check_advance(seen, rewindable, plan);
  const c10::InferenceMode writes(true);  // a memory that was made in it is written outside, too
  const Tensor rows = plan.contiguous();
  const int64_t width = rows.size(1), max_rewind = most.expect_int();
  for (int64_t b = 0; b < rows.size(0); ++b) {
    const int64_t* const row = rows.const_data_ptr<int64_t>() + b * width;
    int64_t& tokens = seen.data_ptr<int64_t>()[b * seen.stride(0)];
    int64_t& back = rewindable.data_ptr<int64_t>()[b * rewindable.stride(0)];
    const int64_t count = row[kPlanCount];
    if (count > 0) {
      tokens = row[kPlanHeader + count - 1] + 1;
      back = tokens == row[kPlanSeen] + count ? back + count : tokens;
    }
    back = std::min(back, max_rewind);
  }
  for (const Tensor& x : {seen, rewindable}) x.unsafeGetTensorImpl()->bump_version();
}

void advance_meta(const Tensor& /*seen*/,
                  const Tensor& /*rewindable*/,
                  const Tensor& /*plan*/,
                  SymInt /*max_rewind*/) {}

SymInt groups_in(const Tensor& plan, const SymInt& tokens, const char* where) {
  const SymInt left = plan.sym_size(1) - int64_t{kPlanHeader} - tokens * int64_t{kPlanPerToken};
  CTX_CHECK_VALUE(left >= 0 && left % int64_t{kPlanPerGroup} == 0,
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

Schedule check_plan(const Tensor& seen,
                    const OptionalTensor& lengths,
                    const OptionalTensor& reset_at,
                    const SymInt& tokens,
                    at::IntArrayRef settings) {
  check_shape(kPlanName, "seen", seen, {{"B"}});
  check_type(kPlanName, "seen", seen, at::kLong);
  CTX_CHECK_VALUE(tokens >= 0, kPlanName, "tokens must be at least 0, got ", tokens);
  check_rows(seen, tokens, lengths, reset_at, kPlanName);
  CTX_CHECK_VALUE(settings.size() > 5, kPlanName, "settings must be 12 integers, got ", settings);
  const Schedule schedule{
      settings[0], settings[1], settings[2], settings[3], settings[4], settings[5]};
  schedule.validate();
  return schedule;
}

void check_advance(const Tensor& seen, const Tensor& rewindable, const Tensor& plan) {
  constexpr const char* where = "ctx.advance_";
  for (const auto& [x, name] : {std::pair{seen, "seen"}, {rewindable, "rewindable"}}) {
    check_shape(where, name, x, {{"B", plan.sym_size(0)}});
    check_type(where, name, x, at::kLong);
  }
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
            bool carried) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("ctx::plan", "").typed<decltype(plan_cpu)>();
  return op.call(seen, lengths, reset_at, tokens, settings, carried);
}

void advance_(const Tensor& seen,
              const Tensor& rewindable,
              const Tensor& plan,
              const SymInt& max_rewind) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::advance_", "")
                             .typed<decltype(advance_cpu)>();
  op.call(seen, rewindable, plan, max_rewind);
}

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def(
      "plan(Tensor seen, Tensor? lengths, Tensor? reset_at, SymInt tokens, int[] settings, bool "
      "carried) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("advance_(Tensor(a!) seen, Tensor(b!) rewindable, Tensor plan, SymInt max_rewind) -> ()",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CompositeExplicitAutograd, m) {
  m.impl("plan", plan_composite);
  m.impl("advance_", advance_composite);
}

TORCH_LIBRARY_IMPL(ctx, CPU, m) {
  m.impl("plan", plan_cpu);
  m.impl("advance_", advance_cpu);
}

TORCH_LIBRARY_IMPL(ctx, Meta, m) {
  m.impl("plan", plan_meta);
  m.impl("advance_", advance_meta);
}

}  // namespace ctx::ops
