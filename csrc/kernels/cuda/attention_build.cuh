// From the seam's arguments to an Attention, on the host.
#pragma once

#include "kernels/cuda/attention.cuh"

namespace ctx::cuda {

inline Strided in_bytes(const Strided& x, int64_t size) {
  return {x.data, x.batch * size, x.head * size, x.token * size};
}
inline Strided moved(Strided x, int64_t tokens, int64_t size) {
  if (x.data != nullptr) x.data = static_cast<char*>(x.data) + tokens * x.token * size;
  return x;
}
// Rows of a contiguous ring [B, heads, capacity, width]; strides count bytes.
inline Strided ring_rows(void* data, int64_t heads, int64_t capacity, int64_t bytes) {
  return {data, heads * capacity * bytes, capacity * bytes, bytes};
}

// Places in a part are 32-bit numbers.
inline int64_t checked_size(int64_t size) {
  if (size >= int64_t{1} << 30)
    throw std::runtime_error(
        "ctx: attention on CUDA: a region must have fewer than 2^30 keys, got " +
        std::to_string(size));
  return size;
}

inline Attention attention_of(const AttendArgs& args) {
  const MemoryView& m = args.memory;
  const int64_t size = size_of(m.storage), offset = args.block.offset;
  Attention a{};
  a.clock = m.clock, a.rotary = m.rotary, a.storage = m.storage;
  a.batch = m.batch, a.heads = args.heads, a.kv_heads = m.kv_heads, a.tokens = args.block.tokens;
  a.head_dim = m.head_dim, a.value_dim = m.value_dim;
  a.scale = args.scale, a.softcap = args.logit_softcap;
  a.bias = args.bias, a.slopes = args.slopes;
  a.queries = moved(args.queries, offset, size), a.out = moved(args.out, offset, size);
  a.relative = args.relative;
  a.relative.queries = moved(args.relative.queries, offset, size);
  a.relative.compressed = moved(args.relative.compressed, offset, size);
  a.block = args.block;
  a.slot_positions = m.slot_positions;
  a.region_weights = args.region_weights, a.call_tokens = args.call_tokens, a.offset = offset;
  void* const keys[] = {m.sink_keys, m.compressed_keys, m.window_keys};
  void* const values[] = {m.sink_values, m.compressed_values, m.window_values};
  const int64_t capacity[] = {m.clock.schedule.sinks, m.compressed_capacity, m.window_capacity};
  for (int region = 0; region < kRegions; ++region) {
    if (capacity[region] == 0) continue;
    const Storage stored = region == kCompressed ? m.compressed_storage : m.storage;
    Part& p = a.part[a.parts++];
    p = Part{};
    p.kind = Part::kRing, p.region = region, p.storage = stored;
    p.size = p.capacity = checked_size(capacity[region]);
    p.keys = ring_rows(keys[region], m.kv_heads, p.capacity, row_bytes(stored, m.head_dim));
    p.values = ring_rows(values[region], m.kv_heads, p.capacity, row_bytes(stored, m.value_dim));
    if (region == kCompressed) p.ring_mass = m.slot_mass;
  }
  return a;
}

inline Attention attention_of(const SpansArgs& args) {
  const int64_t size = size_of(args.storage);
  Attention a{};
  a.clock = args.clock, a.rotary = args.rotary, a.storage = args.storage;
  a.batch = args.batch, a.heads = args.heads, a.kv_heads = args.kv_heads, a.tokens = args.tokens;
  a.head_dim = args.head_dim, a.value_dim = args.value_dim;
  a.scale = args.scale, a.softcap = args.logit_softcap;
  a.bias = args.bias, a.slopes = args.slopes;
  a.queries = args.queries, a.out = args.out, a.relative = args.relative;
  a.position = args.position;
  a.logsumexp = args.logsumexp;
  a.region_weights = args.region_weights, a.call_tokens = args.tokens;
  for (int region = 0; region < kRegions; ++region) {
    const Span& span = args.spans[region];
    const PastSpan& past = span.past;
    a.first[region] = span.first;
    if (past.size > 0 && past.capacity > 0) {
      Part& p = a.part[a.parts++];
      p = Part{};
      p.kind = Part::kPast, p.region = region, p.storage = past.storage;
      p.size = past.size < past.capacity ? past.size : past.capacity;
      p.capacity = checked_size(past.capacity), p.first = past.first, p.rows = past.rows;
      p.keys =
          ring_rows(past.keys, args.kv_heads, p.capacity, row_bytes(past.storage, args.head_dim));
      p.values = ring_rows(
          past.values, args.kv_heads, p.capacity, row_bytes(past.storage, args.value_dim));
      p.ring_mass = past.mass;
    }
    if (span.size > past.size) {
      Part& p = a.part[a.parts++];
      p = Part{};
      p.kind = Part::kFresh, p.region = region, p.storage = args.storage;
      p.size = checked_size(span.size) - past.size, p.before = past.size;
      p.keys = in_bytes(span.keys, size), p.values = in_bytes(span.values, size);
      p.fresh_mass = span.mass;
    }
  }
  return a;
}

}  // namespace ctx::cuda
