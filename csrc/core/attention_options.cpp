#include "core/attention_options.h"

#include <algorithm>
#include <cmath>

#include "core/settings.h"
#include "ops/check.h"
#include "ops/settings.h"

namespace ctx {
namespace {

int64_t head_dim_of(const CompressiveAttentionOptions& x) { return x.embed_dim / x.num_heads; }

Schedule schedule_of(const CompressiveAttentionOptions& x) {
  return {x.window, x.compressed, x.ratio, x.segment.value_or(x.ratio), x.sinks};
}

AttentionSettings settings_of(const CompressiveAttentionOptions& x) {
  AttentionSettings made;
  made.schedule = schedule_of(x);
  made.distance = x.distance;
  made.rotary_dim = x.position == "rotary" ? x.rotary_dim.value_or(head_dim_of(x)) : 0;
  made.rotary_base = x.rotary_base;
  made.rotary_interleaved = x.rotary_interleaved;
  if (x.position == "rotary") made.inv_freq = x.inv_freq;
  made.attention_factor = x.attention_factor;
  made.scale = x.scale;
  made.slot_mass = x.slot_mass;
  made.logit_softcap = x.logit_softcap;
  return made;
}

// Tokens left of a group that the compressor reads.
int64_t overlap_of(const CompressiveAttentionOptions& x) {
  const Compressor shapes = Compressor::make(x.compressor,
                                             1,
                                             x.ratio,
                                             1,
                                             1,
                                             at::TensorOptions(at::kMeta),
                                             x.compressor_kernel.value_or(0));
  return shapes.reads_left(x.ratio);
}

}  // namespace

void check_one_of(const std::string& value,
                  const char* name,
                  std::initializer_list<const char*> allowed,
                  const char* where) {
  std::string names;
  bool found = false;
  for (const char* one : allowed) {
    names += (names.empty() ? "" : ", ") + std::string(one);
    found = found || value == one;
  }
  CTX_CHECK_VALUE(found, where, name, " must be one of ", names, ", got ", value);
}

void check_options(const CompressiveAttentionOptions& x, const char* where) {
  check_size(where, "embed_dim", x.embed_dim);
  check_size(where, "num_heads", x.num_heads);
  if (x.num_kv_heads) check_size(where, "num_kv_heads", *x.num_kv_heads);
  check_size(where, "max_rewind", x.max_rewind);
  CTX_CHECK_VALUE(x.memory_content == "kv",
                  where,
                  "memory_content must be kv in C++, where layer inputs are not remembered, got ",
                  x.memory_content);
  CTX_CHECK_VALUE(!x.aux_loss,
                  where,
                  "aux_loss must be absent in C++, where there is no auxiliary loss, got ",
                  x.aux_loss.value_or(""));
  check_one_of(x.distance, "distance", {"slot", "token"}, where);
  check_one_of(x.compressed_bias, "compressed_bias", {"none", "log_ratio", "learned"}, where);
  check_one_of(x.compressor_grad, "compressor_grad", {"task", "aux"}, where);
  check_one_of(x.position, "position", {"rotary", "relative", "alibi", "none"}, where);
  check_one_of(
      x.compressor, "compressor", {"mean", "max", "conv", "dilated", "gated", "most_used"}, where);
  CTX_CHECK_VALUE(x.dropout >= 0.0 && x.dropout < 1.0,
                  where,
                  "dropout must be at least 0 and below 1, got ",
                  x.dropout);
  CTX_CHECK_VALUE(x.embed_dim % x.num_heads == 0,
                  where,
                  "embed_dim must be a multiple of num_heads = ",
                  x.num_heads,
                  ", got ",
                  x.embed_dim);
  CTX_CHECK_VALUE(x.num_heads % x.num_kv_heads.value_or(x.num_heads) == 0,
                  where,
                  "num_kv_heads must divide num_heads = ",
                  x.num_heads,
                  ", got ",
                  x.num_kv_heads.value_or(0));
  const double start = x.compressed_bias_init.value_or(0.0);
  CTX_CHECK_VALUE(std::isfinite(start), where, "compressed_bias_init must be finite, got ", start);
  CTX_CHECK_VALUE(!x.compressed_bias_init || x.compressed_bias == "learned",
                  where,
                  "compressed_bias_init must be absent for compressed_bias ",
                  x.compressed_bias,
                  ", got ",
                  start);
  CTX_CHECK_VALUE(!x.slot_mass || x.compressed_bias != "log_ratio",
                  where,
                  "compressed_bias must be none or learned with slot_mass, which counts the tokens "
                  "of a slot already, got log_ratio");
  const int64_t sinusoids = x.relative_dim.value_or(x.embed_dim);
  CTX_CHECK_VALUE(sinusoids >= 1 && (x.position != "relative" || sinusoids % 2 == 0),
                  where,
                  "relative_dim must be even and positive, got ",
                  sinusoids);
  CTX_CHECK_VALUE(!x.compressor_kernel || x.compressor == "conv",
                  where,
                  "compressor_kernel must be absent unless conv compresses, got ",
                  x.compressor_kernel.value_or(0));
  schedule_of(x).validate();
  CTX_CHECK_VALUE(x.compressor_kernel.value_or(x.ratio) >= x.ratio,
                  where,
                  "compressor_kernel must be at least ratio = ",
                  x.ratio,
                  ", got ",
                  x.compressor_kernel.value_or(0));
  settings_of(x).validate(head_dim_of(x));
}

void CompressiveAttentionOptions::validate() const {
  check_options(*this, "ctx.CompressiveAttention");
}

LayerLaw law_of(const CompressiveAttentionOptions& x) {
  LayerLaw made;
  made.settings = settings_of(x).resolved(head_dim_of(x), overlap_of(x));
  made.compressor = x.compressor;
  made.packed = pack(made.settings, x.compressor);
  made.given = pack(made.settings, "custom");
  made.shape = {made.settings.schedule,
                x.num_kv_heads.value_or(x.num_heads),
                head_dim_of(x),
                head_dim_of(x),
                x.max_rewind,
                /*counts_attention=*/x.compressor == "most_used",
                x.slot_mass};
  made.constant_slots = x.compressor_grad == "aux";
  return made;
}

}  // namespace ctx
