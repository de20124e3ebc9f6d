// A block of a language model: attention and MLP around a residual stream.
#pragma once

#include <ATen/ATen.h>
#include <torch/nn/cloneable.h>

#include <vector>

#include "core/module_call.h"
#include "core/module_parts.h"
#include "ctx/transformer.h"

namespace ctx {

// x [B, T, E] -> [B, T, E]; "swiglu" (Shazeer 2020, arXiv:2002.05202) or "gelu".
class MlpImpl : public torch::nn::Cloneable<MlpImpl> {
 public:
  explicit MlpImpl(const CompressiveTransformerConfig& config);

  void reset() override;
  at::Tensor forward(const at::Tensor& x);
  void pretty_print(std::ostream& stream) const override { stream << "ctx::MLP"; }

  torch::nn::Linear up{nullptr}, down{nullptr};

 private:
  int64_t width_, inner_;
  bool gated_, has_bias_;
};
TORCH_MODULE(Mlp);

// Pre-norm: x + attention(norm(x)), then x + mlp(norm(x)).
class BlockImpl : public torch::nn::Cloneable<BlockImpl> {
 public:
  BlockImpl(CompressiveTransformerConfig config, int64_t layer);

  void reset() override;
  void pretty_print(std::ostream& stream) const override { stream << "ctx::Block"; }

  // As CompressiveAttentionImpl::run.
  at::Tensor run(const at::Tensor& x,
                 at::TensorList held,
                 ModuleCall& call,
                 std::vector<at::Tensor>& rings);

  Norm attention_norm{nullptr}, mlp_norm{nullptr};
  CompressiveAttention attention{nullptr};
  Mlp mlp{nullptr};

 private:
  CompressiveTransformerConfig config_;
  int64_t layer_;
};

}  // namespace ctx
