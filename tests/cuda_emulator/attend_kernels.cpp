// The attention kernels of every type for the emulator: see attend_kernels.h.
#include "kernels/cuda/attend_core_bfloat16.cu"
#include "kernels/cuda/attend_core_float16.cu"
#include "kernels/cuda/attend_core_float32.cu"
#include "kernels/cuda/attend_core_float64.cu"
#include "kernels/cuda/attend_mma_bfloat16.cu"
#include "kernels/cuda/attend_mma_float16.cu"
