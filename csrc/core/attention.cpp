#include "ctx/attention.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <cmath>

#include "core/calls.h"
#include "core/check.h"
#include "ops/settings.h"
#include "ops/state.h"

namespace ctx {

void AttentionOptions::validate(int64_t head_dim) const {
  constexpr const char* where = "ctx.AttentionOptions";
  schedule.validate();
  ops::parse_token_distance(distance, where);
  ops::parse_rotary(rotary_dim, rotary_base, rotary_interleaved, head_dim, where);
  CTX_CHECK_VALUE(std::isfinite(scale), where, "scale must be finite, got ", scale);
  CTX_CHECK_VALUE((rotary_dim > 0) + alibi_slopes.has_value() + !relative.empty() <= 1,
                  where,
                  "position must be one of rotary_dim > 0, alibi_slopes and relative, got more");
}

std::string AttentionOptions::position() const {
  if (!relative.empty()) return "relative";
  if (alibi_slopes) return "alibi";
  return rotary_dim > 0 ? "rotary" : "none";
}

namespace {

// The pairs that become slots, chosen by usage: what a copy of the memory makes of the call. Keys
// and values are the groups' [B, Hkv, G, c, width].
std::tuple<at::Tensor, at::Tensor, at::Tensor> most_used(const at::Tensor& q,
                                                         const calls::Tokens& tokens,
                                                         const std::vector<at::Tensor>& memory,
                                                         const std::optional<at::Tensor>& bias,
                                                         const AttentionOptions& options,
                                                         const at::Tensor& keys,
                                                         const at::Tensor& values,
                                                         const at::Tensor& block) {
  ops::State copy;
  {
    const at::NoGradGuard no_grad;
    const auto sizes = ops::state_sizes(options.schedule,
                                        tokens.k.size(0),
                                        tokens.k.size(1),
                                        tokens.k.size(3),
                                        tokens.v.size(3),
                                        /*max_rewind=*/64,
                                        tokens.k.scalar_type(),
                                        /*used=*/true);
    for (int i = 0; i < ops::kStateTensors; ++i) {
      copy[i] = memory.empty()
                    ? at::zeros_symint(sizes[i],
                                       tokens.k.options().dtype(ops::state_type(
                                           i, tokens.k.scalar_type(), tokens.k.scalar_type())))
                    : memory[i].detach().clone();
    }
  }
  const at::Tensor k = tokens.k.detach(), v = tokens.v.detach();
  AttentionOptions constant = options;
  if (constant.alibi_slopes) constant.alibi_slopes = constant.alibi_slopes->detach();
  for (at::Tensor& part : constant.relative) part = part.detach();
  const auto [chosen, positions] =
      calls::choose_(q.detach(),
                     {k, v, tokens.lengths, tokens.reset_at},
                     copy,
                     bias ? std::optional<at::Tensor>(bias->detach()) : std::nullopt,
                     constant,
                     block,
                     keys.sym_size(2));
  const auto taken = [&index = chosen](const at::Tensor& groups) {
    return groups.flatten(2, 3).gather(2, index.unsqueeze(-1).expand({-1, -1, -1, groups.size(4)}));
  };
  return {taken(keys), taken(values), positions};
}

}  // namespace

at::Tensor compressive_attention(const at::Tensor& q,
                                 const at::Tensor& k,
                                 const at::Tensor& v,
                                 const std::vector<at::Tensor>& memory,
                                 const Compressor& compressor,
                                 const std::optional<at::Tensor>& bias,
                                 const AttentionOptions& options,
                                 bool constant_slots,
                                 const std::optional<at::Tensor>& lengths,
                                 const std::optional<at::Tensor>& reset_at) {
  using at::Tensor;
  CTX_CHECK_VALUE(
      q.dim() == 4, "ctx.compressive_attention", "q must be [B, H, T, D], got ", q.sizes());
  CTX_CHECK_VALUE(
      k.dim() == 4, "ctx.compressive_attention", "k must be [B, Hkv, T, D], got ", k.sizes());
  AttentionOptions resolved = options;
  resolved.schedule.overlap = compressor.reads_left(resolved.schedule.ratio);
  resolved.validate(q.size(3));
  ops::check_rows(k, lengths, reset_at, "ctx.compressive_attention");
  ops::check_lengths(lengths, k.size(2), "ctx.compressive_attention");
  if (!memory.empty()) {
    ops::check_state(memory, resolved.schedule, "ctx.compressive_attention");
    ops::check_seen(memory[ops::kSeen], "ctx.compressive_attention");
  }
  if (resolved.scale == 0.0) resolved.scale = 1.0 / std::sqrt(static_cast<double>(q.size(3)));
  const calls::Tokens tokens{k, v, lengths, reset_at};
  const auto [keys, values, block] = calls::evicted_groups(tokens, memory, resolved);
  const std::optional<Tensor> given = bias && bias->defined() ? bias : std::nullopt;
  Tensor slot_keys, slot_values;
  std::optional<Tensor> slot_positions;
  if (compressor.name == "most_used") {
    std::tie(slot_keys, slot_values, slot_positions) =
        most_used(q, tokens, memory, given, resolved, keys, values, block);
  } else {
    std::tie(slot_keys, slot_values) = compress(keys, values, compressor);
  }
  // The graph reads rings where they lie, and the caller's may be written to before its backward.
  std::vector<Tensor> held = memory;
  if (at::GradMode::is_enabled()) {
    for (int i = 0; i < ops::kSinkKeys && !held.empty(); ++i) held[i] = held[i].clone();
  }
  if (constant_slots) slot_keys = slot_keys.detach(), slot_values = slot_values.detach();
  return std::get<0>(calls::attend_sequence(q,
                                            tokens,
                                            held,
                                            slot_keys,
                                            slot_values,
                                            slot_positions,
                                            given,
                                            resolved,
                                            /*with_region_weights=*/false));
}

}  // namespace ctx
