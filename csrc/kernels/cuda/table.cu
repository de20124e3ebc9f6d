#include "kernels/cuda/table.h"

namespace ctx::cuda {

const Kernels kTable = {"CUDA",
                        /*host_reads=*/false,
                        &plan,
                        &advance,
                        &rotate,
                        &append,
                        &compress,
                        &attend,
                        &spans_forward,
                        &spans_backward};

}  // namespace ctx::cuda
