// ctx::attend by a device's own kernels, from tensors to what kernels take.
#include <ATen/Dispatch.h>

#include <algorithm>
#include <list>

#include "ops/layout.h"
#include "ops/registry.h"
#include "ops/relative.h"
#include "ops/rotary.h"
#include "ops/spans.h"

namespace ctx::ops {
namespace {

using at::Tensor;

constexpr const char* kKernelsWhere = "ctx.attend";

// The arguments of the kernels, and what they point to.
class Prepared {
 public:
  SpansArgs args;

  // `joined`: the memory's keys are copied, in order, so that they have gradients.
  Prepared(const AttendCall& call, bool joined)
      : call_(call), settings_(call.settings()), spans_(call) {
    const Tensor& q = call.q;
    SpansArgs& a = args;
    a.clock = settings_.clock, a.rotary = on_device(settings_.rotary, q.device());
    a.storage = storage_of(q.scalar_type(), kKernelsWhere, "q");
    a.device = device_index(q);
    a.batch = q.size(0), a.heads = q.size(1), a.tokens = q.size(2), a.head_dim = q.size(3);
    a.kv_heads = call.k.size(1), a.value_dim = call.v.size(3);
    a.scale = settings_.scale, a.logit_softcap = settings_.logit_softcap;
    a.bias = per_head(call.bias), a.slopes = per_head(call.slopes);
    a.position = keep_tokens(kPlanPosition);
    if (!call.relative.empty()) {
      queries_.emplace(q, call.relative);
      a.relative.dim = queries_->relative.size(3);
      a.relative.queries = keep_rows(queries_->relative.to(q.scalar_type()));
      a.relative.compressed = keep_rows(queries_->compressed.to(q.scalar_type()));
    }
    a.queries = keep_rows(queries_ ? queries_->content : q);
    const Tensor keys = joined ? Tensor() : spans_.own_keys();
    for (const Region region : {kSinks, kCompressed, kWindow})
      joined ? join(region) : add(region, keys);
  }

  const CallSpans& spans() const { return spans_; }
  const std::optional<RelativeQueries>& queries() const { return queries_; }
  Strided keep_rows(const Tensor& x) { return strided(keep(rows(x))); }
  const Tensor& keep(Tensor x) { return kept_.emplace_back(std::move(x)); }

 private:
  const void* per_head(const std::optional<Tensor>& x) {
    if (!x) return nullptr;
    const auto type = arithmetic_type(call_.q.scalar_type());
    return keep(x->to(type).expand({args.heads}).contiguous()).const_data_ptr();
  }

  // A quantity of the plan, [B, T] contiguous; a header column, [B].
  const int64_t* keep_integers(const Tensor& x) {
    return keep(x.contiguous()).const_data_ptr<int64_t>();
  }
  const int64_t* keep_tokens(PlanToken quantity) {
    return keep_integers(spans_.plan().token(quantity));
  }
  const int64_t* keep_header(PlanColumn column) {
    return keep_integers(spans_.plan().header(column));
  }

  const int64_t* keep_first(Region region) {
    return keep_tokens(region == kSinks        ? kPlanSinkKey
                       : region == kCompressed ? kPlanSlotKey
                                               : kPlanTokenKey);
  }

  void join(Region region) {
    const auto type = call_.k.scalar_type();
    Span& span = args.spans[region];
    const Tensor keys = spans_.keys(region).to(type), values = spans_.values(region).to(type);
    span.size = keys.size(2);
    span.keys = keep_rows(keys), span.values = keep_rows(values);
    span.first = keep_first(region);
    if (region == kCompressed) keep_mass(spans_.mass(), span);
  }

  void keep_mass(const Tensor& mass, Span& span) {
    if (!mass.defined()) return;
    const auto type = arithmetic_type(call_.q.scalar_type());
    span.mass = keep(mass.to(type).contiguous()).const_data_ptr();
  }

  // The call's own keys where they lie, and the memory's.
  void add(Region region, const Tensor& own_keys) {
    Span& span = args.spans[region];
    const auto type = call_.k.scalar_type();
    if (region == kCompressed) {
      const Tensor keys = spans_.own_slots();
      span.size = keys.size(2);
      span.keys = keep_rows(keys), span.values = keep_rows(call_.slots[1].to(type));
      keep_mass(call_.mass(), span);
    } else {
      span.size = region == kSinks ? spans_.own_sinks() : own_keys.size(2);
      span.keys = keep_rows(own_keys), span.values = keep_rows(call_.v);
    }
    span.first = keep_first(region);
    if (!call_.memory.empty()) add_past(region, span);
  }

  void add_past(Region region, Span& span) {
    const Schedule& s = settings_.schedule();
    const auto set = [&](int64_t size, int keys, PlanColumn first) {
      if (size == 0) return;
      const Tensor& ring = call_.memory[keys];
      const auto storage =
          slot_storage_of(ring.scalar_type(), call_.q.scalar_type(), kKernelsWhere, "memory");
      span.size += size;
      span.past = {size,
                   ring.size(2),
                   storage,
                   ring.data_ptr(),
                   call_.memory[keys + 1].data_ptr(),
                   keep_header(first)};
    };
    if (region == kSinks) return set(s.sinks, kSinkKeys, kPlanFirstSink);
    if (region == kWindow) return set(s.max_window(), kWindowKeys, kPlanFirstToken);
    set(s.compressed, kCompressedKeys, kPlanFirstSlot);
    if (has_mass(call_.memory)) span.past.mass = call_.memory[kSlotMass].const_data_ptr();
  }

  const AttendCall& call_;
  Settings settings_;
  CallSpans spans_;
  std::optional<RelativeQueries> queries_;
  std::list<Tensor> kept_;
};

// [B, H] summed over rows, one row after the other: at::sum cuts long sums by the number of threads.
Tensor sum_rows(const Tensor& x) {
  if (!kernels_for(x.device().type()).host_reads) return x.sum(0);
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

bool has_kernels(const AttendCall& call) {
  if (!has_kernels(call.q.device().type())) return false;
  // Distances to slots that are single tokens follow from no number of theirs.
  const bool distances = call.slopes.has_value() || !call.relative.empty();
  return !(distances && call.single_tokens() && call.settings().clock.token_distance);
}

Attended attend_by_kernels(const AttendCall& call, bool with_region_weights) {
  Prepared p(call, /*joined=*/false);
  SpansArgs& a = p.args;
  const auto options = call.q.options();
  const auto wide = options.dtype(arithmetic_type(call.q.scalar_type()));
  const Tensor out = at::empty({a.batch, a.heads, a.tokens, a.value_dim}, options);
  const Tensor logsumexp = at::empty({a.batch, a.heads, a.tokens}, wide);
  a.out = strided(out);
  a.logsumexp = logsumexp.data_ptr();
  const Tensor region_weights = new_region_weights(call.q, with_region_weights);
  if (with_region_weights) a.region_weights = region_weights.data_ptr();
  if (logsumexp.numel() > 0) kernels_for(call.q.device().type()).spans_forward(a);
  return {out, logsumexp, region_weights};
}

AttendGradients attend_backward_by_kernels(const AttendCall& call,
                                           const AttendOutputs& x,
                                           bool memory_grads) {
  Prepared p(call, memory_grads);
  SpansArgs& a = p.args;
  const auto type = call.q.scalar_type();
  const auto wide = call.q.options().dtype(arithmetic_type(type));
  a.out = p.keep_rows(x.out);
  a.logsumexp = p.keep(x.logsumexp.contiguous()).data_ptr();
  SpansBackwardArgs args;
  args.grad_out = p.keep_rows(x.grad_out.to(type));
  args.grad_logsumexp = p.keep(x.grad_logsumexp.to(wide.dtype()).contiguous()).data_ptr();
  const auto padded = [](int64_t width) {
    return (width + kSpanWidthStep - 1) / kSpanWidthStep * kSpanWidthStep;
  };
  args.key_width = padded(a.head_dim), args.value_width = padded(a.value_dim);
  const Tensor grad_q = at::empty(call.q.sizes(), call.q.options());
  args.grad_queries = strided(grad_q);
  std::array<Tensor, kRegions> keys, values;
  for (int i = 0; i < kRegions; ++i) {
    const auto sums = [&](int64_t width) {
      const int64_t count = a.spans[i].size - a.spans[i].past.size;
      return at::zeros({a.batch, a.kv_heads, count, width}, wide);
    };
    keys[i] = sums(args.key_width), values[i] = sums(args.value_width);
    args.grad_keys[i] = keys[i].data_ptr(), args.grad_values[i] = values[i].data_ptr();
  }
  Tensor mass, bias, relative, compressed;
  if (call.mass().defined()) {
    mass = at::zeros({a.batch, a.kv_heads, keys[kCompressed].size(2)}, wide);
    args.grad_mass[kCompressed] = mass.data_ptr();
  }
  if (call.bias) {
    bias = at::zeros({a.batch, a.heads}, wide);
    args.grad_bias = bias.data_ptr();
  }
  if (p.queries()) {
    relative = at::zeros({a.batch, a.heads, a.tokens, a.relative.dim}, call.q.options());
    compressed = at::zeros_like(relative);
    args.grad_relative = strided(relative), args.grad_compressed_relative = strided(compressed);
  }
  args.forward = a;
  if (x.logsumexp.numel() > 0) kernels_for(call.q.device().type()).spans_backward(args);
  for (int i = 0; i < kRegions; ++i) {
    keys[i] = keys[i].narrow(3, 0, a.head_dim);
    values[i] = values[i].narrow(3, 0, a.value_dim);
  }
  AttendGradients g;
  p.spans().backward(keys, values, mass, memory_grads, g);
  g.bias = at::zeros({0}, call.q.options());
  if (call.bias) {
    const Tensor heads = sum_rows(bias);
    g.bias =
        (call.bias->size(0) == 1 ? heads.sum().reshape({1}) : heads).to(call.bias->scalar_type());
  }
  g.q = grad_q;
  if (p.queries()) {
    const auto made = p.queries()->backward(grad_q, relative, compressed);
    g.q = made.q.to(type).contiguous();
    g.relative = made.operands;
  }
  return g;
}

}  // namespace ctx::ops
