#include "ctx/schedule.h"

#include "core/settings.h"
#include "ops/check.h"

namespace ctx {

void check_size(const char* where, const char* name, int64_t size, int64_t least) {
  CTX_CHECK_VALUE(size >= least && size <= Schedule::kLimit,
                  where,
                  name,
                  " must be between ",
                  least,
                  " and ",
                  Schedule::kLimit,
                  ", got ",
                  size);
}

void Schedule::validate() const {
  check_size("ctx.Schedule", "window", window, 0);
  check_size("ctx.Schedule", "compressed", compressed, 0);
  check_size("ctx.Schedule", "ratio", ratio, 1);
  check_size("ctx.Schedule", "segment", segment, 1);
  check_size("ctx.Schedule", "sinks", sinks, 0);
  check_size("ctx.Schedule", "overlap", overlap, 0);
}

}  // namespace ctx
