#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/table.h"

namespace ctx::cuda {

void plan(const PlanArgs& args) {
  const Launching launching(args.device, 0);
  plan(args, launching.stream());
}

void advance(const AdvanceArgs& args) {
  const Launching launching(args.device, 0);
  advance(args, launching.stream());
}

}  // namespace ctx::cuda
