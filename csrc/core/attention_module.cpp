#include "ctx/attention_module.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <cmath>

#include "core/attention_calls.h"
#include "core/attention_options.h"
#include "core/memory_spec.h"
#include "core/module_check.h"
#include "core/module_parts.h"
#include "ops/check.h"
#include "ops/rows.h"
#include "ops/shapes.h"

namespace ctx {
namespace {

using at::Tensor;

constexpr const char* kLayerWhere = "ctx.CompressiveAttention";

// [B, T, heads D] as [B, heads, T, D], and the way back.
Tensor split_heads(const Tensor& x, int64_t heads) {
  return x.unflatten(-1, {heads, -1}).transpose(1, 2);
}
Tensor joined_heads(const Tensor& x) { return x.transpose(1, 2).flatten(2); }

torch::nn::LinearOptions projection(int64_t in, int64_t out, bool bias) {
  return torch::nn::LinearOptions(in, out).bias(bias);
}

}  // namespace

CompressiveAttentionImpl::CompressiveAttentionImpl(CompressiveAttentionOptions given)
    : options(std::move(given)) {
  options.validate();
  law_ = std::make_shared<const LayerLaw>(law_of(options));
  const LayerSpec layer =
      layer_spec(law_->shape, law_->settings, options.position, options.compressor);
  spec_ = std::make_shared<const MemorySpec>(MemorySpec{{layer}});
  reset();
}

void CompressiveAttentionImpl::reset() {
  const int64_t heads = options.num_heads, kv_heads = law_->shape.kv_heads;
  const int64_t embed_dim = options.embed_dim, head_dim = law_->shape.head_dim;
  const auto linear = [&](const char* name, int64_t in, int64_t out) {
    return register_module(name, torch::nn::Linear(projection(in, out, options.bias)));
  };
  q_proj = linear("q_proj", embed_dim, heads * head_dim);
  k_proj = linear("k_proj", embed_dim, kv_heads * head_dim);
  v_proj = linear("v_proj", embed_dim, kv_heads * head_dim);
  out_proj = linear("out_proj", heads * head_dim, embed_dim);
  const CompressorModuleImpl::Sizes sizes{
      kv_heads, options.ratio, head_dim, head_dim, options.compressor_kernel.value_or(0)};
  compressor_ = register_module("compressor",
                                std::make_shared<CompressorModuleImpl>(options.compressor, sizes));
  if (options.compressed_bias == "learned")
    compressed_bias = register_parameter("compressed_bias", torch::empty({heads}));
  if (options.position == "relative") {
    relative_ = register_module(
        "relative",
        std::make_shared<RelativeImpl>(heads, head_dim, options.relative_dim.value_or(embed_dim)));
  }
  reset_bias();
}

void CompressiveAttentionImpl::reset_bias() {
  if (!compressed_bias.defined()) return;
  const double usual = options.slot_mass ? 0.0 : std::log(static_cast<double>(options.ratio));
  const at::NoGradGuard no_grad;
  compressed_bias.fill_(options.compressed_bias_init.value_or(usual));
}

void CompressiveAttentionImpl::reset_parameters() {
  for (torch::nn::Linear* map : {&q_proj, &k_proj, &v_proj, &out_proj}) (*map)->reset_parameters();
  compressor_->reset_parameters();
  if (relative_) relative_->reset_parameters();
  reset_bias();
}

ModelMemory CompressiveAttentionImpl::init_memory(
    int64_t batch_size,
    std::optional<at::ScalarType> dtype,
    std::optional<at::ScalarType> compressed_dtype) const {
  const Tensor& like = k_proj->weight;
  return empty_memory(spec_,
                      batch_size,
                      dtype.value_or(like.scalar_type()),
                      compressed_dtype,
                      like.device(),
                      "ctx.CompressiveAttention.init_memory");
}

LayerScores CompressiveAttentionImpl::scores(at::Device device) const {
  const ops::Ordinary ordinary;
  LayerScores made;
  const auto constant = [&](const std::vector<double>& numbers) {
    return at::tensor(numbers, at::kDouble).to(device, k_proj->weight.scalar_type());
  };
  if (compressed_bias.defined()) made.bias = compressed_bias;
  if (options.compressed_bias == "log_ratio") {
    const double bias = std::log(static_cast<double>(options.ratio));
    made.bias = constant(std::vector<double>(options.num_heads, bias));
  }
  if (options.position == "alibi") made.slopes = constant(alibi_slopes(options.num_heads));
  if (relative_) made.relative = relative_->operands();
  return made;
}

Tensor CompressiveAttentionImpl::run(const Tensor& input,
                                     at::TensorList held,
                                     ModuleCall& call,
                                     std::vector<Tensor>& rings) {
  const auto& lengths = call.tokens().lengths;
  // Padding has no influence on gradients, be it NaN.
  const Tensor x = lengths && at::GradMode::is_enabled() ? blanked(input, *lengths) : input;
  Tensor q = split_heads(apart(x, {q_proj.get()})[0], options.num_heads);
  const std::vector<Tensor> pairs = apart(x, {k_proj.get(), v_proj.get()});
  Tensor k = split_heads(pairs[0], law_->shape.kv_heads);
  Tensor v = split_heads(pairs[1], law_->shape.kv_heads);
  const at::ScalarType dtype = q.scalar_type();
  if (!held.empty()) {
    const at::ScalarType kept = held[0].scalar_type();
    q = q.to(kept), k = k.to(kept), v = v.to(kept);
  }
  const Compressor compressor = compressor_->compressor();
  const LayerScores operands = scores(x.device());
  const Tensor out = attend_layer({q, k, v, *law_, compressor, operands, held, call}, rings);
  Tensor y = apart(joined_heads(out.to(dtype)), {out_proj.get()})[0];
  if (options.dropout > 0.0) y = at::dropout(y, options.dropout, is_training());
  return lengths ? blanked(y, *lengths) : y;
}

ModuleOutput CompressiveAttentionImpl::forward(const Tensor& x,
                                               const ModelMemory& memory,
                                               const CallOptions& said) {
  ops::check_shape(kLayerWhere, "x", x, {{"B"}, {"T"}, {"E", options.embed_dim}});
  check_floating_input(x, k_proj->weight, kLayerWhere);
  ModuleCall call = checked_call(spec_, x, "x", memory, said, kLayerWhere);
  std::vector<Tensor> rings;
  const at::TensorList held =
      memory.defined() ? ops::rings_of(memory.tensors(), 0) : at::TensorList();
  const Tensor y = run(x, held, call, rings);
  return {y, call.finish(spec_, std::move(rings), law_->packed)};
}

void CompressiveAttentionImpl::pretty_print(std::ostream& stream) const {
  const Schedule& s = law_->settings.schedule;
  stream << "ctx::CompressiveAttention(" << options.embed_dim << ", num_heads=" << options.num_heads
         << ", num_kv_heads=" << law_->shape.kv_heads << ", window=" << s.window
         << ", compressed=" << s.compressed << ", ratio=" << s.ratio << ", segment=" << s.segment
         << ", sinks=" << s.sinks << ", position=" << options.position << ")";
}

}  // namespace ctx
