// What a model is configured with, and the options of its layers.
#include "core/attention_options.h"
#include "core/settings.h"
#include "ctx/transformer.h"
#include "ops/check.h"

namespace ctx {
namespace {

constexpr const char* kConfigWhere = "ctx.CompressiveTransformerConfig";

void check_sizes(const Sizes& sizes, const char* name, int64_t layers) {
  const size_t count = sizes.numbers().size();
  CTX_CHECK_VALUE(count == 1 || static_cast<int64_t>(count) == layers,
                  kConfigWhere,
                  name,
                  " must be one number or num_layers = ",
                  layers,
                  ", got ",
                  count);
}

int64_t size_of(const Sizes& sizes, int64_t layer) {
  return sizes.numbers()[sizes.numbers().size() == 1 ? 0 : layer];
}

}  // namespace

CompressiveAttentionOptions CompressiveTransformerConfig::attention(int64_t layer) const {
  CompressiveAttentionOptions made;
  made.embed_dim = embed_dim;
  made.num_heads = num_heads;
  made.num_kv_heads = num_kv_heads;
  made.window = size_of(window, layer);
  made.compressed = size_of(compressed, layer);
  made.ratio = size_of(ratio, layer);
  if (segment) made.segment = size_of(*segment, layer);
  made.sinks = size_of(sinks, layer);
  made.compressor = compressor;
  made.compressor_kernel = compressor_kernel;
  made.memory_content = memory_content;
  made.position = position;
  made.relative_dim = relative_dim;
  made.distance = distance;
  made.compressed_bias = compressed_bias;
  made.compressed_bias_init = compressed_bias_init;
  made.compressor_grad = compressor_grad;
  made.aux_loss = aux_loss;
  made.dropout = dropout;
  made.bias = bias;
  made.rotary_base = rotary_base;
  made.rotary_dim = rotary_dim;
  made.rotary_interleaved = rotary_interleaved;
  made.max_rewind = max_rewind;
  return made;
}

void CompressiveTransformerConfig::validate() const {
  check_size(kConfigWhere, "vocab_size", vocab_size);
  check_size(kConfigWhere, "num_layers", num_layers);
  if (mlp_dim) check_size(kConfigWhere, "mlp_dim", *mlp_dim);
  check_one_of(mlp, "mlp", {"swiglu", "gelu"}, kConfigWhere);
  check_one_of(norm, "norm", {"rms", "layer"}, kConfigWhere);
  check_sizes(window, "window", num_layers);
  check_sizes(compressed, "compressed", num_layers);
  check_sizes(ratio, "ratio", num_layers);
  if (segment) check_sizes(*segment, "segment", num_layers);
  check_sizes(sinks, "sinks", num_layers);
  for (int64_t layer = 0; layer < num_layers; ++layer)
    check_options(attention(layer), kConfigWhere);
}

}  // namespace ctx
