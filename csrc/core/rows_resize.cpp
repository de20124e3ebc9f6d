// A running memory carried over to other sizes.
#include "ctx/rows.h"
#include "ops/check.h"
#include "ops/rings.h"
#include "ops/rows.h"

namespace ctx {
namespace {

using at::Tensor;
using rows::State;

void check_sizes(const Schedule& old,
                 const Schedule& made,
                 const std::vector<int64_t>& seen,
                 std::string_view where) {
  const auto same = [&](const char* name, int64_t was, int64_t asked) {
    CTX_CHECK_VALUE(asked == was, where, name, " must stay as it is = ", was, ", got ", asked);
  };
  same("ratio", old.ratio, made.ratio);
  same("segment", old.segment, made.segment);
  same("sinks", old.sinks, made.sinks);
  for (size_t row = 0; row < seen.size(); ++row) {
    const int64_t groups = old.groups(seen[row] - 1), asked = made.groups(seen[row] - 1);
    const std::string here = " in row " + std::to_string(row);
    CTX_CHECK_VALUE(asked == groups,
                    where,
                    "window must leave " + std::to_string(groups) +
                        " groups compressed, as there are" + here + ", got " +
                        std::to_string(made.window) + ", which makes them ",
                    asked);
    CTX_CHECK_VALUE(groups <= old.compressed || made.compressed <= old.compressed,
                    where,
                    "compressed must be at most " + std::to_string(old.compressed) + here +
                        ", which has dropped all but that many of " + std::to_string(groups) +
                        " slots, got ",
                    made.compressed);
  }
}

// How many tokens can be taken back so that both schedules have the same groups throughout.
int64_t agreeing(const Schedule& old, const Schedule& made, int64_t seen, int64_t most) {
  for (int64_t count = 1; count <= most; ++count) {
    if (old.groups(seen - 1 - count) != made.groups(seen - 1 - count)) return count - 1;
  }
  return most;
}

// Fills a ring with what another ring of other capacity holds of the same positions, of which
// `oldest` is the first and `newest` [B] the last.
void refill(const Tensor& ring, const Tensor& source, const Tensor& newest, int64_t oldest) {
  const int64_t size = ring.size(2), capacity = source.size(2);
  if (size == 0 || capacity == 0) return;
  const Tensor last = newest.unsqueeze(1);
  // The largest position up to `newest` whose remainder is the index.
  const Tensor positions = last - (last - at::arange(size, newest.options())).remainder(size);
  const Tensor held = positions.ge(oldest).logical_and(positions.gt(last - capacity));
  std::vector<int64_t> wide(ring.dim(), 1);
  wide[0] = ring.size(0), wide[2] = size;
  const Tensor index = positions.remainder(capacity).reshape(wide).expand_as(ring);
  ring.copy_(source.gather(2, index).masked_fill_(held.logical_not().reshape(wide), 0));
}

}  // namespace

State rows::resized(const State& state,
                    const std::vector<LayerShape>& layers,
                    const std::vector<LayerShape>& shapes,
                    std::string_view where) {
  ops::refuse_counted(state, where);
  const Tensor& clock = ops::seen_of(state);
  const auto seen = ops::numbers(clock);
  auto rewindable = ops::numbers(ops::rewindable_of(state));
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const Schedule &old = layers[layer].schedule, &made = shapes[layer].schedule;
    check_sizes(old, made, seen, where);
    for (size_t row = 0; row < seen.size(); ++row)
      rewindable[row] = agreeing(old, made, seen[row], rewindable[row]);
  }
  const ops::Ordinary ordinary;
  State made;
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const Schedule& old = layers[layer].schedule;
    const Tensor newest = clock - 1, newest_group = ops::groups_of(old, newest) - 1;
    const at::TensorList held = ops::rings_of(state, layer);
    const auto slots = held[ops::kCompressedKeys].scalar_type();
    const State into =
        empty(shapes[layer], clock.size(0), held[0].scalar_type(), slots, clock.device());
    for (const int i : {ops::kSinkKeys, ops::kSinkValues}) into[i].copy_(held[i]);
    for (const int i : {ops::kWindowKeys, ops::kWindowValues})
      refill(into[i], held[i], newest, old.sinks);
    for (const int i : {ops::kCompressedKeys, ops::kCompressedValues, ops::kSlotMass})
      refill(into[i], held[i], newest_group, 0);
    made.insert(made.end(), into.begin(), into.begin() + ops::kRings);
  }
  made.push_back(clock.clone());
  made.push_back(at::tensor(rewindable, clock.options()));
  return made;
}

}  // namespace ctx
