#include "kernels/cuda/attend_launch.cuh"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/table.h"

namespace ctx::cuda {

void spans_forward(const SpansArgs& args) {
  const Launching launching(args.device, 0);
  spans_forward(args, launching.stream());
}

}  // namespace ctx::cuda
