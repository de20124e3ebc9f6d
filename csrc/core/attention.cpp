#include "ctx/attention.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "core/settings.h"
#include "ops/attend.h"
#include "ops/check.h"
#include "ops/groups.h"
#include "ops/plan.h"
#include "ops/shapes.h"
#include "ops/state.h"
#include "ops/step.h"

namespace ctx {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kAttentionWhere = "ctx.compressive_attention";

OptionalTensor detached(const OptionalTensor& x) {
  return x ? OptionalTensor(x->detach()) : std::nullopt;
}

std::vector<Tensor> empty_rings(const Tensor& k,
                                const Tensor& v,
                                const AttentionSettings& settings) {
  const ops::StateShape shape{settings.schedule,
                              k.size(0),
                              k.size(1),
                              k.size(3),
                              v.size(3),
                              /*max_rewind=*/64,
                              k.scalar_type(),
                              /*counts=*/true,
                              settings.slot_mass};
  const auto sizes = shape.sizes();
  std::vector<Tensor> rings;
  for (int i = 0; i < ops::kRings; ++i)
    rings.push_back(at::zeros_symint(
        sizes[i], k.options().dtype(ops::state_type(i, k.scalar_type(), k.scalar_type()))));
  return rings;
}

// Slots that are tokens, chosen by attention: what a copy of the memory makes of the call.
std::vector<Tensor> most_used(const Tensor& q,
                              const Tensor& k,
                              const Tensor& v,
                              const Tensor& plan,
                              const std::vector<Tensor>& rings,
                              const OptionalTensor& bias,
                              const AttentionSettings& settings,
                              const ops::PackedSettings& packed,
                              const Tensor& keys,
                              const Tensor& values) {
  std::vector<Tensor> copy;
  {
    const at::NoGradGuard no_grad;
    copy = rings.empty() ? empty_rings(k, v, settings) : rings;
    for (Tensor& ring : copy) ring = ring.detach().clone();
  }
  const OptionalTensor slopes = detached(settings.alibi_slopes), constant = detached(bias);
  std::vector<Tensor> relative = settings.relative;
  for (Tensor& part : relative) part = part.detach();
  const auto [out, weights, chosen, positions] = ops::step_(q.detach(),
                                                            k.detach(),
                                                            v.detach(),
                                                            plan,
                                                            copy,
                                                            {},
                                                            {constant, slopes, relative},
                                                            packed,
                                                            /*with_region_weights=*/false);
  const auto taken = [&index = chosen](const Tensor& groups) {
    return groups.flatten(2, 3).gather(2, index.unsqueeze(-1).expand({-1, -1, -1, groups.size(4)}));
  };
  const Tensor mass = settings.slot_mass ? at::zeros(chosen.sizes(), keys.options())
                                         : at::empty({0}, keys.options());
  return {taken(keys), taken(values), mass, positions};
}

}  // namespace

Tensor compressive_attention(const Tensor& q,
                             const Tensor& k,
                             const Tensor& v,
                             const std::vector<Tensor>& memory,
                             const Compressor& compressor,
                             const OptionalTensor& bias,
                             const AttentionSettings& settings,
                             bool constant_slots,
                             const OptionalTensor& lengths,
                             const OptionalTensor& reset_at) {
  ops::check_shape(kAttentionWhere, "k", k, {{"B"}, {"Hkv"}, {"T"}, {"D"}});
  ops::check_shape(
      kAttentionWhere, "q", q, {{"B", k.size(0)}, {"H"}, {"T", k.size(2)}, {"D", k.size(3)}});
  const AttentionSettings resolved =
      settings.resolved(q.size(3), compressor.reads_left(settings.schedule.ratio));
  ops::check_rows(k, k.sym_size(2), lengths, reset_at, kAttentionWhere);
  ops::check_lengths(lengths, k.size(2), kAttentionWhere);
  std::vector<Tensor> rings;
  Tensor seen = at::zeros({k.size(0)}, k.options().dtype(at::kLong));
  if (!memory.empty()) {
    CTX_CHECK_VALUE(memory.size() == ops::kStateTensors,
                    kAttentionWhere,
                    "memory must be empty or ",
                    int{ops::kStateTensors},
                    " tensors, got ",
                    memory.size());
    rings.assign(memory.begin(), memory.begin() + ops::kRings);
    ops::check_rings(rings, resolved.schedule, kAttentionWhere);
    seen = memory[ops::kSeen];
    ops::check_seen(seen, kAttentionWhere);
  }
  const ops::PackedSettings packed = pack(resolved, compressor.name);
  const Tensor plan = ops::plan(
      seen, lengths, reset_at, k.sym_size(2), packed.settings, /*carried=*/!rings.empty());
  const auto [keys, values] = ops::evicted_groups(k, v, plan, rings, packed);
  const OptionalTensor given = bias && bias->defined() ? bias : std::nullopt;
  std::vector<Tensor> slots;
  if (compressor.name == "most_used") {
    slots = most_used(q, k, v, plan, rings, given, resolved, packed, keys, values);
  } else {
    const int64_t ratio = resolved.slot_mass ? resolved.schedule.ratio : 0;
    const auto [slot_keys, slot_values, mass] = compress(keys, values, compressor, ratio);
    slots = {slot_keys, slot_values, mass};
  }
  // The graph reads rings where they lie, and the caller's may be written to before its backward.
  if (at::GradMode::is_enabled()) {
    for (Tensor& ring : rings) ring = ring.clone();
  }
  if (constant_slots) {
    for (Tensor& part : slots) part = part.detach();
  }
  const ops::AttendCall call{q,
                             k,
                             v,
                             plan,
                             rings,
                             slots,
                             given,
                             resolved.alibi_slopes,
                             resolved.relative,
                             packed.settings,
                             packed.numbers};
  return std::get<0>(ops::attend(call, /*with_region_weights=*/false));
}

}  // namespace ctx
