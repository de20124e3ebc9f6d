#include "ops/memory.h"

#include <algorithm>

#include "ops/check.h"
#include "ops/layout.h"
#include "ops/rotary.h"

namespace ctx::ops {

Memory::Memory(at::TensorList tensors, const Settings& given, const char* where, int64_t batch)
    : rings(tensors.vec()), settings(given) {
  const Schedule& schedule = settings.schedule();
  max_rewind = check_rings(rings, schedule, where).expect_int();
  const at::Tensor& keys = rings[kWindowKeys];
  check_head_dim(settings, keys.size(3), where);
  const bool by_attention = settings.compressor == CompressorKind::kMostUsed;
  CTX_CHECK_VALUE(by_attention == counts_attention(rings),
                  where,
                  "attention_received must ",
                  by_attention ? "have" : "not have",
                  " entries for this compressor, got ",
                  rings[kAttentionReceived].sizes());
  CTX_CHECK_VALUE(schedule.compressed == 0 || settings.slot_mass == has_mass(rings),
                  where,
                  "slot_mass must ",
                  settings.slot_mass ? "have" : "not have",
                  " entries for these settings, got ",
                  rings[kSlotMass].sizes());
  view.clock = settings.clock;
  view.rotary = on_device(settings.rotary, keys.device());
  view.storage = storage_of(keys.scalar_type(), where, "window_keys");
  view.compressed_storage = slot_storage_of(
      rings[kCompressedKeys].scalar_type(), keys.scalar_type(), where, "compressed_keys");
  view.device = device_index(keys);
  view.batch = batch < 0 ? rows() : batch, view.kv_heads = keys.size(1);
  view.head_dim = keys.size(3), view.value_dim = rings[kWindowValues].size(3);
  view.window_capacity = keys.size(2);
  view.compressed_capacity = rings[kCompressedKeys].size(2);
  view.window_keys = keys.data_ptr();
  view.window_values = rings[kWindowValues].data_ptr();
  view.compressed_keys = rings[kCompressedKeys].data_ptr();
  view.compressed_values = rings[kCompressedValues].data_ptr();
  view.sink_keys = rings[kSinkKeys].data_ptr();
  view.sink_values = rings[kSinkValues].data_ptr();
  if (has_mass(rings)) view.slot_mass = rings[kSlotMass].data_ptr();
  if (!by_attention) return;
  view.usage = rings[kAttentionReceived].data_ptr();
  view.slot_positions = rings[kSlotPositions].data_ptr<int64_t>();
}

at::Tensor Memory::apart(const at::Tensor& x) const {
  const bool own = std::any_of(
      rings.begin(), rings.end(), [&](const at::Tensor& ring) { return x.is_alias_of(ring); });
  return own ? x.clone() : x;
}

}  // namespace ctx::ops
