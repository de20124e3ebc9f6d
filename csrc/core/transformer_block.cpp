#include "core/transformer_block.h"

namespace ctx {

using at::Tensor;

namespace {

// As many parameters in either form: the gated one has three matrices, not two.
int64_t inner_width(const CompressiveTransformerConfig& config) {
  if (config.mlp_dim) return *config.mlp_dim;
  const int64_t usual = 4 * config.embed_dim;
  return config.mlp == "swiglu" ? (2 * usual + 23) / 24 * 8 : usual;
}

}  // namespace

MlpImpl::MlpImpl(const CompressiveTransformerConfig& config)
    : width_(config.embed_dim),
      inner_(inner_width(config)),
      gated_(config.mlp == "swiglu"),
      has_bias_(config.bias) {
  reset();
}

void MlpImpl::reset() {
  using Options = torch::nn::LinearOptions;
  const int64_t first = gated_ ? 2 * inner_ : inner_;
  up = register_module("up", torch::nn::Linear(Options(width_, first).bias(has_bias_)));
  down = register_module("down", torch::nn::Linear(Options(inner_, width_).bias(has_bias_)));
}

Tensor MlpImpl::forward(const Tensor& x) {
  const Tensor hidden = up->forward(x);
  if (!gated_) return down->forward(at::gelu(hidden));
  const std::vector<Tensor> halves = hidden.chunk(2, -1);
  return down->forward(at::silu(halves[0]) * halves[1]);
}

BlockImpl::BlockImpl(CompressiveTransformerConfig config, int64_t layer)
    : config_(std::move(config)), layer_(layer) {
  reset();
}

void BlockImpl::reset() {
  const auto norm = [&](const char* name) {
    return register_module(name, Norm(config_.embed_dim, config_.norm == "rms", config_.bias));
  };
  attention_norm = norm("attention_norm");
  attention = register_module("attention", CompressiveAttention(config_.attention(layer_)));
  mlp_norm = norm("mlp_norm");
  mlp = register_module("mlp", Mlp(config_));
}

Tensor BlockImpl::run(const Tensor& input,
                      at::TensorList held,
                      ModuleCall& call,
                      std::vector<Tensor>& rings) {
  const Tensor y = attention->run(attention_norm->forward(input), held, call, rings);
  const Tensor x = input + y;  // dropped out by the layer itself
  return x + at::dropout(mlp->forward(mlp_norm->forward(x)), config_.dropout, is_training());
}

}  // namespace ctx
