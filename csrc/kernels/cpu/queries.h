// The queries of a block, rotated to the three clocks and scaled, and what their slots are made of.
#pragma once

#include <ATen/Parallel.h>

#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/rotary.h"
#include "kernels/cpu/simd.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

// [regions, B, Hkv, tokens, q_per_kv, row_width of D]: the rows that a kv head's slots are read for lie
// together, in the order of the region's slots (load_as). Tokens before the stream or past a row's length are not filled in.
template <typename A>
class RotatedQueries {
 public:
  RotatedQueries(const AttendArgs& args, std::vector<A>& storage)
      : args_(args),
        q_per_kv_(args.heads / args.memory.kv_heads),
        width_(row_width<A>(args.memory.head_dim)),
        storage_(storage) {
    const int64_t size = kRegions * args.memory.batch * args.block.tokens * args.heads * width_;
    const int64_t relative =
        2 * args.memory.batch * args.block.tokens * args.heads * args.relative.dim;
    if (static_cast<int64_t>(storage.size()) < size + relative) storage.resize(size + relative);
    relative_ = storage.data() + size;
  }

  // `q_per_kv` rows for every token from i on.
  A* rows(int64_t region, int64_t b, int64_t kv, int64_t i) const {
    const MemoryView& m = args_.memory;
    const int64_t head = (region * m.batch + b) * m.kv_heads + kv;
    return storage_.data() + (head * args_.block.tokens + i) * q_per_kv_ * width_;
  }

  // The same of the relative queries, [.., relative.dim] and scaled, not rotated: one set for slots,
  // one for the other regions.
  A* relative_rows(int64_t region, int64_t b, int64_t kv, int64_t i) const {
    const MemoryView& m = args_.memory;
    const int64_t head = ((region == kCompressed) * m.batch + b) * m.kv_heads + kv;
    return relative_ + (head * args_.block.tokens + i) * q_per_kv_ * args_.relative.dim;
  }

  template <typename T>
  void fill() {
    const int64_t tokens = args_.block.tokens;
    at::parallel_for(0,
                     args_.memory.batch * tokens,
                     grain(args_.heads * width_ * 6),
                     [&](int64_t begin, int64_t end) {
                       for (int64_t task = begin; task < end; ++task)
                         fill_token<T>(task / tokens, task % tokens);
                     });
  }

 private:
  template <typename T>
  void fill_token(int64_t b, int64_t i) {
    const MemoryView& m = args_.memory;
    const int64_t t = args_.block.first(b) + i;
    if (t < 0 || i >= args_.block.count(b)) return;
    const Ranges seen = visible(m.clock.schedule, t);
    if (args_.relative.dim > 0) fill_relative<T>(b, i);
    for (int64_t region = 0; region < kRegions; ++region) {
      if (seen[region].size() == 0) continue;
      const Storage storage = region == kCompressed ? m.compressed_storage : m.storage;
      const bool splits = storage == Storage::kBFloat16;
      const auto table =
          rotary_table<A>(m.rotary, static_cast<double>(query_clock(m.clock, region, t)));
      for (int64_t h = 0; h < args_.heads; ++h) {
        A* query = rows(region, b, h / q_per_kv_, i) + h % q_per_kv_ * width_;
        load_row(row<T>(args_.queries, b, h, args_.block.offset + i), query, m.head_dim);
        std::fill(query + m.head_dim, query + width_, A(0));
        rotate_row(m.rotary, table, Rotation::kTo, query);
        scale_row(static_cast<A>(args_.scale), query, m.head_dim);
        if (splits) split_row(query);
      }
    }
  }

  template <typename T>
  void fill_relative(int64_t b, int64_t i) {
    const RelativeQueries& r = args_.relative;
    for (const Region region : {kCompressed, kWindow}) {
      const Strided& from = region == kCompressed ? r.compressed : r.queries;
      if (from.data == nullptr) continue;
      for (int64_t h = 0; h < args_.heads; ++h) {
        A* query = relative_rows(region, b, h / q_per_kv_, i) + h % q_per_kv_ * r.dim;
        load_row(row<T>(from, b, h, args_.block.offset + i), query, r.dim);
        scale_row(static_cast<A>(args_.scale), query, r.dim);
      }
    }
  }

  void split_row([[maybe_unused]] A* row) const {
    if constexpr (std::is_same_v<A, float>) {
      for (int64_t d = 0; d < width_; d += 2 * kLanes<A>) {
        const Pair<A> x = load_as<c10::BFloat16>(row + d);
        store(row + d, x.first);
        store(row + d + kLanes<A>, x.second);
      }
    }
  }

  const AttendArgs& args_;
  int64_t q_per_kv_;
  int64_t width_;
  std::vector<A>& storage_;
  A* relative_;
};

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
