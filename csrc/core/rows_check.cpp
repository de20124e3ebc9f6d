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

// Raises where a tensor lies where another does: both would be written to.
class Owners {
 public:
  Owners(bool several, const std::string& where) : several_(several), where_(where) {}

  void add(const Tensor& x, int index, size_t layer) {
    if (!x.has_storage()) return;  // inside of a transform
    const void* place = x.const_data_ptr();
    if (place == nullptr) return;
    const std::string name =
        ops::state_name(index) + (several_ ? " of layer " + std::to_string(layer) : "");
    const auto [found, added] = names_.emplace(place, name);
    CTX_CHECK_VALUE(added,
                    where_,
                    "memory must have tensors of its own for every layer, got ",
                    found->second,
                    " as ",
                    name);
  }

 private:
  bool several_;
  const std::string& where_;
  std::unordered_map<const void*, std::string> names_;
};

}  // namespace

std::vector<std::vector<int64_t>> LayerShape::sizes(int64_t batch, at::ScalarType slots) const {
  const ops::StateShape shape{schedule,
                              batch,
                              kv_heads,
                              head_dim,
                              value_dim,
                              max_rewind,
                              slots,
                              counts_attention,
                              slot_mass};
  std::vector<std::vector<int64_t>> made;
  for (const auto& size : shape.sizes()) {
    auto& plain = made.emplace_back();
    for (const c10::SymInt& n : size) plain.push_back(n.expect_int());
  }
  made.resize(kRings);
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
  auto sizes = shape.sizes(batch, slots);
  sizes.resize(ops::kStateTensors, {batch});
  State made;
  for (int i = 0; i < ops::kStateTensors; ++i)
    made.push_back(at::zeros(sizes[i], options.dtype(ops::state_type(i, pairs, slots))));
  return made;
}

void check(at::TensorList state, const std::vector<LayerShape>& layers, const std::string& where) {
  CTX_CHECK_VALUE(state.size() == layers.size() * kRings + kClock,
                  where,
                  "memory must have ",
                  layers.size(),
                  " layers, got ",
                  state.size(),
                  " tensors");
  const Tensor& seen = ops::seen_of(state);
  CTX_CHECK_VALUE(seen.dim() == 1, where, "seen must be [B], got ", seen.sym_sizes());
  const c10::SymInt batch = seen.sym_size(0);
  const bool several = layers.size() > 1;
  Owners owners(several, where);
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const std::string at = several ? where + ": memory[" + std::to_string(layer) + "]" : where;
    const LayerShape& x = layers[layer];
    const at::TensorList rings = ops::rings_of(state, layer);
    const auto pairs = rings[0].scalar_type(), slots = rings[kCompressedKeys].scalar_type();
    ops::storage_of(pairs, at.c_str(), "window_keys");
    ops::slot_storage_of(slots, pairs, at.c_str(), "compressed_keys");
    const ops::StateShape shape{x.schedule,
                                batch,
                                x.kv_heads,
                                x.head_dim,
                                x.value_dim,
                                x.max_rewind,
                                slots,
                                x.counts_attention,
                                x.slot_mass};
    const auto sizes = shape.sizes();
    for (int i = 0; i < ops::kStateTensors; ++i) {
      const Tensor& tensor = i < kRings ? rings[i] : state[state.size() - kClock + i - kRings];
      const auto type = ops::state_type(i, pairs, slots);
      ops::check_layout(tensor, i, sizes[i], type, seen.device(), at.c_str());
      if (i < kRings || layer == 0) owners.add(tensor, i, layer);
    }
  }
}

void check_clock(const Tensor& seen,
                 const Tensor& rewindable,
                 int64_t max_rewind,
                 const std::string& where) {
  const auto counts = ops::numbers(seen), spare = ops::numbers(rewindable);
  for (size_t row = 0; row < counts.size(); ++row) {
    const int64_t count = counts[row], most = std::min(count, max_rewind);
    CTX_CHECK_VALUE(count >= 0 && count <= Schedule::kLastPosition,
                    where,
                    "seen must be between 0 and ",
                    Schedule::kLastPosition,
                    ", got ",
                    count,
                    " in row ",
                    row);
    CTX_CHECK_VALUE(spare[row] != kOpen,
                    where,
                    "memory must be what a call left that ended, got one that was being written "
                    "when its call was interrupted: reset it, or go back to a copy (rewindable is ",
                    kOpen,
                    " in row ",
                    row,
                    ")");
    CTX_CHECK_VALUE(spare[row] >= 0 && spare[row] <= most,
                    where,
                    "rewindable must be between 0 and ",
                    most,
                    ", got ",
                    spare[row],
                    " in row ",
                    row);
  }
}

}  // namespace rows
}  // namespace ctx
