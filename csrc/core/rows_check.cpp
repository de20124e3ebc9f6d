// What must hold of a memory's tensors, and tensors of which it holds.
#include <algorithm>
#include <unordered_map>

#include "ctx/rows.h"
#include "ops/check.h"
#include "ops/rows.h"
#include "ops/settings.h"

namespace ctx {
namespace {

using at::Tensor;
using ops::kClock;
using ops::kCompressedKeys;
using ops::kRings;
using rows::State;

ops::StateShape with_rows(const LayerShape& x, const c10::SymInt& batch, at::ScalarType slots) {
  return {x.schedule,
          batch,
          x.kv_heads,
          x.head_dim,
          x.value_dim,
          x.max_rewind,
          slots,
          x.counts_attention,
          x.slot_mass};
}

}  // namespace

std::vector<std::vector<int64_t>> LayerShape::sizes(int64_t batch, at::ScalarType slots) const {
  std::vector<std::vector<int64_t>> made;
  for (const auto& size : with_rows(*this, batch, slots).sizes()) {
    auto& plain = made.emplace_back();
    for (const c10::SymInt& n : size) plain.push_back(n.expect_int());
  }
  return made;
}

namespace rows {

std::vector<std::string> names() {
  std::vector<std::string> made;
  for (int i = 0; i < ops::kStateTensors; ++i) made.emplace_back(ops::state_name(i));
  return made;
}

std::vector<at::ScalarType> types(at::ScalarType pairs, at::ScalarType slots) {
  std::vector<at::ScalarType> made;
  for (int i = 0; i < ops::kStateTensors; ++i) made.push_back(ops::state_type(i, pairs, slots));
  return made;
}

std::vector<at::ScalarType> slot_types(at::ScalarType pairs) { return ops::slot_types(pairs); }

State empty(const LayerShape& shape,
            int64_t batch,
            at::ScalarType pairs,
            at::ScalarType slots,
            at::Device device) {
  const ops::Ordinary ordinary;
  const auto options = at::TensorOptions().device(device);
  const auto sizes = shape.sizes(batch, slots);
  State made;
  for (int i = 0; i < ops::kStateTensors; ++i)
    made.push_back(at::zeros(sizes[i], options.dtype(ops::state_type(i, pairs, slots))));
  return made;
}

void check(const State& state, const std::vector<LayerShape>& layers, std::string_view where) {
  const size_t wanted = layers.size() * kRings + kClock;
  CTX_CHECK_VALUE(
      state.size() == wanted, where, "memory must be ", wanted, " tensors, got ", state.size());
  const Tensor& seen = ops::seen_of(state);
  CTX_CHECK_VALUE(seen.dim() == 1, where, "seen must be [B], got ", seen.sym_sizes());
  const bool several = layers.size() > 1;
  std::unordered_map<const void*, std::string> owners;
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const std::string number = std::to_string(layer);
    const std::string at = std::string(where) + (several ? ": memory[" + number + "]" : "");
    const at::TensorList rings = ops::rings_of(state, layer);
    const auto pairs = rings[0].scalar_type(), slots = rings[kCompressedKeys].scalar_type();
    ops::storage_of(pairs, at.c_str(), "window_keys");
    ops::slot_storage_of(slots, pairs, at.c_str(), "compressed_keys");
    const auto sizes = with_rows(layers[layer], seen.sym_size(0), slots).sizes();
    for (int i = 0; i < ops::kStateTensors; ++i) {
      const Tensor& x = i < kRings ? rings[i] : state[state.size() - kClock + i - kRings];
      const auto type = ops::state_type(i, pairs, slots);
      ops::check_layout(x, i, sizes[i], type, seen.device(), at.c_str());
      // Both would be written to. Inside of a transform there is no storage to tell.
      const void* place = x.has_storage() ? x.const_data_ptr() : nullptr;
      if (place == nullptr || (i >= kRings && layer > 0)) continue;
      const std::string name = ops::state_name(i) + (several ? " of layer " + number : "");
      const auto [owner, added] = owners.emplace(place, name);
      const std::string both = owner->second + " as " + name;
      CTX_CHECK_VALUE(
          added, where, "memory must have tensors of its own for every layer, got ", both);
    }
  }
}

void check_clock(const Tensor& seen,
                 const Tensor& rewindable,
                 int64_t max_rewind,
                 std::string_view where) {
  const auto counts = ops::numbers(seen), spare = ops::numbers(rewindable);
  for (size_t row = 0; row < counts.size(); ++row) {
    const int64_t count = counts[row], most = std::min(count, max_rewind);
    const auto check = [&](bool holds, const std::string& what, int64_t got) {
      CTX_CHECK_VALUE(holds, where, what, ", got ", got, " in row ", row);
    };
    constexpr int64_t last = Schedule::kLastPosition;
    check(count >= 0 && count <= last, "seen must be between 0 and " + std::to_string(last), count);
    check(spare[row] != kOpen,
          "memory must be what a call left that ended, and rewindable not that of one that was "
          "interrupted (reset it, or go back to a copy)",
          kOpen);
    check(spare[row] >= 0 && spare[row] <= most,
          "rewindable must be between 0 and " + std::to_string(most),
          spare[row]);
  }
}

}  // namespace rows
}  // namespace ctx
