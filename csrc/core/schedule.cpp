#include "ctx/schedule.h"

#include "ops/check.h"

namespace ctx {
namespace {

void check_range(const char* name, int64_t value, int64_t least) {
  CTX_CHECK_VALUE(value >= least && value <= Schedule::kLimit,
                  "ctx.Schedule",
                  name,
                  " must be between ",
                  least,
                  " and ",
                  Schedule::kLimit,
                  ", got ",
                  value);
}

}  // namespace

void Schedule::validate() const {
  check_range("window", window, 0);
  check_range("compressed", compressed, 0);
  check_range("ratio", ratio, 1);
  check_range("segment", segment, 1);
  check_range("sinks", sinks, 0);
  check_range("overlap", overlap, 0);
}

}  // namespace ctx
