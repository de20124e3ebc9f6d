#include "kernels/cuda/compress_launch.cuh"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/table.h"

namespace ctx::cuda {

void compress(const CompressArgs& args) {
  const Launching launching(args.memory.device, compress_workspace(args));
  compress(args, launching.workspace(), launching.stream());
}

}  // namespace ctx::cuda
