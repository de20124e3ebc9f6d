#include "kernels/cuda/table.h"

namespace ctx::cuda {

const Kernels kTable = {"CUDA",
                        /*host_reads=*/false,
                        &plan,
                        &advance,
                        &rotate,
                        &write,
                        &attend,
                        &spans_forward,
                        &spans_backward};

}  // namespace ctx::cuda
