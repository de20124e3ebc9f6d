// Launches of the compressors, and the workspace that they need.
#pragma once

#include <algorithm>

#include "kernels/cuda/choose.cuh"

namespace ctx::cuda {

inline int64_t compress_shared(const CompressArgs& args) {
  const int64_t arithmetic = args.memory.storage == Storage::kFloat64 ? 8 : 4;
  if (args.kind == CompressorKind::kMostUsed) return ChooserRoom(args).bytes(arithmetic);
  return GroupRoom(args).size() * arithmetic;
}

// Bytes of device memory that compress() needs; follows from sizes alone.
inline int64_t compress_workspace(const CompressArgs& args) {
  const MemoryView& m = args.memory;
  const int64_t bytes = compress_shared(args);
  if (m.compressed_capacity == 0 || bytes <= static_cast<int64_t>(kMostShared)) return 0;
  const bool chooses = args.kind == CompressorKind::kMostUsed;
  return m.batch * m.kv_heads * (chooses ? 1 : most_groups(args)) * bytes;
}

// With the pairs of a block of one token, where they are given.
inline void compress(const CompressArgs& args,
                     void* workspace,
                     cudaStream_t stream,
                     const AppendArgs* pairs = nullptr) {
  const MemoryView& m = args.memory;
  if (m.compressed_capacity == 0 || args.block.tokens == 0) return;
  const bool in_shared = compress_workspace(args) == 0;
  CompressLaunch what{args, most_groups(args), in_shared ? nullptr : workspace};
  size_t shared = in_shared ? compress_shared(args) : 0;
  if (pairs != nullptr) {
    what.append = *pairs, what.appended = 1;
    shared = std::max(shared, append_shared(m));
  }
  dispatch(m.storage, [&](auto type) {
    using T = decltype(type);
    if (args.kind == CompressorKind::kMostUsed)
      return launch(
          &choose_kernel<T>, grid_of(m.kv_heads, m.batch), kCompressThreads, shared, stream, what);
    const dim3 grid = grid_of(what.appended + m.kv_heads * what.groups, m.batch);
    if (args.wide_parameters) {
      launch(&compress_kernel<T, Acc<T>>, grid, kCompressThreads, shared, stream, what);
    } else {
      launch(&compress_kernel<T, T>, grid, kCompressThreads, shared, stream, what);
    }
  });
}

inline void write(const AppendArgs& pairs,
                  const CompressArgs& groups,
                  void* workspace,
                  cudaStream_t stream) {
  const MemoryView& m = groups.memory;
  const bool together = groups.block.tokens == 1 && m.compressed_capacity > 0 && m.kv_heads > 0 &&
                        groups.kind != CompressorKind::kMostUsed;
  if (!together) append(pairs, stream);
  compress(groups, workspace, stream, together ? &pairs : nullptr);
}

}  // namespace ctx::cuda
