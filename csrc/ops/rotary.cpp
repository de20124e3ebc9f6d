// ctx::rotary: rotary position embedding at given positions (Su et al. 2021, arXiv:2104.09864).
// Angles are made in float64, the result has x's dtype. Its backward is itself, at the negative
// positions.
#include "ops/rotary.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include "core/check.h"
#include "ops/derivatives.h"
#include "ops/layout.h"
#include "ops/registry.h"
#include "ops/settings.h"

namespace ctx::ops {
namespace {

using at::Tensor;

Tensor rotary(const Tensor& x, const Tensor& position, int64_t dim, double base, bool interleaved) {
  constexpr const char* where = "ctx.rotary";
  CTX_CHECK_VALUE(x.dim() == 4, where, "x must be [B, heads, T, D], got ", x.sizes());
  CTX_CHECK_VALUE(
      position.dim() == 2 && position.size(0) == x.size(0) && position.size(1) == x.size(2),
      where,
      "position must be [B, T] = [",
      x.size(0),
      ", ",
      x.size(2),
      "], got ",
      position.sizes());
  CTX_CHECK_VALUE(position.device() == x.device(),
                  where,
                  "position must be on ",
                  x.device(),
                  " as x, got ",
                  position.device());
  RotateArgs args;
  args.storage = storage_of(x.scalar_type(), where, "x");
  args.rotary = parse_rotary(dim, base, interleaved, x.size(3), where);
  args.device = device_index(x);
  args.batch = x.size(0), args.heads = x.size(1), args.tokens = x.size(2),
  args.head_dim = x.size(3);
  const Tensor positions = position.to(at::kDouble).contiguous();
  const Tensor in = rows(x);
  const Tensor out = at::empty(x.sizes(), x.options());
  args.positions = positions.const_data_ptr<double>();
  args.in = strided(in);
  args.out = strided(out);
  if (out.numel() > 0) kernels_for(x.device().type()).rotate(args);
  return out;
}

Tensor rotary_meta(const Tensor& x,
                   const Tensor& /*position*/,
                   int64_t /*dim*/,
                   double /*base*/,
                   bool /*interleaved*/) {
  return x.new_empty_symint(x.sym_sizes());
}

Tensor call(const Tensor& x, const Tensor& position, int64_t dim, double base, bool interleaved) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("ctx::rotary", "").typed<decltype(rotary)>();
  return op.call(x, position, dim, base, interleaved);
}

class RotaryFunction : public torch::autograd::Function<RotaryFunction> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* saved,
                        const Tensor& x,
                        const Tensor& position,
                        int64_t dim,
                        double base,
                        bool interleaved) {
    at::AutoDispatchBelowADInplaceOrView guard;
    saved->save_for_backward({position});
    saved->saved_data["dim"] = dim;
    saved->saved_data["base"] = base;
    saved->saved_data["interleaved"] = interleaved;
    return call(x, position, dim, base, interleaved);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* saved,
                                                 torch::autograd::variable_list grads) {
    const auto& data = saved->saved_data;
    const Tensor back = saved->get_saved_variables()[0].neg();
    return {call(grads[0],
                 back,
                 data.at("dim").toInt(),
                 data.at("base").toDouble(),
                 data.at("interleaved").toBool()),
            Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }
};

// Out of torch's own operators, where autograd is to record them.
Tensor rotary_composite(
    const Tensor& x, const Tensor& position, int64_t dim, double base, bool interleaved) {
  const auto type = arithmetic_type(x.scalar_type());
  const int64_t pairs = dim / 2;
  const Tensor frequency =
      at::pow(base, at::arange(pairs, position.options().dtype(at::kDouble)).mul(-2.0 / dim));
  const Tensor angle = position.to(at::kDouble).unsqueeze(1).unsqueeze(-1) * frequency;
  const Tensor cosine = angle.cos().to(type), sine = angle.sin().to(type);  // [B, 1, T, pairs]
  const Tensor turned = x.slice(-1, 0, dim).to(type);
  const auto half = [&](int64_t i) {
    return interleaved ? turned.unflatten(-1, {pairs, 2}).select(-1, i)
                       : turned.slice(-1, i * pairs, (i + 1) * pairs);
  };
  const Tensor first = half(0) * cosine - half(1) * sine;
  const Tensor second = half(1) * cosine + half(0) * sine;
  const Tensor rotated =
      interleaved ? at::stack({first, second}, -1).flatten(-2) : at::cat({first, second}, -1);
  return at::cat({rotated.to(x.scalar_type()), x.slice(-1, dim)}, -1);
}

Tensor rotary_autograd(
    const Tensor& x, const Tensor& position, int64_t dim, double base, bool interleaved) {
  if (is_recorded(x)) return rotary_composite(x, position, dim, base, interleaved);
  return RotaryFunction::apply(x, position, dim, base, interleaved);
}

}  // namespace

Tensor rotate(const Tensor& x, const Tensor& position, const BasedRotary& rotary) {
  return rotary.dim == 0 ? x : call(x, position, rotary.dim, rotary.base, rotary.interleaved);
}

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def(
      "rotary(Tensor x, Tensor position, int dim, float base=10000.0, bool interleaved=False) -> "
      "Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CPU, m) { m.impl("rotary", rotary); }
TORCH_LIBRARY_IMPL(ctx, CUDA, m) { m.impl("rotary", rotary); }
TORCH_LIBRARY_IMPL(ctx, Meta, m) { m.impl("rotary", rotary_meta); }
TORCH_LIBRARY_IMPL(ctx, Autograd, m) { m.impl("rotary", rotary_autograd); }

}  // namespace ctx::ops
