#include "ops/composite_tiles.h"

namespace ctx::ops {
namespace {

bool surely_none(const at::Tensor& mask) { return is_readable(mask) && !mask.any().item<bool>(); }

}  // namespace

Composite::Gradients Composite::backward(const at::Tensor& grad_out,
                                         const at::Tensor& grad_logsumexp,
                                         const at::Tensor& out,
                                         const at::Tensor& logsumexp) const {
  Gradients g;
  std::array<at::Tensor, kRegions> queries;
  for (int region = 0; region < kRegions; ++region) {
    g.keys[region] = at::zeros_like(keys_[region]);
    g.values[region] = at::zeros_like(values_[region]);
    if (size(region) > 0) queries[region] = at::zeros_like(queries_[region]);
  }
  at::Tensor grad = grad_out.to(type_);
  // sum_j p_j dp_j = grad . out; the log-sum-exp's own gradient enters with the other sign.
  at::Tensor base = (grad * out.to(type_)).sum(-1).sub_(grad_logsumexp.to(type_));
  const double infinity = std::numeric_limits<double>::infinity();
  at::Tensor total = infinite_to(infinity, logsumexp);  // exp(score - infinity) = 0: no weights
  // Queries with numbers that are not finite: those without a gradient take part in nothing, what the
  // others see gets NaN.
  const at::Tensor bad = base.isfinite().logical_and(logsumexp.lt(infinity)).logical_not();
  at::Tensor dropped, poison;
  if (!surely_none(bad)) {
    const at::Tensor none = grad_out.eq(0).all(-1).logical_and(grad_logsumexp.eq(0));
    dropped = bad.logical_and(none);
    poison = nan_where(bad.logical_and(none.logical_not()), type_);
    grad = grad.masked_fill(bad.unsqueeze(-1), 0.0);
    base = base.masked_fill(bad, 0.0), total = total.masked_fill(bad, 0.0);
  }
  at::Tensor bias = bias_.defined() ? at::zeros({batch_, heads_}, base.options()) : at::Tensor();
  if (mass_.defined()) g.mass = at::zeros_like(mass_);
  for_each_tile([&](const Tile& tile) {
    const at::Tensor grad_rows = per_kv_head(cut(grad, tile));
    const auto rows = [&](const at::Tensor& x) { return cut(x, tile).unsqueeze(-1); };
    for (int region = 0; region < kRegions; ++region) {
      if (tile.keys[region].size() == 0) continue;
      at::Tensor mask = hidden(region, tile);
      if (dropped.defined()) mask = mask.logical_or(rows(dropped));
      at::Tensor weights = scores(region, tile).sub_(rows(total)).exp_();
      if (poison.defined()) weights = weights + rows(poison);
      weights = weights.masked_fill(mask, 0.0);
      keyed(g.values[region], tile, region)
          .add_(at::matmul(per_kv_head(weights).transpose(-1, -2), grad_rows));
      at::Tensor d = at::matmul(grad_rows, keyed(values_[region], tile, region).transpose(-1, -2))
                         .view(weights.sizes());
      d = d.sub_(rows(base)).mul_(weights).masked_fill_(mask, 0.0);  // gradient of the scores
      if (region == kCompressed && bias_.defined())
        row_range(bias, tile).add_(d.sum(at::IntArrayRef{2, 3}));
      if (region == kCompressed && mass_.defined()) {
        const at::Tensor heads = d.sum(2).unflatten(1, {kv_heads_, heads_ / kv_heads_}).sum(2);
        row_range(g.mass, tile)
            .narrow(2, tile.keys[region].begin, tile.keys[region].size())
            .add_(heads);
      }
      if (softcap_ > 0) {  // d (c tanh(x / c)) = 1 - tanh(x / c)^2, where the pair is seen
        const at::Tensor part = products(region, tile) / softcap_;
        d = (d * (1 - part * part)).masked_fill(mask, 0.0);
      }
      const at::Tensor d_rows = per_kv_head(d);
      keyed(g.keys[region], tile, region)
          .add_(at::matmul(d_rows.transpose(-1, -2), per_kv_head(cut(queries_[region], tile))));
      cut(queries[region], tile)
          .copy_(at::matmul(d_rows, keyed(keys_[region], tile, region))
                     .view(cut(queries[region], tile).sizes()));
    }
  });
  for (int region = 0; region < kRegions; ++region) {
    if (!queries[region].defined()) continue;
    const at::Tensor own = queries[region].narrow(3, 0, head_dim_);
    const at::Tensor back = rotate(own, clocks_[region].neg(), rotary_);
    g.q = g.q.defined() ? g.q.add_(back) : back;
    const int64_t width = queries[region].size(3) - head_dim_;
    if (width == 0) continue;
    g.relative[region] =
        rotate(
            queries[region].narrow(3, head_dim_, width), offsets_[region].neg(), sinusoids(width)) *
        scale_;
    g.keys[region] = g.keys[region].narrow(3, 0, head_dim_).contiguous();
  }
  g.q = g.q.defined() ? g.q.mul(scale_)
                      : at::zeros({batch_, heads_, tokens_, head_dim_}, base.options());
  if (bias.defined()) g.bias = bias_.size(0) == 1 ? bias.sum().reshape({1}) : bias.sum(0);
  return g;
}

}  // namespace ctx::ops
