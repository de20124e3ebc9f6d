#include "ops/spans.h"

#include <ATen/Dispatch.h>

#include "ops/layout.h"
#include "ops/registry.h"
#include "ops/settings.h"

namespace ctx::ops {
namespace {

using at::Tensor;

// Keeps what `args` points to.
struct Prepared {
  SpansArgs args;
  std::vector<Tensor> kept;

  const Tensor& keep(Tensor x) { return kept.emplace_back(std::move(x)); }
  Strided keep_rows(const Tensor& x) { return strided(keep(rows(x))); }
  const int64_t* keep_integers(const Tensor& x) {
    return keep(x.contiguous()).const_data_ptr<int64_t>();
  }
};

Prepared prepare(const AttendCall& call) {
  constexpr const char* where = "ctx.attend";
  const Tensor& q = call.q;
  const Spans& s = call.spans;
  const auto type = arithmetic_type(q.scalar_type());
  Prepared p;
  SpansArgs& a = p.args;
  a.clock = call.clock;
  a.rotary = call.rotary;
  a.storage = storage_of(q.scalar_type(), where, "q");
  a.device = device_index(q);
  a.batch = q.size(0), a.heads = q.size(1), a.tokens = q.size(2), a.head_dim = q.size(3);
  a.kv_heads = s.window_keys.size(1);
  a.value_dim = s.window_values.size(3);
  a.scale = call.scale;
  const auto per_head = [&](const std::optional<Tensor>& x) -> const void* {
    return x ? p.keep(x->to(type).expand({a.heads}).contiguous()).data_ptr() : nullptr;
  };
  a.bias = per_head(call.bias);
  a.slopes = per_head(call.slopes);
  a.position = p.keep_integers(call.position);
  a.queries = p.keep_rows(q);
  const auto span = [&](const Tensor& keys, const Tensor& values, const Tensor& first) {
    return Span{keys.size(2), {}, p.keep_rows(keys), p.keep_rows(values), p.keep_integers(first)};
  };
  a.spans[kSinks] = span(s.sink_keys, s.sink_values, s.first_sink);
  a.spans[kCompressed] = span(s.compressed_keys, s.compressed_values, s.first_slot);
  a.spans[kWindow] = span(s.window_keys, s.window_values, s.first_token);
  const auto add_past = [&](Region region, const Tensor& keys, const Tensor& values) {
    const int64_t size = s.past.size(call.clock.schedule, region);
    if (size == 0) return;
    const auto storage = slot_storage_of(keys.scalar_type(), q.scalar_type(), where, "past");
    const Tensor first = s.past.first(region);
    a.spans[region].size += size;
    a.spans[region].past = {size,
                            keys.size(2),
                            storage,
                            p.keep(keys).data_ptr(),
                            p.keep(values).data_ptr(),
                            p.keep_integers(first)};
  };
  add_past(kCompressed, s.past.compressed_keys, s.past.compressed_values);
  add_past(kWindow, s.past.window_keys, s.past.window_values);
  return p;
}

// Sums [B, Hkv, keys, padded width] as a gradient.
Tensor unpadded(const Tensor& sums, int64_t width, at::ScalarType type) {
  return sums.narrow(-1, 0, width).to(type).contiguous();
}

// [B, H] summed over rows, one row after the other: at::sum cuts long sums by the number of threads.
Tensor sum_rows(const Tensor& x) {
  const Tensor sum = at::zeros({x.size(1)}, x.options());
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "sum_rows", [&] {
    const auto* from = x.const_data_ptr<scalar_t>();
    auto* const to = sum.data_ptr<scalar_t>();
    for (int64_t b = 0; b < x.size(0); ++b)
      for (int64_t h = 0; h < x.size(1); ++h) to[h] += *from++;
  });
  return sum;
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> spans_forward(const AttendCall& call, bool with_region_weights) {
  Prepared p = prepare(call);
  SpansArgs& a = p.args;
  const auto options = call.q.options();
  const Tensor out = at::empty({a.batch, a.heads, a.tokens, a.value_dim}, options);
  const Tensor logsumexp =
      at::empty({a.batch, a.heads, a.tokens}, options.dtype(arithmetic_type(call.q.scalar_type())));
  a.out = strided(out);
  a.logsumexp = logsumexp.data_ptr();
  const Tensor region_weights = new_region_weights(call.q, with_region_weights);
  if (with_region_weights) a.region_weights = region_weights.data_ptr();
  if (logsumexp.numel() > 0) kernels_for(call.q.device().type()).spans_forward(a);
  return {out, logsumexp, region_weights};
}

SpanGradients spans_backward(const AttendCall& call,
                             const Tensor& grad_out,
                             const Tensor& grad_logsumexp,
                             const Tensor& out,
                             const Tensor& logsumexp) {
  Prepared p = prepare(call);
  SpansArgs& a = p.args;
  const auto type = call.q.scalar_type();
  const auto wide = call.q.options().dtype(arithmetic_type(type));
  a.out = p.keep_rows(out);
  a.logsumexp = p.keep(logsumexp.contiguous()).data_ptr();
  SpansBackwardArgs args;
  args.grad_out = p.keep_rows(grad_out.to(type));
  args.grad_logsumexp = p.keep(grad_logsumexp.to(wide.dtype()).contiguous()).data_ptr();
  const auto padded = [](int64_t width) {
    return (width + kSpanWidthStep - 1) / kSpanWidthStep * kSpanWidthStep;
  };
  args.key_width = padded(a.head_dim);
  args.value_width = padded(a.value_dim);
  SpanGradients g;
  g.q = at::empty(call.q.sizes(), call.q.options());
  args.grad_queries = strided(g.q);
  for (int i = 0; i < 3; ++i) {
    const auto sums = [&](int64_t width) {
      const int64_t keys = a.spans[i].size - a.spans[i].past.size;
      return at::zeros({a.batch, a.kv_heads, keys, width}, wide);
    };
    g.keys[i] = sums(args.key_width), g.values[i] = sums(args.value_width);
    args.grad_keys[i] = g.keys[i].data_ptr(), args.grad_values[i] = g.values[i].data_ptr();
  }
  if (call.bias) {
    g.bias = at::zeros({a.batch, a.heads}, wide);
    args.grad_bias = g.bias.data_ptr();
  }
  args.forward = a;
  if (logsumexp.numel() > 0) kernels_for(call.q.device().type()).spans_backward(args);
  for (int i = 0; i < 3; ++i) {
    g.keys[i] = unpadded(g.keys[i], a.head_dim, type);
    g.values[i] = unpadded(g.values[i], a.value_dim, type);
  }
  if (call.bias) {
    const Tensor heads = sum_rows(g.bias);
    const bool shared = call.bias->size(0) == 1;
    g.bias = (shared ? heads.sum().reshape({1}) : heads).to(call.bias->scalar_type());
  }
  return g;
}

}  // namespace ctx::ops
