// What modules are made of besides torch's own: a compressor's parameters, relative positions, norms.
#pragma once

#include <ATen/ATen.h>
#include <torch/nn/cloneable.h>
#include <torch/nn/modules/linear.h>
#include <torch/nn/pimpl.h>

#include <initializer_list>
#include <string>
#include <vector>

#include "ctx/compressor.h"

namespace ctx {

// A compressor's parameters by their names (compressor.h). Those without elements are not registered.
class CompressorModuleImpl : public torch::nn::Cloneable<CompressorModuleImpl> {
 public:
  struct Sizes {
    int64_t kv_heads, ratio, head_dim, value_dim, kernel;
  };

  CompressorModuleImpl(std::string name, Sizes sizes);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;

  // With the parameters as they are now.
  Compressor compressor() const;

 private:
  Compressor first_values() const;

  std::string name_;
  Sizes sizes_;
  std::vector<at::Tensor> operands_;  // in the engine's order
};

// The tensors of relative positions (settings.h).
class RelativeImpl : public torch::nn::Cloneable<RelativeImpl> {
 public:
  RelativeImpl(int64_t num_heads, int64_t head_dim, int64_t width);

  void reset() override;
  // Biases zero; weights normal of this deviation, or as a linear layer's where it is 0.
  void reset_parameters(double std = 0.0);
  void pretty_print(std::ostream& stream) const override;

  // In the order in which operators take them.
  const std::vector<at::Tensor>& operands() const { return operands_; }

 private:
  int64_t num_heads_, head_dim_, width_;
  std::vector<at::Tensor> operands_;
};

// Python's nn.RMSNorm with eps 1e-6, or nn.LayerNorm with or without a bias.
class NormImpl : public torch::nn::Cloneable<NormImpl> {
 public:
  NormImpl(int64_t width, bool rms, bool bias);

  void reset() override;
  void reset_parameters();
  void pretty_print(std::ostream& stream) const override;
  at::Tensor forward(const at::Tensor& x);

 private:
  int64_t width_;
  bool rms_, has_bias_;
  at::Tensor weight_, bias_;
};
TORCH_MODULE(Norm);

// What linear maps make of the rows of x [..., E]. Under grad a row that is not finite is zero as an
// operand and its results NaN, so that it has no influence on the gradients of weights unless a loss
// depends on it (python/ctx/finite.py).
std::vector<at::Tensor> apart(const at::Tensor& x,
                              std::initializer_list<torch::nn::LinearImpl*> maps);

// x [B, T, ...] with zero behind the first lengths[b] places of row b.
at::Tensor blanked(const at::Tensor& x, const at::Tensor& lengths);

// Slopes of ALiBi, one per head: 2^(-8/H), 2^(-16/H), ... 2^-8 (Press et al. 2022, arXiv:2108.12409,
// section 3). Where H is no power of two, as in the authors' code: those of the largest power of two
// below it, then every second one of twice that many heads.
std::vector<double> alibi_slopes(int64_t heads);

}  // namespace ctx
