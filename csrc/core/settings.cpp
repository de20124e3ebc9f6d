#include "core/settings.h"

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>

#include "ops/check.h"

namespace ctx {
namespace {

constexpr const char* kSettingsWhere = "ctx.AttentionSettings";

void check_rotary(const AttentionSettings& s, int64_t head_dim) {
  CTX_CHECK_VALUE(s.rotary_dim >= 0 && s.rotary_dim <= head_dim && s.rotary_dim % 2 == 0,
                  kSettingsWhere,
                  "rotary_dim must be even and between 0 and head_dim = ",
                  head_dim,
                  ", got ",
                  s.rotary_dim);
  const auto positive = [](const char* name, double value) {
    CTX_CHECK_VALUE(std::isfinite(value) && value > 0,
                    kSettingsWhere,
                    name,
                    " must be positive and finite, got ",
                    value);
  };
  positive("rotary_base", s.rotary_base);
  positive("attention_factor", s.attention_factor);
  CTX_CHECK_VALUE(s.inv_freq.empty() || static_cast<int64_t>(s.inv_freq.size()) == s.rotary_dim / 2,
                  kSettingsWhere,
                  "inv_freq must be rotary_dim / 2 = ",
                  s.rotary_dim / 2,
                  " numbers, got ",
                  s.inv_freq.size());
  const bool fit = std::all_of(s.inv_freq.begin(), s.inv_freq.end(), [](double frequency) {
    return std::isfinite(frequency) && frequency >= 0;
  });
  CTX_CHECK_VALUE(fit, kSettingsWhere, "inv_freq must be finite and at least 0, got ", s.inv_freq);
  CTX_CHECK_VALUE(!s.keys_rotated || s.rotary_dim > 0,
                  kSettingsWhere,
                  "keys must be \"plain\" without rotary positions, got \"rotated\"");
}

}  // namespace

void AttentionSettings::validate(int64_t head_dim) const {
  schedule.validate();
  ops::parse_token_distance(distance, kSettingsWhere);
  check_rotary(*this, head_dim);
  CTX_CHECK_VALUE(std::isfinite(scale), kSettingsWhere, "scale must be finite, got ", scale);
  CTX_CHECK_VALUE(std::isfinite(logit_softcap) && logit_softcap >= 0,
                  kSettingsWhere,
                  "logit_softcap must be finite and at least 0, got ",
                  logit_softcap);
  CTX_CHECK_VALUE((rotary_dim > 0) + alibi_slopes.has_value() + !relative.empty() <= 1,
                  kSettingsWhere,
                  "position must be one of rotary_dim > 0, alibi_slopes and relative, got more");
}

std::string AttentionSettings::position() const {
  if (!relative.empty()) return "relative";
  if (alibi_slopes) return "alibi";
  return rotary_dim > 0 ? "rotary" : "none";
}

AttentionSettings AttentionSettings::resolved(int64_t head_dim, int64_t overlap) const {
  validate(head_dim);
  AttentionSettings made = *this;
  made.schedule.overlap = overlap;
  made.schedule.validate();
  if (made.scale == 0.0) made.scale = 1.0 / std::sqrt(static_cast<double>(head_dim));
  if (rotary_dim == 0) made.attention_factor = 1.0;
  if (inv_freq.empty()) {
    const double* const usual = ops::inverse_frequencies(rotary_dim, rotary_base);
    made.inv_freq.assign(usual, usual + rotary_dim / 2);
  }
  return made;
}

ops::PackedSettings pack(const AttentionSettings& x, const std::string& compressor) {
  ops::Settings settings;
  settings.clock = {x.schedule, ops::parse_token_distance(x.distance, kSettingsWhere)};
  settings.rotary = {
      x.rotary_dim, x.inv_freq.data(), x.attention_factor, x.rotary_interleaved, x.keys_rotated};
  settings.compressor = ops::parse_compressor(compressor, kSettingsWhere);
  settings.slot_mass = x.slot_mass;
  settings.scale = x.scale;
  settings.logit_softcap = x.logit_softcap;
  return ops::pack(settings);
}

PackedSettings packed(const AttentionSettings& settings, const std::string& compressor) {
  ops::PackedSettings made = pack(settings, compressor);
  return {std::move(made.settings), std::move(made.numbers)};
}

}  // namespace ctx
