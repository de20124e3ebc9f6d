// The launches of attention, and the workspace that it needs.
#pragma once

#include "kernels/cuda/attend_merge.cuh"
#include "kernels/cuda/attend_split.cuh"
#include "kernels/cuda/attention_build.cuh"
#if !defined(__CUDACC__)
#include "kernels/cuda/attend_core_launch.cuh"
#include "kernels/cuda/attend_mma_launch.cuh"
#endif

namespace ctx::cuda {

#if defined(__CUDACC__)
// They take long to compile: once each, in files of their own (attend_core_*.cu, attend_mma_*.cu).
template <typename T>
void launch_core_type(const Attention& a, cudaStream_t stream);
template <typename T>
void launch_mma_type(const Attention& a, cudaStream_t stream);
extern template void launch_core_type<float>(const Attention&, cudaStream_t);
extern template void launch_core_type<double>(const Attention&, cudaStream_t);
extern template void launch_core_type<BFloat16>(const Attention&, cudaStream_t);
extern template void launch_core_type<Half>(const Attention&, cudaStream_t);
extern template void launch_mma_type<BFloat16>(const Attention&, cudaStream_t);
extern template void launch_mma_type<Half>(const Attention&, cudaStream_t);
#endif

inline void launch_core(const Attention& a, cudaStream_t stream) {
  dispatch(a.storage, [&](auto type) { launch_core_type<decltype(type)>(a, stream); });
}

inline void launch_mma(const Attention& a, cudaStream_t stream) {
  if (a.storage == Storage::kBFloat16) {
    launch_mma_type<BFloat16>(a, stream);
  } else {
    launch_mma_type<Half>(a, stream);
  }
}

inline void launch_merge(const Attention& a, cudaStream_t stream) {
  dispatch(a.storage, [&](auto type) {
    launch(&merge_kernel<decltype(type)>, grid_of(rows_of(a)), kMergeThreads, 0, stream, a);
  });
}

inline void launch_usage(const Attention& a, void* usage, cudaStream_t stream) {
  for (int p = 0; p < a.parts; ++p) {
    if (a.part[p].region != kWindow) continue;
    const UsageLaunch l{a, p, usage};
    const int64_t blocks = (a.part[p].size + kMergeThreads - 1) / kMergeThreads;
    dispatch(a.storage, [&](auto type) {
      using T = decltype(type);
      launch(&usage_kernel<T>,
             grid_of(blocks, a.kv_heads * a.batch),
             kMergeThreads,
             a.q_per_kv() * a.head_dim * sizeof(Acc<T>),
             stream,
             l);
    });
  }
}

inline bool is_empty(const Attention& a) { return rows_of(a) == 0 || a.kv_heads == 0; }

// Bytes of device memory that attend() needs.
inline int64_t attend_workspace(const AttendArgs& args, int64_t split_length = 0) {
  Attention a = attention_of(args);
  if (is_empty(a)) return 0;
  set_splits(a, split_length);
  return partial_bytes(a) + (args.count_usage ? rows_of(a) * arithmetic_size(a) : 0);
}

inline void run_attention(Attention& a, cudaStream_t stream) {
  fits_mma(a) ? launch_mma(a, stream) : launch_core(a, stream);
  if (a.split_length > 0) launch_merge(a, stream);
}

inline void attend(const AttendArgs& args,
                   void* workspace,
                   cudaStream_t stream,
                   int64_t split_length = 0) {
  Attention a = attention_of(args);
  if (is_empty(a)) return;
  set_splits(a, split_length);
  a.workspace = workspace;
  if (args.count_usage) a.logsumexp = static_cast<char*>(workspace) + partial_bytes(a);
  run_attention(a, stream);
  if (args.count_usage) launch_usage(a, args.memory.usage, stream);
}

inline void spans_forward(const SpansArgs& args, cudaStream_t stream) {
  Attention a = attention_of(args);
  if (is_empty(a)) return;
  a.splits = 1;
  run_attention(a, stream);
}

}  // namespace ctx::cuda
