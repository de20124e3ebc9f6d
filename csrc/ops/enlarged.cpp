#include "ops/enlarged.h"

#include <algorithm>
#include <cstring>

namespace ctx::ops {
namespace {

using at::Tensor;

constexpr int64_t kBlockTokens = 256;

bool is_window(int ring) {
  return ring == kWindowKeys || ring == kWindowValues || ring == kAttentionReceived;
}
bool is_sinks(int ring) { return ring == kSinkKeys || ring == kSinkValues; }

// A row of a ring [rows, Hkv, capacity, ...].
struct RingRow {
  const Tensor& ring;
  int64_t row;
};

// Copies the entries with the given numbers from one to another.
void copy_entries(const RingRow& source_row, const RingRow& target_row, Range numbers) {
  const Tensor &from = source_row.ring, &to = target_row.ring;
  const int64_t heads = from.size(1), sizes[] = {from.size(2), to.size(2)};
  if (sizes[0] == 0 || sizes[1] == 0) return;
  const int64_t bytes = from.stride(2) * static_cast<int64_t>(from.element_size());
  for (int64_t n = numbers.begin, run; n < numbers.end; n += run) {
    const int64_t source = n % sizes[0], target = n % sizes[1];
    run = std::min({numbers.end - n, sizes[0] - source, sizes[1] - target});
    for (int64_t h = 0; h < heads; ++h) {
      const auto* const x = static_cast<const char*>(from.const_data_ptr());
      auto* const y = static_cast<char*>(to.data_ptr());
      std::memcpy(y + ((target_row.row * heads + h) * sizes[1] + target) * bytes,
                  x + ((source_row.row * heads + h) * sizes[0] + source) * bytes,
                  run * bytes);
    }
  }
}

}  // namespace

bool Enlarged::pays(const Memory& memory, const PlanRows& plan) {
  return plan.tokens() > memory.max_rewind && memory.max_rewind < kBlockTokens &&
         memory.kernels().host_reads;
}

Enlarged::Enlarged(const Memory& memory, const PlanRows& plan, const char* where)
    : memory_(memory) {
  const Schedule& s = memory.settings.schedule();
  const MemoryView& view = memory.view;
  const auto slots = memory.rings[kCompressedKeys].scalar_type();
  const StateShape shape{s,
                         view.batch,
                         view.kv_heads,
                         view.head_dim,
                         view.value_dim,
                         std::min(kBlockTokens, plan.tokens()),
                         slots,
                         view.usage != nullptr,
                         view.slot_mass != nullptr};
  const auto sizes = shape.sizes();
  std::vector<Tensor> rings = memory.rings;
  for (int i = 0; i < kRings; ++i) {
    const bool sinks = is_sinks(i);
    rings[i] = at::zeros_symint(sizes[i], memory.rings[i].options());
    for (int64_t b = 0; b < view.batch; ++b) {
      const int64_t seen = plan.header(b, kPlanSeen), made = s.groups(seen - 1);
      const Range numbers =
          sinks          ? Range{0, std::min(seen, s.sinks)}
          : is_window(i) ? Range{std::max<int64_t>(0, seen - s.max_window() - s.overlap), seen}
                         : Range{std::max<int64_t>(0, made - s.compressed), made};
      copy_entries({memory.rings[i], plan.memory_row(b)}, {rings[i], b}, numbers);
    }
  }
  large_.emplace(rings, memory.settings, where);  // has the call's rows
}

void Enlarged::finish(const PlanRows& plan) const {
  const Schedule& s = memory_.settings.schedule();
  for (int64_t b = 0; b < plan.batch(); ++b) {
    const int64_t before = plan.header(b, kPlanSeen), count = plan.header(b, kPlanCount);
    if (count == 0) continue;
    const int64_t seen = plan.token(b, kPlanPosition, count - 1) + 1;
    const bool carried = seen == before + count;
    const int64_t first_token = carried ? before : 0;
    const int64_t first_group = carried ? s.groups(before - 1) : 0;
    for (int i = 0; i < kRings; ++i) {
      const Tensor& ring = memory_.rings[i];
      Range numbers = is_sinks(i) ? Range{std::min(first_token, s.sinks), std::min(seen, s.sinks)}
                      : is_window(i) ? Range{first_token, seen}
                                     : Range{first_group, s.groups(seen - 1)};
      if (i == kAttentionReceived && carried)  // of older tokens, too
        numbers.begin = std::max<int64_t>(0, before - s.max_window() - s.overlap);
      numbers.begin = std::max(numbers.begin, numbers.end - ring.size(2));
      copy_entries({large_->rings[i], b}, {ring, plan.memory_row(b)}, numbers);
    }
  }
}

}  // namespace ctx::ops
