// ctx::compress: groups of c pairs -> slots, out of torch's own operators (compressor.h says what
// each computes).
#include "ops/compress.h"

#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <cmath>
#include <optional>

#include "ops/check.h"
#include "ops/derivatives.h"
#include "ops/finite.h"
#include "ops/settings.h"
#include "ops/shapes.h"

namespace ctx::ops {
namespace {

// Rows of the last dimension that are not finite, apart from the others. Zero times NaN is NaN: such
// a row, whose slot may be one that no query sees, would make the gradient of a parameter NaN. So it
// is zero as an operand, and what is made of it gets NaN besides, whose gradient reaches the row
// where it is NaN itself.
class Apart {
 public:
  explicit Apart(const at::Tensor& rows) : rows_(rows) {
    if (!at::GradMode::is_enabled() || surely_finite(rows)) return;
    const at::Tensor finite = at::isfinite(rows.detach()).all(-1, true);
    rows_ = rows.masked_fill(finite.logical_not(), 0.0);
    poison_ = rows.masked_fill(finite, 0.0).mul(0.0).sum(-1, true);
  }

  const at::Tensor& rows() const { return rows_; }

  // What was made of the rows, [..., any width].
  at::Tensor mark(const at::Tensor& made) const {
    return poison_.defined() ? made + poison_ : made;
  }

 private:
  at::Tensor rows_;
  at::Tensor
      poison_;  // [..., 1]: NaN or zero; undefined where all is finite, or no gradient wanted
};

// x [B, Hkv, G, k, D], weight [Hkv, k, D, E]: one matrix product per kv head, over the groups of
// all rows at once.
at::Tensor convolve(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  const Apart apart(x.flatten(3));
  const at::Tensor rows = apart.rows().transpose(0, 1).flatten(1, 2);  // [Hkv, B G, k D]
  const at::Tensor matrix = weight.to(x.scalar_type()).flatten(1, 2);  // [Hkv, k D, E]
  const at::Tensor slots = apart.mark(
      at::bmm(rows, matrix).unflatten_symint(1, {x.sym_size(0), x.sym_size(2)}).transpose(0, 1));
  return bias.defined() ? slots + bias.to(x.scalar_type()).unsqueeze(1) : slots;
}

// The maximum of tokens, x [B, Hkv, G, c, D].
at::Tensor maximum(const at::Tensor& x) {
  const Apart apart(x.flatten(3));
  return apart.mark(apart.rows().unflatten_symint(-1, x.sym_sizes().slice(3)).amax(3));
}

// ReLU(x_i W_0 + x_(i + dilation) W_1), x [B, Hkv, G, n, D], weight [Hkv, 2, D, E]: what is left of
// n tokens, each pair of them as a group of two.
at::Tensor dilate(const at::Tensor& x, const at::Tensor& weight, int64_t dilation) {
  const c10::SymInt left = x.sym_size(3) - dilation;
  const at::Tensor pairs =
      at::stack({x.narrow_symint(3, 0, left), x.narrow_symint(3, c10::SymInt(dilation), left)}, 4);
  const at::Tensor hidden = convolve(pairs.flatten(2, 3), weight, {});  // [B, Hkv, G left, E]
  return hidden.unflatten_symint(2, {x.sym_size(2), left}).relu();
}

at::Tensor convolve_dilated(const at::Tensor& x,
                            const at::Tensor& first,
                            const at::Tensor& deeper,
                            const at::Tensor& weight) {
  at::Tensor hidden = dilate(x, first, 1);
  for (int64_t layer = 0; layer < deeper.size(1); ++layer)
    hidden = dilate(hidden, deeper.select(1, layer), int64_t{2} << layer);
  return convolve(hidden, weight, {});
}

// A softmax over the tokens of a group: of what is pooled with its weights, and its entropy.
class Gate {
 public:
  Gate(const at::Tensor& keys, const at::Tensor& direction, const at::Tensor& position)
      : from_(keys.flatten(3)) {
    const auto type = keys.scalar_type();
    const at::Tensor read = from_.rows().unflatten_symint(-1, keys.sym_sizes().slice(3));
    const at::Tensor content =
        at::matmul(read, direction.to(type).unsqueeze(1).unsqueeze(-1)).squeeze(-1);
    scores_.emplace(content + position.to(type).unsqueeze(1));  // huge keys may overflow it
    weight_ = scores_->rows().softmax(-1);                      // [B, Hkv, G, c]
  }

  at::Tensor pool(const at::Tensor& x) const {
    const Apart pooled(x.flatten(3));
    const at::Tensor tokens = pooled.rows().unflatten_symint(-1, x.sym_sizes().slice(3));
    return pooled.mark(mark(at::matmul(weight_.unsqueeze(-2), tokens).squeeze(-2)));
  }

  at::Tensor entropy() const {
    const at::Tensor made = scores_->rows().log_softmax(-1).mul(weight_).sum(-1, true).neg();
    return mark(made).squeeze(-1);
  }

 private:
  at::Tensor mark(const at::Tensor& made) const { return from_.mark(scores_->mark(made)); }

  Apart from_;
  std::optional<Apart> scores_;
  at::Tensor weight_;
};

Slots compress(const at::Tensor& keys,
               const at::Tensor& values,
               OptionalList operands,
               c10::string_view compressor,
               int64_t mass_ratio) {
  constexpr const char* where = "ctx.compress";
  const at::TensorList parameters = or_empty(operands);
  const auto precision = own_precision();
  CTX_CHECK_VALUE(mass_ratio >= 0, where, "mass_ratio must be at least 0, got ", mass_ratio);
  check_shape(where, "keys", keys, {{"B"}, {"Hkv"}, {"G"}, {"c"}, {"D"}});
  CTX_CHECK_VALUE(
      values.dim() == 5 && values.sym_sizes().slice(0, 4) == keys.sym_sizes().slice(0, 4),
      where,
      "values must be [B, Hkv, G, c, Dv] with the keys' B, Hkv, G, c, got ",
      values.sym_sizes(),
      " for keys ",
      keys.sym_sizes());
  check_type(where, "values", values, keys.scalar_type(), " as keys");
  check_floating(where, "keys", keys);
  const CompressorKind kind = parse_compressor({compressor.data(), compressor.size()}, where);
  const auto size = [](const at::Tensor& x, int64_t dim) {
    return x.sym_size(dim).guard_int(__FILE__, __LINE__);
  };
  // How many of the tokens are the group's, only the parameters can say.
  int64_t ratio = size(keys, 3);
  if (kind == CompressorKind::kDilated && parameters.size() == 6 && parameters[2].defined() &&
      parameters[2].dim() == 4 && parameters[2].sym_size(1) >= 1) {
    ratio = size(parameters[2], 1);
    const int64_t read = ratio + dilated_overlap(ratio);
    CTX_CHECK_VALUE(size(keys, 3) == read,
                    where,
                    "keys must be groups of c + overlap = ",
                    read,
                    " tokens, got ",
                    keys.sym_sizes());
  }
  check_parameters(kind,
                   parameters,
                   size(keys, 1),
                   ratio,
                   kind == CompressorKind::kDilated ? dilated_overlap(ratio) : 0,
                   size(keys, 4),
                   size(values, 4),
                   keys.device(),
                   where);
  return compress_groups(keys, values, parameters, kind, mass_ratio);
}

auto compress_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::compress", "")
                             .typed<decltype(compress)>();
  return op;
}

// One operator in the graph, whose backward computes the slots again, recorded.
class CompressFunction : public torch::autograd::Function<CompressFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* saved,
                                                at::TensorList inputs,  // keys, values, parameters
                                                c10::string_view compressor,
                                                int64_t mass_ratio) {
    at::AutoDispatchBelowADInplaceOrView guard;
    saved->save_for_backward(inputs.vec());
    saved->saved_data["compressor"] = std::string(compressor);
    saved->saved_data["mass_ratio"] = mass_ratio;
    const auto [keys, values, mass] =
        compress_op().call(inputs[0], inputs[1], inputs.slice(2), compressor, mass_ratio);
    return {keys, values, mass};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* saved,
                                                 torch::autograd::variable_list grads) {
    const bool differentiated = at::GradMode::is_enabled();
    torch::autograd::variable_list inputs = saved->get_saved_variables(), wanted, result;
    for (at::Tensor& x : inputs) {
      if (!x.requires_grad()) continue;
      if (!differentiated) x = x.detach().requires_grad_();
      wanted.push_back(x);
    }
    const at::AutoGradMode recorded(true);
    const std::string compressor = saved->saved_data["compressor"].toStringRef();
    const auto [keys, values, mass] = compress(inputs[0],
                                               inputs[1],
                                               at::TensorList(inputs).slice(2),
                                               compressor,
                                               saved->saved_data["mass_ratio"].toInt());
    torch::autograd::variable_list made, given;
    const at::Tensor all[] = {keys, values, mass};
    for (size_t i = 0; i < 3; ++i) {
      if (!all[i].requires_grad() || !grads[i].defined()) continue;
      made.push_back(all[i]), given.push_back(grads[i]);
    }
    if (!made.empty())
      wanted = torch::autograd::grad(
          made, wanted, given, /*retain_graph=*/differentiated, differentiated, true);
    size_t next = 0;
    for (const at::Tensor& x : inputs)
      result.push_back(x.requires_grad() && !made.empty() ? wanted[next++] : at::Tensor());
    result.resize(inputs.size() + 2);
    return result;
  }
};

Slots compress_autograd(const at::Tensor& keys,
                        const at::Tensor& values,
                        OptionalList operands,
                        c10::string_view compressor,
                        int64_t mass_ratio) {
  const at::TensorList parameters = or_empty(operands);
  if (is_recorded(keys, values, parameters))
    return compress(keys, values, operands, compressor, mass_ratio);
  std::vector<at::Tensor> inputs = {keys, values};
  inputs.insert(inputs.end(), parameters.begin(), parameters.end());
  const auto made = CompressFunction::apply(at::TensorList(inputs), compressor, mass_ratio);
  return {made[0], made[1], made[2]};
}

}  // namespace

Slots compress_groups(const at::Tensor& keys,
                      const at::Tensor& values,
                      at::TensorList p,
                      CompressorKind kind,
                      int64_t mass_ratio) {
  const auto mass = [&] {
    if (mass_ratio == 0) return keys.new_empty({0});
    return at::full_symint(
        keys.sym_sizes().slice(0, 3), std::log(static_cast<double>(mass_ratio)), keys.options());
  };
  switch (kind) {
    case CompressorKind::kMax:
      return {maximum(keys), maximum(values), mass()};
    case CompressorKind::kConv: {
      const bool biased = p.size() == 4;
      return {convolve(keys, p[0], biased ? p[2] : at::Tensor()),
              convolve(values, p[1], biased ? p[3] : at::Tensor()),
              mass()};
    }
    case CompressorKind::kDilated:
      return {convolve_dilated(keys, p[0], p[1], p[2]),
              convolve_dilated(values, p[3], p[4], p[5]),
              mass()};
    case CompressorKind::kGated: {
      const Gate of_keys(keys, p[0], p[1]);
      const at::Tensor entropy = mass_ratio > 0 ? of_keys.entropy() : mass();
      return {of_keys.pool(keys), Gate(keys, p[2], p[3]).pool(values), entropy};
    }
    case CompressorKind::kMostUsed:
      CTX_CHECK_VALUE(
          false, "ctx.compress", "compressor must be one that needs no queries, got \"most_used\"");
    case CompressorKind::kGiven:
      CTX_CHECK_VALUE(
          false, "ctx.compress", "compressor must be one of the engine's, got \"custom\"");
    case CompressorKind::kMean:
      break;
  }
  return {keys.mean(3), values.mean(3), mass()};
}

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def(
      "compress(Tensor keys, Tensor values, Tensor[]? parameters, str compressor, int mass_ratio) "
      "-> (Tensor keys, Tensor values, Tensor mass)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CompositeExplicitAutograd, m) { m.impl("compress", compress); }
TORCH_LIBRARY_IMPL(ctx, Autograd, m) { m.impl("compress", compress_autograd); }

}  // namespace ctx::ops
