#include "kernels/cuda/table.h"

namespace ctx::cuda {

const Kernels kTable = {
    "CUDA", &rotate, &append, &compress, &attend, &spans_forward, &spans_backward};

}  // namespace ctx::cuda
