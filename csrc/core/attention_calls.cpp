#include "core/attention_calls.h"

#include <ATen/core/grad_mode.h>

#include "core/slots.h"
#include "ops/attend.h"
#include "ops/step.h"

namespace ctx {
namespace {

using at::Tensor;

// Whether a call is streamed into rings, or else reads them where they lie. One that does not write
// is read like one under grad, but where the numbers depend on the writing: slots chosen by attention
// received, or rounded to a dtype of their own. These write a copy.
bool streams(const LayerCall& x) {
  if (at::GradMode::is_enabled()) return false;
  if (x.call.update()) return true;
  const bool rounded = !x.held.empty() && x.held[ops::kCompressedKeys].scalar_type() !=
                                              x.held[ops::kWindowKeys].scalar_type();
  return x.law.chooses() || rounded;
}

// The rings that a call is going to write: the ones given or their copy, or empty ones.
std::vector<Tensor> rings_to_write(const LayerCall& x) {
  const at::NoGradGuard no_grad;
  if (x.held.empty()) {
    const auto type = x.k.scalar_type();
    std::vector<Tensor> made = rows::empty(x.law.shape, x.k.size(0), type, type, x.k.device());
    made.resize(ops::kRings);
    return made;
  }
  std::vector<Tensor> made = x.held.vec();
  if (!x.call.in_place())
    for (Tensor& ring : made) ring = ring.clone();
  return made;
}

Tensor streamed(const LayerCall& x, std::vector<Tensor>& rings) {
  const Tensor& plan = x.call.plan(x.law.packed);
  std::vector<Tensor> written = rings_to_write(x);
  x.call.begin();
  const Tensor out = std::get<0>(ops::step_(x.q,
                                            x.k,
                                            x.v,
                                            plan,
                                            written,
                                            x.compressor.parameters,
                                            x.scores.operands(),
                                            x.law.packed,
                                            /*with_region_weights=*/false));
  if (x.call.update()) rings = std::move(written);
  return out;
}

Tensor differentiable(const LayerCall& x, std::vector<Tensor>& rings) {
  const Tensor& plan = x.call.plan(x.law.packed);
  std::vector<Tensor> written;
  if (x.call.update() || x.law.chooses()) written = rings_to_write(x);
  const ops::ScoreOperands scores = x.scores.operands();
  std::vector<Tensor> slots = slots_of(
      {x.q, x.k, x.v, plan, x.held, scores, x.law.packed, x.compressor, x.law.mass_ratio()},
      written);
  std::vector<Tensor> constants;
  for (const Tensor& part : slots) constants.push_back(part.detach());
  const ops::AttendCall attention{x.q,
                                  x.k,
                                  x.v,
                                  plan,
                                  x.held,
                                  x.law.constant_slots ? constants : slots,
                                  x.scores.bias,
                                  x.scores.slopes,
                                  x.scores.relative,
                                  x.law.packed.settings,
                                  x.law.packed.numbers};
  const Tensor out = std::get<0>(ops::attend(attention, /*with_region_weights=*/false));
  if (!x.call.update()) return out;
  if (!x.law.chooses()) {  // which has written, too
    const at::NoGradGuard no_grad;
    ops::append_(x.k.detach(), x.v.detach(), plan, written, constants, x.law.given);
  }
  rings = std::move(written);
  return out;
}

}  // namespace

Tensor attend_layer(const LayerCall& x, std::vector<Tensor>& rings) {
  return streams(x) ? streamed(x, rings) : differentiable(x, rings);
}

}  // namespace ctx
