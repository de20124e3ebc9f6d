#include "ctx/attention.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include "core/settings.h"
#include "core/slots.h"
#include "ops/attend.h"
#include "ops/check.h"
#include "ops/plan.h"
#include "ops/shapes.h"
#include "ops/state.h"

namespace ctx {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kAttentionWhere = "ctx.compressive_attention";

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

// What slots that are chosen by attention are streamed into.
std::vector<Tensor> copied_rings(const std::vector<Tensor>& rings,
                                 const Tensor& k,
                                 const Tensor& v,
                                 const AttentionSettings& settings) {
  const at::NoGradGuard no_grad;
  std::vector<Tensor> copy = rings.empty() ? empty_rings(k, v, settings) : rings;
  for (Tensor& ring : copy) ring = ring.detach().clone();
  return copy;
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
  const OptionalTensor given = bias && bias->defined() ? bias : std::nullopt;
  const ops::ScoreOperands scores{given, resolved.alibi_slopes, resolved.relative};
  const int64_t mass_ratio = resolved.slot_mass ? resolved.schedule.ratio : 0;
  std::vector<Tensor> written;
  if (compressor.name == "most_used") written = copied_rings(rings, k, v, resolved);
  std::vector<Tensor> slots =
      slots_of({q, k, v, plan, rings, scores, packed, compressor, mass_ratio}, written);
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
