// How attention is cut into blocks, and its launches. All sizes follow from shapes, none from what a
// memory holds, so that a CUDA graph can hold them.
#pragma once

#include "kernels/cuda/attend_merge.cuh"
#include "kernels/cuda/attend_mma.cuh"
#include "kernels/cuda/attention_build.cuh"

namespace ctx::cuda {

// Keys that a block of a decode step takes: partial sums are then below a twentieth of the traffic.
inline int64_t default_split_length(const Attention& a) {
  int64_t smallest = size_of(a.storage);
  for (int p = 0; p < a.parts; ++p)
    smallest = size_of(a.part[p].storage) < smallest ? size_of(a.part[p].storage) : smallest;
  int64_t length = 128;
  while (length < 80 * a.q_per_kv() / smallest) length *= 2;
  return length;
}

// Few enough for one tile of rows; the heads of a kv head may need several.
inline bool has_few_queries(const Attention& a) {
  const int64_t heads = a.q_per_kv() < kMmaRows ? a.q_per_kv() : kMmaRows;
  return a.tokens * heads <= kMmaRows;
}

// Few queries: parts are cut into splits of `length` keys (0: the default).
inline void set_splits(Attention& a, int64_t length) {
  if (length == 0) length = default_split_length(a);
  int64_t keys = 0;
  a.splits = 0;
  for (int p = 0; p < a.parts; ++p) {
    keys += a.part[p].size;
    a.splits += (a.part[p].size + length - 1) / length;
  }
  a.split_length = length;
  if (!has_few_queries(a) || keys <= length || a.splits > 65535) a.split_length = 0, a.splits = 1;
}

inline int64_t arithmetic_size(const Attention& a) {
  return a.storage == Storage::kFloat64 ? 8 : 4;
}
inline int64_t rows_of(const Attention& a) { return a.batch * a.heads * a.tokens; }
inline int64_t partial_bytes(const Attention& a) {
  if (a.split_length == 0) return 0;
  return (rows_of(a) * a.splits * (a.value_dim + 1 + kRegions) * arithmetic_size(a) + 15) / 16 * 16;
}

template <typename T, int R>
void launch_core_rows(const Attention& a, cudaStream_t stream) {
  CoreLaunch l{};
  l.a = a;
  const int64_t q_per_kv = a.q_per_kv();
  const int64_t head_tiles = (q_per_kv + R - 1) / R;
  l.head_tiles = static_cast<int>(head_tiles);
  l.tile_heads = static_cast<int>((q_per_kv + head_tiles - 1) / head_tiles);
  const int64_t fit = head_tiles > 1 ? 1 : R / l.tile_heads;
  l.tile_tokens = static_cast<int>(fit < a.tokens ? fit : a.tokens);
  for (int p = 0; p < a.parts; ++p) {
    const int64_t key = CoreLayout(row_bytes(a.part[p].storage, a.head_dim)).stride;
    const int64_t value = CoreLayout(row_bytes(a.part[p].storage, a.value_dim)).stride;
    l.key_stride = key > l.key_stride ? key : l.key_stride;
    l.value_stride = value > l.value_stride ? value : l.value_stride;
  }
  constexpr int64_t kMost = 200 * 1024;
  l.stages = 2;
  if (CoreRoom(l, R, sizeof(Acc<T>)).all > kMost) l.stages = 1;
  const int64_t shared = CoreRoom(l, R, sizeof(Acc<T>)).all;
  constexpr int64_t kColumns = 16 / static_cast<int64_t>(sizeof(T)) * kCoreThreads;
  if (shared > kMost || a.value_dim > kColumns)
    throw std::runtime_error(
        "ctx: attention on CUDA: head_dim and value_dim must be smaller, got " +
        std::to_string(a.head_dim) + " and " + std::to_string(a.value_dim));
  const int64_t tiles = (a.tokens + l.tile_tokens - 1) / l.tile_tokens;
  launch(&attend_core<T, R>,
         grid_of(tiles * head_tiles, a.kv_heads * a.batch, a.splits),
         kCoreThreads,
         shared,
         stream,
         l);
}

template <typename T>
void launch_core_type(const Attention& a, cudaStream_t stream) {
  const int64_t rows = a.q_per_kv() * a.tokens;
  if (rows <= 1) return launch_core_rows<T, 1>(a, stream);
  if (rows <= 2) return launch_core_rows<T, 2>(a, stream);
  if (rows <= 4) return launch_core_rows<T, 4>(a, stream);
  launch_core_rows<T, 8>(a, stream);
}

// Whether mma takes this: its types, sizes and alignment, and enough rows to be worth it.
inline bool fits_mma(const Attention& a) {
  const bool half = a.storage == Storage::kBFloat16 || a.storage == Storage::kFloat16;
  if (!half || a.head_dim % 16 != 0 || a.value_dim % 16 != 0) return false;
  if (a.head_dim > 256 || a.value_dim > 128 || a.relative.dim > 0) return false;
  if (a.q_per_kv() * a.tokens < 4) return false;
  if (a.slopes != nullptr && a.slot_positions != nullptr) return false;
  for (int p = 0; p < a.parts; ++p) {
    const Part& part = a.part[p];
    if (part.storage != a.storage && part.storage != Storage::kInt8) return false;
    const int64_t align = part.storage == Storage::kInt8 ? 4 : 16;
    for (const Strided* x : {&part.keys, &part.values}) {
      const auto at = static_cast<int64_t>(reinterpret_cast<uintptr_t>(x->data) % 16);
      if (at % align != 0 || x->batch % align != 0 || x->head % align != 0 || x->token % align != 0)
        return false;
    }
  }
  return true;
}

template <typename T, int kValues, bool kByKeys>
void launch_mma_tile(const Attention& a, cudaStream_t stream) {
  constexpr int kRows = MmaBlock<T, kValues, kByKeys>::kRows;
  MmaLaunch l{};
  l.a = a;
  const int64_t q_per_kv = a.q_per_kv();
  const int64_t head_tiles = (q_per_kv + kRows - 1) / kRows;
  l.head_tiles = static_cast<int>(head_tiles);
  l.tile_heads = static_cast<int>((q_per_kv + head_tiles - 1) / head_tiles);
  const int64_t fit = head_tiles > 1 ? 1 : kRows / l.tile_heads;
  l.tile_tokens = static_cast<int>(fit < a.tokens ? fit : a.tokens);
  for (int p = 0; p < a.parts; ++p) l.has_int8 = l.has_int8 || a.part[p].storage == Storage::kInt8;
  const int64_t tiles = (a.tokens + l.tile_tokens - 1) / l.tile_tokens;
  launch(&attend_mma<T, kValues, kByKeys>,
         grid_of(tiles * head_tiles, a.kv_heads * a.batch, a.splits),
         kMmaThreads,
         MmaRoom(a, kRows, l.has_int8).all,
         stream,
         l);
}

template <typename T>
void launch_mma_type(const Attention& a, cudaStream_t stream) {
  const bool few = has_few_queries(a);
  if (a.value_dim <= 64) {
    few ? launch_mma_tile<T, 64, true>(a, stream) : launch_mma_tile<T, 64, false>(a, stream);
  } else {
    few ? launch_mma_tile<T, 128, true>(a, stream) : launch_mma_tile<T, 128, false>(a, stream);
  }
}

// Compiled once each, in files of their own (attend_core_*.cu, attend_mma_*.cu).
#if defined(__CUDACC__) && !defined(CTX_CUDA_ATTENTION_UNIT)
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
