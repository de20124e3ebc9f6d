#include "ctx/attention.h"

#include <ATen/ATen.h>

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
  options.validate(q.size(3));
  ops::check_rows(k, lengths, reset_at, "ctx.compressive_attention");
  ops::check_lengths(lengths, k.size(2), "ctx.compressive_attention");
  if (!memory.empty()) {
    ops::check_state(memory, options.schedule, "ctx.compressive_attention");
    ops::check_seen(memory[ops::kSeen], "ctx.compressive_attention");
  }
  AttentionOptions resolved = options;
  if (resolved.scale == 0.0) resolved.scale = 1.0 / std::sqrt(static_cast<double>(q.size(3)));
  const calls::Tokens tokens{k, v, lengths, reset_at};
  const auto [keys, values, block] = calls::due_groups(tokens, memory, resolved);
  auto [slot_keys, slot_values] = compress(keys, values, compressor);
  if (constant_slots) slot_keys = slot_keys.detach(), slot_values = slot_values.detach();
  const std::optional<Tensor> given = bias && bias->defined() ? bias : std::nullopt;
  return std::get<0>(calls::attend_sequence(q,
                                            tokens,
                                            memory,
                                            slot_keys,
                                            slot_values,
                                            /*slot_positions=*/std::nullopt,
                                            given,
                                            resolved,
                                            /*with_mass=*/false));
}

}  // namespace ctx
