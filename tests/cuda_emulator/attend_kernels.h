// The attention kernels of every type are compiled once, in attend_kernels.cpp, for all programs that
// include this header before any launch, as nvcc compiles them in files of their own.
#pragma once

#include "kernels/cuda/attend_core_launch.cuh"
#include "kernels/cuda/attend_mma_launch.cuh"

namespace ctx::cuda {

extern template void launch_core_type<float>(const Attention&, cudaStream_t);
extern template void launch_core_type<double>(const Attention&, cudaStream_t);
extern template void launch_core_type<BFloat16>(const Attention&, cudaStream_t);
extern template void launch_core_type<Half>(const Attention&, cudaStream_t);
extern template void launch_mma_type<BFloat16>(const Attention&, cudaStream_t);
extern template void launch_mma_type<Half>(const Attention&, cudaStream_t);

}  // namespace ctx::cuda
