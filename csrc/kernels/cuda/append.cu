#include "kernels/cuda/append.cuh"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/table.h"

namespace ctx::cuda {

void append(const AppendArgs& args) {
  const Launching launching(args.memory.device, 0);
  append(args, launching.stream());
}

}  // namespace ctx::cuda
