#include "kernels/cuda/compress_launch.cuh"
#include "kernels/cuda/runtime.h"
#include "kernels/cuda/table.h"

namespace ctx::cuda {

void write(const AppendArgs& pairs, const CompressArgs& groups) {
  const Launching launching(pairs.memory.device, compress_workspace(groups));
  write(pairs, groups, launching.workspace(), launching.stream());
}

}  // namespace ctx::cuda
