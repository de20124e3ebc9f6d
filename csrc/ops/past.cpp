#include "ops/past.h"

#include "core/check.h"
#include "ops/rings.h"
#include "ops/settings.h"
#include "ops/state.h"

namespace ctx::ops {

using at::Tensor;

namespace {
constexpr int64_t kTensors = 5;
}  // namespace

Past Past::of(at::TensorList list, const char* where) {
  if (list.empty()) return {};
  CTX_CHECK_VALUE(list.size() == kTensors,
                  where,
                  "past must be ",
                  kTensors,
                  " tensors, or none, got ",
                  list.size());
  return {list[0], list[1], list[2], list[3], list[4]};
}

std::vector<Tensor> Past::list() const {
  if (!defined()) return {};
  return {window_keys, window_values, compressed_keys, compressed_values, numbers};
}

int64_t Past::size(const Schedule& schedule, Region region) const {
  if (!defined() || region == kSinks) return 0;
  return region == kWindow ? schedule.max_window() : schedule.compressed;
}

Tensor Past::first(Region region) const { return numbers.select(1, region == kWindow ? 0 : 2); }

Tensor Past::first_seen(Region region) const {
  return numbers.select(1, region == kWindow ? 1 : 3);
}

void Past::check(const Schedule& schedule,
                 const Tensor& keys,
                 const Tensor& values,
                 const char* where) const {
  if (!defined()) return;
  const auto pairs = keys.scalar_type();
  const auto ring = [&](const Tensor& x, const char* name, Region region, const Tensor& like) {
    const auto type = x.scalar_type();
    if (region == kWindow) {
      CTX_CHECK_TYPE(type == pairs, where, name, " must be ", pairs, ", got ", type);
    } else {
      slot_storage_of(type, pairs, where, name);
    }
    const auto width = stored_width(like.size(3), type).expect_int();
    const int64_t entries = size(schedule, region);
    CTX_CHECK_VALUE(x.dim() == 4 && x.size(0) == like.size(0) && x.size(1) == like.size(1) &&
                        x.size(2) >= entries && x.size(3) == width && x.is_contiguous(),
                    where,
                    name,
                    " must be contiguous [B, Hkv, capacity, width] = [",
                    like.size(0),
                    ", ",
                    like.size(1),
                    ", at least ",
                    entries,
                    ", ",
                    width,
                    "], got ",
                    x.sizes());
  };
  ring(window_keys, "past window keys", kWindow, keys);
  ring(window_values, "past window values", kWindow, values);
  ring(compressed_keys, "past compressed keys", kCompressed, keys);
  ring(compressed_values, "past compressed values", kCompressed, values);
  CTX_CHECK_VALUE(
      numbers.sizes() == at::IntArrayRef({keys.size(0), 4}) && numbers.scalar_type() == at::kLong,
      where,
      "past numbers must be int64 [B, 4] = [",
      keys.size(0),
      ", 4], got ",
      numbers.scalar_type(),
      " ",
      numbers.sizes());
}

Tensor Past::read(const Tensor& ring,
                  const Schedule& schedule,
                  Region region,
                  at::ScalarType type) const {
  const Tensor at = count_from(first(region), size(schedule, region));
  const Tensor held = at.ge(first_seen(region).unsqueeze(1));
  return slots_as(read_ring(ring, at, held), type);
}

}  // namespace ctx::ops
