#include "ctx/memory.h"

#include <ATen/ATen.h>

#include "core/settings.h"
#include "ops/attend.h"
#include "ops/check.h"
#include "ops/groups.h"
#include "ops/plan.h"
#include "ops/registry.h"
#include "ops/settings.h"
#include "ops/shapes.h"
#include "ops/state.h"
#include "ops/step.h"

namespace ctx {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check_tokens(at::TensorList state,
                  const Tensor& k,
                  const Tensor& v,
                  const OptionalTensor& lengths,
                  const OptionalTensor& reset_at,
                  const char* where) {
  ops::check_pairs(state, k, v, where);
  ops::check_rows(k, k.sym_size(2), lengths, reset_at, where);
  ops::check_lengths(lengths, k.size(2), where);
}

}  // namespace

void MemoryOptions::validate() const {
  constexpr const char* where = "ctx.KVMemory";
  check_size(where, "batch_size", batch_size);
  check_size(where, "kv_heads", kv_heads);
  check_size(where, "head_dim", head_dim);
  CTX_CHECK_VALUE(value_dim >= 0 && value_dim <= Schedule::kLimit,
                  where,
                  "value_dim must be between 1 and ",
                  Schedule::kLimit,
                  ", got ",
                  value_dim);
  check_size(where, "max_rewind", max_rewind);
  attention.validate(head_dim);
  ops::storage_of(dtype, where, "dtype");
  ops::slot_storage_of(slot_dtype(), dtype, where, "compressed_dtype");
  ops::kernels_for(device.type());
  CTX_CHECK_VALUE(compressor.overlap >= 0 && compressor.overlap <= Schedule::kLimit,
                  where,
                  "overlap must be between 0 and ",
                  Schedule::kLimit,
                  ", got ",
                  compressor.overlap);
  ops::check_parameters(ops::parse_compressor(compressor.name, where),
                        compressor.parameters,
                        kv_heads,
                        attention.schedule.ratio,
                        compressor.reads_left(attention.schedule.ratio),
                        head_dim,
                        value_dim == 0 ? head_dim : value_dim,
                        device,
                        where);
  const auto per_head = [&](const OptionalTensor& x, const char* name) {
    if (!x) return;
    CTX_CHECK_VALUE(x->defined() && x->dim() == 1 &&
                        (x->size(0) == 1 || (x->size(0) > 0 && x->size(0) % kv_heads == 0)),
                    where,
                    name,
                    " must be [H], H a multiple of ",
                    kv_heads,
                    ", got ",
                    x->defined() ? x->sizes() : at::IntArrayRef{});
    CTX_CHECK_VALUE(
        x->device() == device, where, name, " must be on ", device, ", got ", x->device());
  };
  per_head(compressed_bias, "compressed_bias");
  per_head(attention.alibi_slopes, "alibi_slopes");
  if (attention.alibi_slopes) {
    const Tensor& slopes = *attention.alibi_slopes;
    ops::check_readable(slopes, "alibi_slopes", where);
    CTX_CHECK_TYPE(at::isFloatingType(slopes.scalar_type()),
                   where,
                   "alibi_slopes must be floating point, got ",
                   slopes.scalar_type());
    CTX_CHECK_VALUE(slopes.isfinite().all().item<bool>(),
                    where,
                    "alibi_slopes must be finite, got ",
                    slopes.isfinite().logical_not().sum().item<int64_t>(),
                    " that are not");
  }
  if (attention.relative.empty()) return;
  const Tensor& first = attention.relative[0];
  const int64_t heads = first.defined() && first.dim() == 2 ? first.size(0) : 0;
  CTX_CHECK_VALUE(heads > 0 && heads % kv_heads == 0,
                  where,
                  "relative key_bias must be [H, D], H a multiple of ",
                  kv_heads,
                  ", got ",
                  first.defined() ? first.sizes() : at::IntArrayRef{});
  ops::check_relative(attention.relative, heads, head_dim, device, where);
}

KVMemory::KVMemory(MemoryOptions options) : options_(std::move(options)) {
  options_.validate();
  if (options_.value_dim == 0) options_.value_dim = options_.head_dim;
  const int64_t ratio = options_.attention.schedule.ratio;
  options_.attention =
      options_.attention.resolved(options_.head_dim, options_.compressor.reads_left(ratio));
  const LayerShape shape{options_.attention.schedule,
                         options_.kv_heads,
                         options_.head_dim,
                         options_.value_dim,
                         options_.max_rewind,
                         /*counts_attention=*/options_.compressor.name == "most_used",
                         options_.attention.slot_mass};
  tensors_ = rows::empty(
      shape, options_.batch_size, options_.dtype, options_.slot_dtype(), options_.device);
}

KVMemory::KVMemory(MemoryOptions options, Tensors tensors)
    : options_(std::move(options)), tensors_(std::move(tensors)) {}

Tensor KVMemory::plan(const Tensor& k,
                      const OptionalTensor& lengths,
                      const OptionalTensor& reset_at) const {
  const auto packed = pack(options_.attention, options_.compressor.name);
  return ops::plan(seen(), lengths, reset_at, k.sym_size(2), packed.settings, /*carried=*/true);
}

// What the operators take of the compressor: its parameters, or what its function makes of the groups
// that may fall due.
std::vector<Tensor> KVMemory::operands(const Tensor& k, const Tensor& v, const Tensor& plan) const {
  const Compressor& compressor = options_.compressor;
  if (compressor.name != "custom") return compressor.parameters;
  const AttentionSettings& a = options_.attention;
  const auto [keys, values] = ops::evicted_groups(k, v, plan, rings(), pack(a, compressor.name));
  const auto [slot_keys, slot_values, mass] =
      compress(keys, values, compressor, a.slot_mass ? a.schedule.ratio : 0);
  return {slot_keys, slot_values, mass};
}

Tensor KVMemory::step(const Tensor& q,
                      const Tensor& k,
                      const Tensor& v,
                      const OptionalTensor& lengths,
                      const OptionalTensor& reset_at) {
  return std::get<0>(stepped(q, k, v, lengths, reset_at, false));
}

std::tuple<Tensor, Tensor> KVMemory::step_with_region_weights(const Tensor& q,
                                                              const Tensor& k,
                                                              const Tensor& v,
                                                              const OptionalTensor& lengths,
                                                              const OptionalTensor& reset_at) {
  return stepped(q, k, v, lengths, reset_at, true);
}

std::tuple<Tensor, Tensor> KVMemory::stepped(const Tensor& q,
                                             const Tensor& k,
                                             const Tensor& v,
                                             const OptionalTensor& lengths,
                                             const OptionalTensor& reset_at,
                                             bool with_region_weights) {
  constexpr const char* where = "ctx.KVMemory.step";
  check_tokens(rings(), k, v, lengths, reset_at, where);
  const AttentionSettings& a = options_.attention;
  ops::check_queries(
      rings(), q, k.size(2), {options_.compressed_bias, a.alibi_slopes, a.relative}, where);
  at::NoGradGuard no_grad;
  const Tensor plan = this->plan(k, lengths, reset_at);
  if (k.size(2) == 0) {
    return {at::empty({q.size(0), q.size(1), 0, v.size(3)}, q.options()),
            ops::new_region_weights(q, with_region_weights)};
  }
  const auto [out, weights, chosen, positions] =
      ops::step_(q,
                 k,
                 v,
                 plan,
                 rings(),
                 operands(k, v, plan),
                 {options_.compressed_bias, a.alibi_slopes, a.relative},
                 pack(a, options_.compressor.name),
                 with_region_weights);
  ops::advance_(seen(), rewindable(), plan, options_.max_rewind);
  return {out, weights};
}

void KVMemory::append(const Tensor& k,
                      const Tensor& v,
                      const OptionalTensor& lengths,
                      const OptionalTensor& reset_at) {
  constexpr const char* where = "ctx.KVMemory.append";
  check_tokens(rings(), k, v, lengths, reset_at, where);
  const Compressor& compressor = options_.compressor;
  CTX_CHECK_VALUE(compressor.name != "most_used",
                  where,
                  "compressor must be one that needs no queries, got \"most_used\": use step");
  at::NoGradGuard no_grad;
  const Tensor plan = this->plan(k, lengths, reset_at);
  ops::append_(
      k, v, plan, rings(), operands(k, v, plan), pack(options_.attention, compressor.name));
  ops::advance_(seen(), rewindable(), plan, options_.max_rewind);
}

Tensor KVMemory::attend(const Tensor& q) const { return std::get<0>(attended(q, false)); }

std::tuple<Tensor, Tensor> KVMemory::attend_with_region_weights(const Tensor& q) const {
  return attended(q, true);
}

std::tuple<Tensor, Tensor> KVMemory::attended(const Tensor& q, bool with_region_weights) const {
  constexpr const char* where = "ctx.KVMemory.attend";
  const AttentionSettings& a = options_.attention;
  ops::check_queries(rings(), q, -1, {options_.compressed_bias, a.alibi_slopes, a.relative}, where);
  CTX_CHECK_VALUE(q.size(2) <= options_.max_rewind,
                  where,
                  "q must have at most max_rewind = ",
                  options_.max_rewind,
                  " tokens, got ",
                  q.size(2));
  // A device is never waited for: there, outputs before the stream are zero.
  if (rewindable().is_cpu()) {
    for (int64_t b = 0; b < options_.batch_size; ++b) {
      const int64_t held = rewindable().const_data_ptr<int64_t>()[b];
      CTX_CHECK_VALUE(q.size(2) <= held,
                      where,
                      "q must have at most as many tokens as row ",
                      b,
                      " can take back = ",
                      held,
                      ", got ",
                      q.size(2));
    }
  }
  at::NoGradGuard no_grad;
  const int64_t tokens = q.size(2);
  const auto packed = pack(a, options_.compressor.name);
  const Tensor before = seen().sub(tokens);
  const Tensor plan =
      ops::plan(before.clamp_min(0), {}, {}, tokens, packed.settings, /*carried=*/true);
  const Tensor none =
      at::empty({options_.batch_size, options_.kv_heads, 0, options_.head_dim}, q.options());
  const Tensor no_values =
      at::empty({options_.batch_size, options_.kv_heads, 0, options_.value_dim}, q.options());
  const auto [out, weights, chosen, positions] =
      ops::step_(q,
                 none,
                 no_values,
                 plan,
                 rings(),
                 {},
                 {options_.compressed_bias, a.alibi_slopes, a.relative},
                 packed,
                 with_region_weights);
  return {out, weights};
}

int64_t KVMemory::nbytes() const {
  int64_t total = 0;
  for (const Tensor& tensor : tensors_) total += static_cast<int64_t>(tensor.nbytes());
  return total;
}

void KVMemory::set_parameters(std::vector<Tensor> parameters) {
  MemoryOptions changed = options_;
  changed.compressor.parameters = std::move(parameters);
  const Schedule& schedule = options_.attention.schedule;
  CTX_CHECK_VALUE(changed.compressor.reads_left(schedule.ratio) == schedule.overlap,
                  "ctx.KVMemory.set_parameters",
                  "parameters must read ",
                  schedule.overlap,
                  " tokens left of a group, got ",
                  changed.compressor.reads_left(schedule.ratio));
  changed.validate();
  options_ = std::move(changed);
}

void KVMemory::set_relative(std::vector<Tensor> relative) {
  CTX_CHECK_VALUE(options_.attention.position() == "relative" && !relative.empty(),
                  "ctx.KVMemory.set_relative",
                  "relative must be 5 tensors for a memory with relative positions, got ",
                  relative.size(),
                  " for one with position ",
                  options_.attention.position());
  MemoryOptions changed = options_;
  changed.attention.relative = std::move(relative);
  changed.validate();
  options_ = std::move(changed);
}

void KVMemory::set_compressed_bias(OptionalTensor bias) {
  MemoryOptions changed = options_;
  changed.compressed_bias = std::move(bias);
  changed.validate();
  options_ = std::move(changed);
}

}  // namespace ctx
