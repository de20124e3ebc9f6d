#include "core/module_parts.h"

#include <ATen/core/grad_mode.h>
#include <c10/core/DefaultDtype.h>
#include <torch/nn/init.h>
#include <torch/types.h>

#include <bit>
#include <cmath>
#include <limits>

#include "ops/finite.h"

namespace ctx {
namespace {

using at::Tensor;

std::vector<const char*> parameter_names(const std::string& compressor) {
  if (compressor == "conv") return {"key_weight", "value_weight"};
  if (compressor == "dilated")
    return {"key_first", "key_hidden", "key_weight", "value_first", "value_hidden", "value_weight"};
  if (compressor == "gated") return {"key_gate", "key_position", "value_gate", "value_position"};
  return {};
}

}  // namespace

CompressorModuleImpl::CompressorModuleImpl(std::string name, Sizes sizes)
    : name_(std::move(name)), sizes_(sizes) {
  reset();
}

Compressor CompressorModuleImpl::first_values() const {
  return Compressor::make(name_,
                          sizes_.kv_heads,
                          sizes_.ratio,
                          sizes_.head_dim,
                          sizes_.value_dim,
                          at::TensorOptions(at::kDouble),
                          sizes_.kernel);
}

void CompressorModuleImpl::reset() {
  operands_.clear();
  const auto names = parameter_names(name_);
  const std::vector<Tensor> first = first_values().parameters;
  TORCH_INTERNAL_ASSERT(names.size() == first.size());
  for (size_t i = 0; i < first.size(); ++i) {
    const Tensor value = first[i].to(c10::get_default_dtype_as_scalartype());
    operands_.push_back(value.numel() == 0 ? value : register_parameter(names[i], value));
  }
}

void CompressorModuleImpl::reset_parameters() {
  const at::NoGradGuard no_grad;
  const std::vector<Tensor> first = first_values().parameters;
  for (size_t i = 0; i < first.size(); ++i)
    if (first[i].numel() > 0) operands_[i].copy_(first[i]);
}

Compressor CompressorModuleImpl::compressor() const {
  Compressor made{name_, operands_, nullptr};
  for (Tensor& operand : made.parameters)
    if (operand.numel() == 0) operand = operands_[0].new_zeros(operand.sizes());
  return made;
}

void CompressorModuleImpl::pretty_print(std::ostream& stream) const {
  stream << "ctx::Compressor(" << name_ << ", kv_heads=" << sizes_.kv_heads
         << ", ratio=" << sizes_.ratio << ", head_dim=" << sizes_.head_dim << ")";
}

RelativeImpl::RelativeImpl(int64_t num_heads, int64_t head_dim, int64_t width)
    : num_heads_(num_heads), head_dim_(head_dim), width_(width) {
  reset();
}

void RelativeImpl::reset() {
  const auto bias = [&](const char* name) {
    return register_parameter(name, torch::empty({num_heads_, head_dim_}));
  };
  const auto weight = [&](const char* name) {
    return register_parameter(name, torch::empty({num_heads_, head_dim_, width_}));
  };
  operands_ = {bias("key_bias"),
               bias("position_bias"),
               weight("position_weight"),
               bias("compressed_position_bias"),
               weight("compressed_position_weight")};
  reset_parameters();
}

void RelativeImpl::reset_parameters(double std) {
  const double bound = 1.0 / std::sqrt(static_cast<double>(width_));
  for (const int place : {0, 1, 3}) torch::nn::init::zeros_(operands_[place]);
  for (const int place : {2, 4}) {
    if (std > 0.0) {
      torch::nn::init::normal_(operands_[place], 0.0, std);
    } else {
      torch::nn::init::uniform_(operands_[place], -bound, bound);
    }
  }
}

void RelativeImpl::pretty_print(std::ostream& stream) const {
  stream << "ctx::Relative(" << num_heads_ << ", " << head_dim_ << ", " << width_ << ")";
}

NormImpl::NormImpl(int64_t width, bool rms, bool bias)
    : width_(width), rms_(rms), has_bias_(bias && !rms) {
  reset();
}

void NormImpl::reset() {
  weight_ = register_parameter("weight", torch::ones({width_}));
  if (has_bias_) bias_ = register_parameter("bias", torch::zeros({width_}));
}

void NormImpl::reset_parameters() {
  torch::nn::init::ones_(weight_);
  if (has_bias_) torch::nn::init::zeros_(bias_);
}

void NormImpl::pretty_print(std::ostream& stream) const {
  stream << (rms_ ? "ctx::RMSNorm(" : "ctx::LayerNorm(") << width_ << ")";
}

Tensor NormImpl::forward(const Tensor& x) {
  return rms_ ? at::rms_norm(x, {width_}, weight_, 1e-6)
              : at::layer_norm(x, {width_}, weight_, bias_, 1e-5);
}

std::vector<Tensor> apart(const Tensor& x, std::initializer_list<torch::nn::LinearImpl*> maps) {
  std::vector<Tensor> made;
  if (!at::GradMode::is_enabled() || ops::surely_finite(x)) {
    for (torch::nn::LinearImpl* map : maps) made.push_back(map->forward(x));
    return made;
  }
  const Tensor bad = x.detach().isfinite().all(-1, /*keepdim=*/true).logical_not();
  // NaN for such rows, else zero. Its gradient reaches the row where it is NaN, and is zero elsewhere.
  const Tensor poison = (x.masked_fill(bad.logical_not(), 0.0) * 0.0).sum(-1, /*keepdim=*/true);
  const Tensor clean = x.masked_fill(bad, 0.0);
  for (torch::nn::LinearImpl* map : maps) {
    const Tensor y = map->forward(clean);
    made.push_back(y + poison.to(y.scalar_type()));
  }
  return made;
}

Tensor blanked(const Tensor& x, const Tensor& lengths) {
  Tensor padding = at::arange(x.size(1), lengths.options()).ge(lengths.unsqueeze(1));
  for (int64_t dim = 2; dim < x.dim(); ++dim) padding = padding.unsqueeze(-1);
  return x.masked_fill(padding, 0.0);
}

std::vector<double> alibi_slopes(int64_t heads) {
  const auto power = static_cast<int64_t>(std::bit_floor(static_cast<uint64_t>(heads)));
  const auto slope = [](int64_t i, int64_t of) {
    return std::exp2(-8.0 * static_cast<double>(i) / static_cast<double>(of));
  };
  std::vector<double> made;
  for (int64_t i = 1; i <= power; ++i) made.push_back(slope(i, power));
  for (int64_t i = 1; i <= 2 * power; i += 2) made.push_back(slope(i, 2 * power));
  made.resize(heads);
  return made;
}

}  // namespace ctx
