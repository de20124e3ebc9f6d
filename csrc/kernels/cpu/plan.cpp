#include "kernels/cpu/table.h"
#include "ops/plan_layout.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

void plan(const PlanArgs& args) {
  for (int64_t b = 0; b < args.batch; ++b) {
    const PlanRow row(args, b);
    row.fill_header();
    row.fill_tokens(0, args.tokens, row.carried_start());
    row.fill_groups(0, args.groups);
  }
}

void advance(const AdvanceArgs& args) {
  for (int64_t b = 0; b < args.batch; ++b) advance_row(args, b);
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
