#include "kernels/cuda/rotary_kernel.cuh"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/table.h"

namespace ctx::cuda {

void rotate(const RotateArgs& args) {
  const Launching launching(args.device, 0);
  rotate(args, launching.stream());
}

}  // namespace ctx::cuda
