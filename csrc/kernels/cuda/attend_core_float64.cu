// One type of the plain attention kernels, which take long to compile.
#include "kernels/cuda/attend_core_launch.cuh"

namespace ctx::cuda {

template void launch_core_type<double>(const Attention&, cudaStream_t);

}  // namespace ctx::cuda
