// ctx::plan and ctx::advance_ out of torch's own operators, and what both ways check.
#pragma once

#include "ops/plan.h"

namespace ctx::ops {

inline constexpr const char* kPlanName = "ctx.plan";

// What a schedule says of the keys that precede the call's in each span.
struct Behind {
  int64_t tokens, slots, sinks;
  Behind(const Schedule& s, bool carried)
      : tokens(carried ? s.max_window() : 0),
        slots(carried ? s.compressed : 0),
        sinks(carried ? s.sinks : 0) {}
};

Schedule check_plan(const at::Tensor& seen,
                    const std::optional<at::Tensor>& lengths,
                    const std::optional<at::Tensor>& reset_at,
                    const c10::SymInt& tokens,
                    at::IntArrayRef settings);
void check_advance(const at::Tensor& seen, const at::Tensor& rewindable, const at::Tensor& plan);

// For any device: no number of it is read here.
at::Tensor plan_composite(const at::Tensor& seen,
                          const std::optional<at::Tensor>& lengths,
                          const std::optional<at::Tensor>& reset_at,
                          c10::SymInt tokens,
                          at::IntArrayRef settings,
                          bool carried);
void advance_composite(const at::Tensor& seen,
                       const at::Tensor& rewindable,
                       const at::Tensor& plan,
                       c10::SymInt max_rewind);

}  // namespace ctx::ops
