#include "ops/relative.h"

namespace ctx::ops {

using at::Tensor;

RelativeQueries::RelativeQueries(const Tensor& q, at::TensorList operands) : operands_(operands) {
  const auto type = arithmetic_type(q.scalar_type());
  const Tensor wide = q.to(type);
  // A query that is not finite is so in `content`; here its product with a gradient of zero would
  // make that of the whole weight NaN.
  absent_ = at::isfinite(wide.detach()).all(-1, true).logical_not();
  q_ = wide.masked_fill(absent_, 0.0);
  const auto biased = [&](const Tensor& x, int i) { return x + operands[i].to(type).unsqueeze(1); };
  content = biased(wide, 0).to(q.scalar_type());
  relative = at::matmul(biased(q_, 1), operands[2].to(type));
  compressed = at::matmul(biased(q_, 3), operands[4].to(type));
}

RelativeQueries::Gradients RelativeQueries::backward(const Tensor& grad_content,
                                                     const Tensor& grad_relative,
                                                     const Tensor& grad_compressed) const {
  const auto type = q_.scalar_type();
  Gradients g;
  g.operands.resize(5);
  const Tensor content_rows = grad_content.to(type);
  g.q = content_rows;
  g.operands[0] = content_rows.sum(at::IntArrayRef{0, 2}).to(operands_[0].scalar_type());
  const auto add = [&](const Tensor& grad, int bias, int weight) {
    const Tensor rows = grad.to(type);
    const Tensor back = at::matmul(rows, operands_[weight].to(type).transpose(-1, -2));
    g.q = g.q + back.masked_fill(absent_, 0.0);
    g.operands[bias] = back.sum(at::IntArrayRef{0, 2}).to(operands_[bias].scalar_type());
    const Tensor query = q_ + operands_[bias].to(type).unsqueeze(1);
    g.operands[weight] =
        at::matmul(query.transpose(-1, -2), rows).sum(0).to(operands_[weight].scalar_type());
  };
  add(grad_relative, 1, 2);
  add(grad_compressed, 3, 4);
  return g;
}

}  // namespace ctx::ops
