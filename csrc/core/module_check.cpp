#include "core/module_check.h"

#include <ATen/autocast_mode.h>

#include <algorithm>

#include "core/memory_spec.h"
#include "core/settings.h"
#include "ops/check.h"
#include "ops/settings.h"
#include "ops/shapes.h"
#include "ops/state.h"

namespace ctx {

using at::Tensor;

void check_floating_input(const Tensor& x, const Tensor& parameter, const char* where) {
  ops::check_device(where, "x", x, parameter.device(), "the parameters'");
  ops::check_floating(where, "x", x);
  if (!at::autocast::is_autocast_enabled(x.device().type()))
    ops::check_type(where, "x", x, parameter.scalar_type(), "the parameters'");
}

ModuleCall checked_call(const std::shared_ptr<const MemorySpec>& spec,
                        const Tensor& x,
                        const char* name,
                        const ModelMemory& memory,
                        const CallOptions& said,
                        const char* where) {
  const int64_t batch = x.size(0), tokens = x.size(1);
  CTX_CHECK_VALUE(batch >= 1, where, name, " must have at least one row, got ", x.sizes());
  ops::check_rows(x, tokens, said.lengths, said.reset_at, where);
  ops::check_lengths(said.lengths, tokens, where);
  int64_t max_rewind = spec->layers[0].shape.max_rewind;
  bool counts = false;
  for (const LayerSpec& layer : spec->layers) {
    max_rewind = std::min(max_rewind, layer.shape.max_rewind);
    counts = counts || layer.shape.counts_attention;
  }
  if (memory.defined()) {
    check_spec(*spec, *memory.spec(), where);
    const Tensor& seen = memory.seen();
    CTX_CHECK_VALUE(seen.size(0) == batch,
                    where,
                    name,
                    " must have as many rows as memory = ",
                    seen.size(0),
                    ", got ",
                    batch);
    CTX_CHECK_VALUE(seen.device() == x.device(),
                    where,
                    "memory must be on ",
                    x.device(),
                    " as ",
                    name,
                    ", got ",
                    seen.device());
    // A device is never waited for.
    if (seen.is_cpu()) rows::check_clock(seen, memory.rewindable(), max_rewind, where);
  }
  return {memory,
          {batch, tokens, x.device(), said.lengths, said.reset_at},
          max_rewind,
          counts,
          said.update};
}

ModelMemory empty_memory(const std::shared_ptr<const MemorySpec>& spec,
                         int64_t batch_size,
                         at::ScalarType dtype,
                         std::optional<at::ScalarType> compressed_dtype,
                         at::Device device,
                         const char* where) {
  check_size(where, "batch_size", batch_size);
  const at::ScalarType slots = compressed_dtype.value_or(dtype);
  ops::storage_of(dtype, where, "dtype");
  ops::slot_storage_of(slots, dtype, where, "compressed_dtype");
  rows::State state, clock;
  for (const LayerSpec& layer : spec->layers) {
    rows::State rings = rows::empty(layer.shape, batch_size, dtype, slots, device);
    clock.assign(rings.begin() + ops::kRings, rings.end());
    state.insert(state.end(), rings.begin(), rings.begin() + ops::kRings);
  }
  state.insert(state.end(), clock.begin(), clock.end());
  return {spec, std::move(state)};
}

}  // namespace ctx
