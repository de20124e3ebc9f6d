#include "kernels/cuda/attend_launch.cuh"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/table.h"

namespace ctx::cuda {

void attend(const AttendArgs& args) {
  const Launching launching(args.memory.device, attend_workspace(args));
  attend(args, launching.workspace(), launching.stream());
}

}  // namespace ctx::cuda
