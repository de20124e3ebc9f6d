// ctx::take_tokens: on the CPU one pass over the rows that are asked for; elsewhere out of torch's own
// operators.
#include "ops/tokens.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "core/check.h"
#include "ops/derivatives.h"
#include "ops/layout.h"
#include "ops/rings.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using c10::SymInt;

constexpr const char* kWhere = "ctx.take_tokens";

#define CTX_TAKE_PARAMETERS                                                                   \
  const Tensor &x, [[maybe_unused]] const Tensor &ring, [[maybe_unused]] const Tensor &sinks, \
      [[maybe_unused]] const Tensor &seen, [[maybe_unused]] const Tensor &oldest,             \
      const Tensor &place

void check(CTX_TAKE_PARAMETERS) {
  CTX_CHECK_VALUE(x.dim() == 4, kWhere, "x must be [B, heads, T, width], got ", x.sizes());
  for (const Tensor& rows : {ring, sinks}) {
    CTX_CHECK_VALUE(
        rows.dim() == 4 && rows.size(0) == x.size(0) && rows.size(1) == x.size(1) &&
            rows.size(3) == x.size(3),
        kWhere,
        "ring and sinks must be [B, heads, entries, width] with x's B, heads, width, got ",
        rows.sizes(),
        " for x ",
        x.sizes());
    CTX_CHECK_TYPE(rows.scalar_type() == x.scalar_type(),
                   kWhere,
                   "ring and sinks must be ",
                   x.scalar_type(),
                   " as x, got ",
                   rows.scalar_type());
  }
  CTX_CHECK_VALUE(ring.size(2) > 0, kWhere, "ring must have entries, got ", ring.sizes());
  for (const Tensor& integers : {seen, oldest}) {
    CTX_CHECK_VALUE(
        integers.sizes() == x.sizes().slice(0, 1) && integers.scalar_type() == at::kLong,
        kWhere,
        "seen and oldest must be int64 [B], got ",
        integers.scalar_type(),
        " ",
        integers.sizes());
  }
  CTX_CHECK_VALUE(
      place.dim() == 2 && place.size(0) == x.size(0) && place.scalar_type() == at::kLong,
      kWhere,
      "place must be int64 [B, n], got ",
      place.scalar_type(),
      " ",
      place.sizes());
}

Tensor take_composite(CTX_TAKE_PARAMETERS) {
  check(x, ring, sinks, seen, oldest, place);
  const auto wide = [](const Tensor& mask) { return mask.unsqueeze(1).unsqueeze(-1); };
  const Tensor token = seen.unsqueeze(1) + place;
  const Tensor held = token.ge(oldest.clamp_min(0).unsqueeze(1));
  Tensor past = read_ring(ring, token, held);
  if (sinks.size(2) > 0) {
    const Tensor sink = token.lt(sinks.size(2)).logical_and(held);
    past = at::where(wide(sink), take_rows(sinks, token), past);
  }
  if (x.size(2) == 0) return past;
  return at::where(wide(place.lt(0)), past, take_rows(x, place));
}

Tensor take_cpu(CTX_TAKE_PARAMETERS) {
  check(x, ring, sinks, seen, oldest, place);
  const int64_t batch = x.size(0), heads = x.size(1), tokens = x.size(2), count = place.size(1);
  const int64_t bytes = x.size(3) * x.element_size();
  const Tensor out = at::empty({batch, heads, count, x.size(3)}, x.options());
  if (out.numel() == 0) return out;
  const auto bytes_of = [](const Tensor& rows) {
    Strided s = strided(rows);
    s.batch *= rows.element_size(), s.head *= rows.element_size(), s.token *= rows.element_size();
    return s;
  };
  const Tensor new_rows = rows(x), ring_rows = rows(ring), sink_rows = rows(sinks);
  const Strided from_call = bytes_of(new_rows);
  const Strided from_ring = bytes_of(ring_rows), from_sinks = bytes_of(sink_rows);
  const Tensor places = place.contiguous(), seen_ = seen.contiguous(),
               oldest_ = oldest.contiguous();
  const auto* const at = places.const_data_ptr<int64_t>();
  const auto* const begin_of = seen_.const_data_ptr<int64_t>();
  const auto* const oldest_of = oldest_.const_data_ptr<int64_t>();
  const int64_t capacity = ring.size(2), first_tokens = sinks.size(2);
  auto* const target = static_cast<char*>(out.data_ptr());
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (count * bytes));
  at::parallel_for(0, batch * heads, grain, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / heads;
      const auto row = [&](const Strided& s, int64_t i) {
        return static_cast<const char*>(s.data) + b * s.batch + task % heads * s.head + i * s.token;
      };
      for (int64_t i = 0; i < count; ++i) {
        char* const to = target + (task * count + i) * bytes;
        const int64_t p = at[b * count + i];
        const int64_t t = begin_of[b] + p;
        if (p >= 0 && tokens > 0) {
          std::memcpy(to, row(from_call, std::min(p, tokens - 1)), bytes);
        } else if (t < std::max<int64_t>(0, oldest_of[b])) {
          std::memset(to, 0, bytes);
        } else if (t < first_tokens) {
          std::memcpy(to, row(from_sinks, t), bytes);
        } else {
          std::memcpy(to, row(from_ring, t % capacity), bytes);
        }
      }
    }
  });
  return out;
}

Tensor take_meta(CTX_TAKE_PARAMETERS) {
  return x.new_empty_symint({x.sym_size(0), x.sym_size(1), place.sym_size(1), x.sym_size(3)},
                            x.options());
}

// A place outside has no gradient: no law shows it.
Tensor take_backward(const Tensor& grad, const Tensor& place, SymInt tokens) {
  const Tensor total = at::zeros_symint(
      {grad.sym_size(0), grad.sym_size(1), tokens, grad.sym_size(3)}, grad.options());
  if (tokens == 0) return total;
  const auto wide = [&](const Tensor& numbers) {
    return numbers.unsqueeze(1).unsqueeze(-1).expand_symint(grad.sym_sizes());
  };
  const Tensor outside = place.lt(0).logical_or(place.ge(at::Scalar(tokens)));
  const Tensor index = place.clamp_min(0).clamp_max(at::Scalar(tokens - 1));
  return total.scatter_add_(2, wide(index), grad.masked_fill(wide(outside), 0.0));
}

Tensor take_backward_cpu(const Tensor& grad, const Tensor& place, SymInt symbolic_tokens) {
  const int64_t tokens = symbolic_tokens.expect_int();
  const int64_t heads = grad.size(1), count = grad.size(2), width = grad.size(3);
  const Tensor total = at::zeros({grad.size(0), heads, tokens, width}, grad.options());
  if (total.numel() == 0 || count == 0) return total;
  const Tensor from = grad.contiguous(), places = place.contiguous();
  const auto* const at = places.const_data_ptr<int64_t>();
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / (count * width));
  AT_DISPATCH_FLOATING_TYPES_AND2(
      at::kHalf, at::kBFloat16, grad.scalar_type(), "take_tokens_backward", [&] {
        const auto* const source = from.const_data_ptr<scalar_t>();
        auto* const target = total.data_ptr<scalar_t>();
        at::parallel_for(0, grad.size(0) * heads, grain, [&](int64_t begin, int64_t end) {
          for (int64_t task = begin; task < end; ++task) {
            for (int64_t i = 0; i < count; ++i) {
              const int64_t p = at[task / heads * count + i];
              if (p < 0 || p >= tokens) continue;
              const auto* const row = source + (task * count + i) * width;
              auto* const sum = target + (task * tokens + p) * width;
              for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
            }
          }
        });
      });
  return total;
}

Tensor take_backward_meta(const Tensor& grad, const Tensor& /*place*/, SymInt tokens) {
  return grad.new_empty_symint({grad.sym_size(0), grad.sym_size(1), tokens, grad.sym_size(3)});
}

class TakeFunction : public torch::autograd::Function<TakeFunction> {
 public:
  static Tensor forward(torch::autograd::AutogradContext* saved, CTX_TAKE_PARAMETERS) {
    at::AutoDispatchBelowADInplaceOrView guard;
    saved->save_for_backward({place});
    saved->saved_data["tokens"] = x.sym_size(2);
    return take_tokens(x, ring, sinks, seen, oldest, place);
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* saved,
                                                 torch::autograd::variable_list grads) {
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ctx::take_tokens_backward", "")
                               .typed<decltype(take_backward)>();
    torch::autograd::variable_list result(6);
    result[0] = op.call(
        grads[0], saved->get_saved_variables()[0], saved->saved_data.at("tokens").toSymInt());
    return result;
  }
};

// Where a backward is differentiated torch's own operators do it, which autograd records.
Tensor take_backward_autograd(c10::DispatchKeySet keys,
                              const Tensor& grad,
                              const Tensor& place,
                              SymInt tokens) {
  if ((at::GradMode::is_enabled() && needs_grad(grad)) || is_recorded(grad))
    return take_backward(grad, place, tokens);
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::take_tokens_backward", "")
                             .typed<decltype(take_backward)>();
  return op.redispatch(keys & c10::after_autograd_keyset, grad, place, tokens);
}

Tensor take_autograd(CTX_TAKE_PARAMETERS) {
  if (is_recorded(x)) return take_composite(x, ring, sinks, seen, oldest, place);
  return TakeFunction::apply(x, ring, sinks, seen, oldest, place);
}

}  // namespace

Tensor take_rows(const Tensor& x, const Tensor& place) {
  const Tensor inside =
      place.clamp_min(0).clamp_max(at::Scalar(x.sym_size(2) - 1)).unsqueeze(1).unsqueeze(-1);
  return x.gather(
      2, inside.expand_symint({x.sym_size(0), x.sym_size(1), place.sym_size(1), x.sym_size(3)}));
}

Tensor take_tokens(CTX_TAKE_PARAMETERS) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::take_tokens", "")
                             .typed<decltype(take_tokens)>();
  return op.call(x, ring, sinks, seen, oldest, place);
}

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def(
      "take_tokens(Tensor x, Tensor ring, Tensor sinks, Tensor seen, Tensor oldest, Tensor place) "
      "-> "
      "Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def("take_tokens_backward(Tensor grad, Tensor place, SymInt tokens) -> Tensor",
        {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CompositeExplicitAutograd, m) {
  m.impl("take_tokens", take_composite);
  m.impl("take_tokens_backward", take_backward);
}

TORCH_LIBRARY_IMPL(ctx, CPU, m) {
  m.impl("take_tokens", take_cpu);
  m.impl("take_tokens_backward", take_backward_cpu);
}

TORCH_LIBRARY_IMPL(ctx, Meta, m) {
  m.impl("take_tokens", take_meta);
  m.impl("take_tokens_backward", take_backward_meta);
}

TORCH_LIBRARY_IMPL(ctx, Autograd, m) {
  m.impl("take_tokens", take_autograd);
  m.impl("take_tokens_backward", take_backward_autograd);
}

}  // namespace ctx::ops
