#include "kernels/cuda/runtime.h"
#include "kernels/cuda/spans_backward.cuh"
#include "kernels/cuda/table.h"

namespace ctx::cuda {

void spans_backward(const SpansBackwardArgs& args) {
  const Launching launching(args.forward.device, backward_workspace(args));
  spans_backward(args, launching.workspace(), launching.stream());
}

}  // namespace ctx::cuda
