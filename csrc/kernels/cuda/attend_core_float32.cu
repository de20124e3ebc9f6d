// One type of the plain attention kernels, which take long to compile.
#define CTX_CUDA_ATTENTION_UNIT
#include "kernels/cuda/attend_launch.cuh"

namespace ctx::cuda {

template void launch_core_type<float>(const Attention&, cudaStream_t);

}  // namespace ctx::cuda
