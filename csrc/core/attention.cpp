#include "ctx/attention.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>

#include "core/check.h"
#include "ops/settings.h"

namespace ctx {

void AttentionOptions::validate(int64_t head_dim) const {
  constexpr const char* where = "ctx.AttentionOptions";
  schedule.validate();
  ops::parse_token_distance(distance, where);
  ops::parse_rotary(rotary_dim, rotary_base, rotary_interleaved, head_dim, where);
  CTX_CHECK_VALUE(std::isfinite(scale), where, "scale must be finite, got ", scale);
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
  static const auto due_groups =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("ctx::due_groups", "")
          .typed<std::tuple<Tensor, Tensor, Tensor>(const Tensor&,
                                                    const Tensor&,
                                                    const std::optional<Tensor>&,
                                                    const std::optional<Tensor>&,
                                                    at::TensorList,
                                                    at::IntArrayRef,
                                                    c10::string_view,
                                                    int64_t,
                                                    double,
                                                    bool)>();
  static const auto attend_sequence = c10::Dispatcher::singleton()
                                          .findSchemaOrThrow("ctx::attend_sequence", "")
                                          .typed<Tensor(const Tensor&,
                                                        const Tensor&,
                                                        const Tensor&,
                                                        const std::optional<Tensor>&,
                                                        const std::optional<Tensor>&,
                                                        at::TensorList,
                                                        const Tensor&,
                                                        const Tensor&,
                                                        const std::optional<Tensor>&,
                                                        at::IntArrayRef,
                                                        c10::string_view,
                                                        int64_t,
                                                        double,
                                                        bool,
                                                        double)>();
  CTX_CHECK_VALUE(
      q.dim() == 4, "ctx.compressive_attention", "q must be [B, H, T, D], got ", q.sizes());
  options.validate(q.size(3));
  const Schedule& s = options.schedule;
  const std::array<int64_t, 5> schedule = {s.window, s.compressed, s.ratio, s.segment, s.sinks};
  const double scale =
      options.scale == 0.0 ? 1.0 / std::sqrt(static_cast<double>(q.size(3))) : options.scale;
  const auto [keys, values, block] = due_groups.call(k,
                                                     v,
                                                     lengths,
                                                     reset_at,
                                                     memory,
                                                     schedule,
                                                     options.distance,
                                                     options.rotary_dim,
                                                     options.rotary_base,
                                                     options.rotary_interleaved);
  auto [slot_keys, slot_values] = compress(keys, values, compressor);
  if (constant_slots) slot_keys = slot_keys.detach(), slot_values = slot_values.detach();
  const std::optional<Tensor> given = bias && bias->defined() ? bias : std::nullopt;
  return attend_sequence.call(q,
                              k,
                              v,
                              lengths,
                              reset_at,
                              memory,
                              slot_keys,
                              slot_values,
                              given,
                              schedule,
                              options.distance,
                              options.rotary_dim,
                              options.rotary_base,
                              options.rotary_interleaved,
                              scale);
}

}  // namespace ctx
