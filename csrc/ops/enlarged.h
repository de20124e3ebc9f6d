// A memory with more spare entries, for the time of one call: blocks of a long call are as long as is
// fast, however few tokens the memory itself can take back.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "ops/memory.h"
#include "ops/plan.h"

namespace ctx::ops {

class Enlarged {
 public:
  // Copies what the call's queries may see, or what its groups read.
  Enlarged(const Memory& memory, const PlanRows& plan, const char* where);

  // Whether a call is longer than the memory's spare entries, which are few.
  static bool pays(const Memory& memory, const PlanRows& plan);

  const Memory& memory() const { return *large_; }

  // Copies back what the call wrote and the memory holds after it.
  void finish(const PlanRows& plan) const;

 private:
  const Memory& memory_;
  std::optional<Memory> large_;
};

}  // namespace ctx::ops
