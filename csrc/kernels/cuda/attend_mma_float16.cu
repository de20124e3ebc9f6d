// One type of the mma attention kernels, which take long to compile.
#include "kernels/cuda/attend_mma_launch.cuh"

namespace ctx::cuda {

template void launch_mma_type<Half>(const Attention&, cudaStream_t);

}  // namespace ctx::cuda
