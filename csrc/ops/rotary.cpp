// ctx::rotary: rotary position embedding at given positions (Su et al. 2021, arXiv:2104.09864).
// Angles are made in float64, the result has x's dtype. Its backward is itself, at the negative
// positions.
#include "ops/rotary.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <map>
#include <mutex>

#include "ops/check.h"
#include "ops/derivatives.h"
#include "ops/layout.h"
#include "ops/registry.h"
#include "ops/settings.h"
#include "ops/shapes.h"

namespace ctx::ops {
namespace {

using at::Tensor;

constexpr const char* kRotaryWhere = "ctx.rotary";

Rotary check(const Tensor& x,
             const Tensor& position,
             at::IntArrayRef settings,
             at::ArrayRef<double> numbers) {
  check_shape(kRotaryWhere, "x", x, {{"B"}, {"heads"}, {"T"}, {"D"}});
  check_shape(kRotaryWhere, "position", position, {{"B", x.sym_size(0)}, {"T", x.sym_size(2)}});
  check_device(kRotaryWhere, "position", position, x.device(), " as x");
  const Settings unpacked = unpack(settings, numbers, kRotaryWhere);
  check_head_dim(unpacked, x.sym_size(3), kRotaryWhere);
  return unpacked.rotary;
}

Tensor rotary_meta(const Tensor& x,
                   const Tensor& /*position*/,
                   at::IntArrayRef /*settings*/,
                   at::ArrayRef<double> /*numbers*/) {
  return x.new_empty_symint(x.sym_sizes());
}

Tensor call(const Tensor& x,
            const Tensor& position,
            at::IntArrayRef settings,
            at::ArrayRef<double> numbers) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::rotary", "")
                             .typed<decltype(rotary_meta)>();
  return op.call(x, position, settings, numbers);
}

class RotaryFunction : public torch::autograd::Function<RotaryFunction> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* saved,
                        const Tensor& x,
                        const Tensor& position,
                        at::IntArrayRef settings,
                        at::ArrayRef<double> numbers) {
    at::AutoDispatchBelowADInplaceOrView guard;
    saved->save_for_backward({position});
    saved->saved_data["settings"] = settings.vec();
    saved->saved_data["numbers"] = numbers.vec();
    return call(x, position, settings, numbers);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* saved,
                                                 torch::autograd::variable_list grads) {
    const auto& data = saved->saved_data;
    const Tensor back = saved->get_saved_variables()[0].neg();
    return {
        call(
            grads[0], back, data.at("settings").toIntVector(), data.at("numbers").toDoubleVector()),
        Tensor(),
        Tensor(),
        Tensor()};
  }
};

// Out of torch's own operators: where autograd is to record them, and for devices without kernels.
Tensor rotary_composite(const Tensor& x, const Tensor& position, const Rotary& rotary) {
  const auto type = arithmetic_type(x.scalar_type());
  const int64_t pairs = rotary.dim / 2;
  const Tensor frequency =
      at::from_blob(const_cast<double*>(rotary.inv_freq), {pairs}, at::TensorOptions(at::kDouble))
          .clone()
          .to(position.device());
  const Tensor angle = position.to(at::kDouble).unsqueeze(1).unsqueeze(-1) * frequency;
  const double factor = rotary.attention_factor;
  const Tensor cosine = (angle.cos() * factor).to(type);  // [B, 1, T, pairs]
  const Tensor sine = (angle.sin() * factor).to(type);
  const Tensor turned = x.slice(-1, 0, rotary.dim).to(type);
  const auto half = [&](int64_t i) {
    return rotary.interleaved ? turned.unflatten(-1, {pairs, 2}).select(-1, i)
                              : turned.slice(-1, i * pairs, (i + 1) * pairs);
  };
  const Tensor first = half(0) * cosine - half(1) * sine;
  const Tensor second = half(1) * cosine + half(0) * sine;
  const Tensor made = rotary.interleaved ? at::stack({first, second}, -1).flatten(-2)
                                         : at::cat({first, second}, -1);
  return at::cat({made.to(x.scalar_type()), x.slice(-1, rotary.dim)}, -1);
}

Tensor rotary_elsewhere(const Tensor& x,
                        const Tensor& position,
                        at::IntArrayRef settings,
                        at::ArrayRef<double> numbers) {
  return rotary_composite(x, position, check(x, position, settings, numbers));
}

Tensor rotary_by_kernels(const Tensor& x,
                         const Tensor& position,
                         at::IntArrayRef settings,
                         at::ArrayRef<double> numbers) {
  if (!has_kernels(x.device().type())) return rotary_elsewhere(x, position, settings, numbers);
  return rotated(x, position, check(x, position, settings, numbers));
}

Tensor rotary_autograd(const Tensor& x,
                       const Tensor& position,
                       at::IntArrayRef settings,
                       at::ArrayRef<double> numbers) {
  if (is_recorded(x)) return rotary_elsewhere(x, position, settings, numbers);
  return RotaryFunction::apply(x, position, settings, numbers);
}

}  // namespace

Tensor rotate(const Tensor& x, const Tensor& position, const Rotary& rotary) {
  if (rotary.dim == 0) return x;
  Settings only;
  only.rotary = rotary;
  const PackedSettings packed = pack(only);
  return call(x, position, packed.settings, packed.numbers);
}

Rotary on_device(const Rotary& rotary, at::Device device) {
  if (rotary.dim == 0 || kernels_for(device.type()).host_reads) return rotary;
  static std::mutex mutex;
  // Never destroyed: a device may be gone when the program ends.
  static auto& all = *new std::map<std::pair<int, std::vector<double>>, Tensor>();
  const std::lock_guard<std::mutex> lock(mutex);
  const std::vector<double> numbers(rotary.inv_freq, rotary.inv_freq + rotary.dim / 2);
  Tensor& there = all[{device.index(), numbers}];
  if (!there.defined()) there = at::tensor(numbers, at::kDouble).to(device);
  Rotary moved = rotary;
  moved.inv_freq = there.const_data_ptr<double>();
  return moved;
}

Tensor rotated(const Tensor& x, const Tensor& position, const Rotary& rotary, bool inverse) {
  if (rotary.dim == 0) return x;
  RotateArgs args;
  args.storage = storage_of(x.scalar_type(), kRotaryWhere, "x");
  args.rotary = on_device(rotary, x.device());
  args.inverse = inverse;
  args.device = device_index(x);
  args.batch = x.size(0), args.heads = x.size(1), args.tokens = x.size(2);
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

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def("rotary(Tensor x, Tensor position, int[] settings, float[] numbers) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CPU, m) { m.impl("rotary", rotary_by_kernels); }
TORCH_LIBRARY_IMPL(ctx, CUDA, m) { m.impl("rotary", rotary_by_kernels); }
TORCH_LIBRARY_IMPL(ctx, CompositeExplicitAutograd, m) { m.impl("rotary", rotary_elsewhere); }
TORCH_LIBRARY_IMPL(ctx, Meta, m) { m.impl("rotary", rotary_meta); }
TORCH_LIBRARY_IMPL(ctx, Autograd, m) { m.impl("rotary", rotary_autograd); }

}  // namespace ctx::ops
