// ctx::attend out of torch's own operators.
#include "ops/composite.h"
#include "ops/relative.h"

namespace ctx::ops {
namespace {

using at::Tensor;

std::optional<RelativeQueries> relative_queries(const AttendCall& call) {
  if (call.relative.empty()) return std::nullopt;
  return RelativeQueries(call.q, call.relative);
}

EncodedQueries encoded(const std::optional<RelativeQueries>& queries) {
  return queries ? EncodedQueries{queries->relative, queries->compressed} : EncodedQueries{};
}

}  // namespace

Attended attend_composite(const AttendCall& call, bool with_region_weights, bool recorded) {
  const CallSpans spans(call);
  const auto queries = relative_queries(call);
  const Composite composite(
      queries ? queries->content : call.q, encoded(queries), spans, call, recorded);
  auto [out, logsumexp, region_weights] = composite.forward(with_region_weights);
  const Tensor padding = spans.plan().token(kPlanPosition).lt(0).unsqueeze(1);
  out = out.masked_fill(padding.unsqueeze(-1), 0.0).to(call.q.scalar_type());
  if (with_region_weights) region_weights = region_weights.masked_fill(padding.unsqueeze(-1), 0.0);
  return {out, logsumexp, region_weights};
}

AttendGradients attend_backward_composite(const AttendCall& call,
                                          const AttendOutputs& x,
                                          bool memory_grads,
                                          bool recorded) {
  const CallSpans spans(call);
  const auto queries = relative_queries(call);
  const Composite composite(
      queries ? queries->content : call.q, encoded(queries), spans, call, recorded);
  const Tensor padding = spans.plan().token(kPlanPosition).lt(0).unsqueeze(1);
  const Tensor grad_out = x.grad_out.masked_fill(padding.unsqueeze(-1), 0.0);
  const auto g = composite.backward(grad_out, x.grad_logsumexp, x.out, x.logsumexp);
  const auto type = call.q.scalar_type();
  AttendGradients all;
  spans.backward(g.keys, g.values, g.mass, memory_grads, all);
  all.bias = call.bias ? g.bias.to(call.bias->scalar_type()) : at::zeros({0}, call.q.options());
  if (!queries) {
    all.q = g.q.to(type).contiguous();
    return all;
  }
  Tensor relative = at::zeros_like(queries->relative);
  for (const Region region : {kSinks, kWindow})
    if (g.relative[region].defined()) relative = relative + g.relative[region];
  const Tensor compressed = g.relative[kCompressed].defined() ? g.relative[kCompressed]
                                                              : at::zeros_like(queries->compressed);
  const auto made = queries->backward(g.q, relative, compressed);
  all.q = made.q.to(type).contiguous();
  all.relative = made.operands;
  return all;
}

}  // namespace ctx::ops
