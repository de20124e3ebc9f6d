#include "ctx/transformer.h"

#include <ATen/ATen.h>
#include <torch/nn/init.h>
#include <torch/nn/modules/container/modulelist.h>

#include <cmath>

#include "core/attention_calls.h"
#include "core/memory_spec.h"
#include "core/module_check.h"
#include "core/transformer_block.h"
#include "ops/check.h"
#include "ops/rows.h"
#include "ops/shapes.h"

namespace ctx {
namespace {

using at::Tensor;

constexpr const char* kModelWhere = "ctx.CompressiveTransformer.forward";

void check_vocabulary(const Tensor& tokens, int64_t vocab_size) {
  ops::check_type(kModelWhere, "tokens", tokens, at::kLong);
  ops::check_shape(kModelWhere, "tokens", tokens, {{"B"}, {"T"}});
  if (!tokens.is_cpu() || tokens.numel() == 0) return;
  const auto [low, high] = tokens.aminmax();
  const int64_t least = low.item<int64_t>(), most = high.item<int64_t>();
  CTX_CHECK_INDEX(least >= 0 && most < vocab_size,
                  kModelWhere,
                  "tokens must be in [0, ",
                  vocab_size,
                  "), got ",
                  least < 0 ? least : most);
}

// What stands behind the last token of every row, [B, 1, E]; anything where there is none.
Tensor last_of(const Tensor& x, const std::optional<Tensor>& lengths) {
  if (x.size(1) == 0) return at::constant_pad_nd(x, {0, 0, 0, 1});
  if (!lengths) return x.narrow(1, x.size(1) - 1, 1);
  const Tensor place = (*lengths - 1).clamp_min(0).reshape({-1, 1, 1});
  return x.gather(1, place.expand({-1, 1, x.size(2)}));
}

}  // namespace

CompressiveTransformerImpl::CompressiveTransformerImpl(CompressiveTransformerConfig given)
    : config(std::move(given)) {
  config.validate();
  reset();
}

void CompressiveTransformerImpl::reset() {
  const int64_t vocab_size = config.vocab_size, embed_dim = config.embed_dim;
  embedding = register_module("embedding", torch::nn::Embedding(vocab_size, embed_dim));
  blocks_ = register_module("blocks", std::make_shared<torch::nn::ModuleListImpl>());
  MemorySpec spec;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    blocks_->push_back(std::make_shared<BlockImpl>(config, layer));
    spec.layers.push_back(block(layer).attention->spec_->layers[0]);
  }
  spec_ = std::make_shared<const MemorySpec>(std::move(spec));
  norm_ = register_module("norm",
                          std::make_shared<NormImpl>(embed_dim, config.norm == "rms", config.bias));
  if (!config.tied) {
    const auto options = torch::nn::LinearOptions(embed_dim, vocab_size).bias(false);
    head = register_module("head", torch::nn::Linear(options));
  }
  reset_parameters();
}

void CompressiveTransformerImpl::reset_parameters() {
  const double std = 0.02, branch = std / std::sqrt(2.0 * static_cast<double>(config.num_layers));
  const auto linear = [](const torch::nn::Linear& map, double deviation) {
    torch::nn::init::normal_(map->weight, 0.0, deviation);
    if (map->bias.defined()) torch::nn::init::zeros_(map->bias);
  };
  const int64_t layers = config.num_layers;
  for (int64_t i = 0; i < layers; ++i) block(i).attention->reset_parameters();
  for (int64_t i = 0; i < layers; ++i) {
    BlockImpl& block = this->block(i);
    const CompressiveAttention& layer = block.attention;
    block.attention_norm->reset_parameters();
    for (const auto* map : {&layer->q_proj, &layer->k_proj, &layer->v_proj}) linear(*map, std);
    linear(layer->out_proj, branch);
    if (layer->relative_) layer->relative_->reset_parameters(std);
    block.mlp_norm->reset_parameters();
    linear(block.mlp->up, std);
    linear(block.mlp->down, branch);
  }
  norm_->reset_parameters();
  if (head) linear(head, std);
  torch::nn::init::normal_(embedding->weight, 0.0, std);
}

BlockImpl& CompressiveTransformerImpl::block(int64_t layer) const {
  return blocks_->at<BlockImpl>(layer);
}

CompressiveAttention CompressiveTransformerImpl::attention(int64_t layer) const {
  CTX_CHECK_INDEX(layer >= 0 && layer < config.num_layers,
                  "ctx.CompressiveTransformer.attention",
                  "layer must be between 0 and ",
                  config.num_layers - 1,
                  ", got ",
                  layer);
  return block(layer).attention;
}

ModelMemory CompressiveTransformerImpl::init_memory(
    int64_t batch_size, std::optional<at::ScalarType> compressed_dtype) const {
  const Tensor& like = embedding->weight;
  return empty_memory(spec_,
                      batch_size,
                      like.scalar_type(),
                      compressed_dtype,
                      like.device(),
                      "ctx.CompressiveTransformer.init_memory");
}

ModuleOutput CompressiveTransformerImpl::forward(const Tensor& tokens,
                                                 const ModelMemory& memory,
                                                 const CallOptions& said,
                                                 bool last_only) {
  check_vocabulary(tokens, config.vocab_size);
  ops::check_device(kModelWhere, "tokens", tokens, embedding->weight.device(), "the parameters'");
  ModuleCall call = checked_call(spec_, tokens, "tokens", memory, said, kModelWhere);
  Tensor x = at::dropout(embedding->forward(tokens), config.dropout, is_training());
  std::vector<Tensor> rings;
  for (int64_t layer = 0; layer < config.num_layers; ++layer) {
    const at::TensorList held =
        memory.defined() ? ops::rings_of(memory.tensors(), layer) : at::TensorList();
    std::vector<Tensor> made;
    x = block(layer).run(x, held, call, made);
    rings.insert(rings.end(), made.begin(), made.end());
  }
  const auto& lengths = said.lengths;
  if (last_only) x = last_of(x, lengths);
  const Tensor normed = norm_->forward(x);
  Tensor logits = head ? head->forward(normed) : at::linear(normed, embedding->weight);
  if (last_only) {
    logits = logits.select(1, 0);
    if (tokens.size(1) == 0) logits = logits.masked_fill(at::ones_like(logits, at::kBool), 0.0);
    if (lengths) logits = logits.masked_fill(lengths->lt(1).unsqueeze(-1), 0.0);
  } else if (lengths) {
    logits = blanked(logits, *lengths);
  }
  return {logits, call.finish(spec_, std::move(rings), block(0).attention->law_->packed)};
}

void CompressiveTransformerImpl::pretty_print(std::ostream& stream) const {
  stream << "ctx::CompressiveTransformer(vocab_size=" << config.vocab_size
         << ", embed_dim=" << config.embed_dim << ", num_layers=" << config.num_layers << ")";
}

}  // namespace ctx
