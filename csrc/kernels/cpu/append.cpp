// Pairs into the rings: a token's index is its position modulo the capacity; the first `sinks`
// tokens have a place of their own and never leave it. Keys are rotated here, once, to their own
// position, where they are not given so.
#include <ATen/Parallel.h>

#include <vector>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/rotary.h"
#include "kernels/cpu/table.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {
namespace {

template <typename T>
void append_token(const AppendArgs& args, int64_t b, int64_t i, Acc<T>* key) {
  const MemoryView& m = args.memory;
  const int64_t t = args.block.first(b) + i;
  const int64_t source = args.block.offset + i;
  const int64_t held = args.block.row(b);
  const bool sink = t < m.clock.schedule.sinks;
  const int64_t capacity = sink ? m.clock.schedule.sinks : m.window_capacity;
  const int64_t index = sink ? t : t % m.window_capacity;
  const bool rotates = m.rotary.dim > 0 && !m.rotary.keys_rotated;
  const RotaryTable<Acc<T>> table =
      rotates ? rotary_table<Acc<T>>(m.rotary, static_cast<double>(t)) : RotaryTable<Acc<T>>{};
  for (int64_t h = 0; h < m.kv_heads; ++h) {
    load_row(row<T>(args.keys, b, h, source), key, m.head_dim);
    if (rotates) rotate_row(m.rotary, table, Rotation::kTo, key);
    void* keys = sink ? m.sink_keys : m.window_keys;
    void* values = sink ? m.sink_values : m.window_values;
    store_row(key, ring_row<T>(keys, m.kv_heads, capacity, m.head_dim, held, h, index), m.head_dim);
    std::copy_n(row<T>(args.values, b, h, source),
                m.value_dim,
                ring_row<T>(values, m.kv_heads, capacity, m.value_dim, held, h, index));
    if (m.usage != nullptr && !sink)
      *ring_row<Acc<T>>(m.usage, m.kv_heads, capacity, 1, held, h, index) = Acc<T>(0);
  }
}

}  // namespace

void append(const AppendArgs& args) {
  const int64_t tokens = args.block.tokens;
  const int64_t work = args.memory.kv_heads * (args.memory.head_dim + args.memory.value_dim) +
                       4 * args.memory.rotary.dim;
  dispatch(args.memory.storage, [&](auto type) {
    using T = decltype(type);
    at::parallel_for(0, args.memory.batch * tokens, grain(work), [&](int64_t begin, int64_t end) {
      thread_local std::vector<Acc<T>> key;  // kept from step to step
      key.resize(args.memory.head_dim);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / tokens;
        const int64_t i = task % tokens;
        if (i < args.block.count(b) && args.block.first(b) + i >= 0)
          append_token<T>(args, b, i, key.data());
      }
    });
  });
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
