#include "core/slots.h"

#include <ATen/core/grad_mode.h>

#include "ops/groups.h"
#include "ops/step.h"

namespace ctx {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

OptionalTensor as_constant(const OptionalTensor& x) {
  return x ? OptionalTensor(x->detach()) : std::nullopt;
}

// Which tokens become slots, int64 [B, Hkv, G]: their places among the groups, and their numbers in
// the stream.
std::pair<Tensor, Tensor> chosen_tokens(const GroupsCall& call, at::TensorList written) {
  const OptionalTensor bias = as_constant(call.scores.bias),
                       slopes = as_constant(call.scores.slopes);
  std::vector<Tensor> relative;
  for (const Tensor& part : call.scores.relative) relative.push_back(part.detach());
  const at::NoGradGuard no_grad;
  const auto [out, weights, chosen, positions] = ops::step_(call.q.detach(),
                                                            call.k.detach(),
                                                            call.v.detach(),
                                                            call.plan,
                                                            written,
                                                            {},
                                                            {bias, slopes, relative},
                                                            call.packed,
                                                            /*with_region_weights=*/false);
  return {chosen, positions};
}

}  // namespace

std::vector<Tensor> slots_of(const GroupsCall& call, at::TensorList written) {
  const auto [keys, values] =
      ops::evicted_groups(call.k, call.v, call.plan, call.memory, call.packed);
  if (call.compressor.name != "most_used") {
    const auto [slot_keys, slot_values, mass] =
        compress(keys, values, call.compressor, call.mass_ratio);
    return {slot_keys, slot_values, mass};
  }
  const auto [places, positions] = chosen_tokens(call, written);
  const auto taken = [&index = places](const Tensor& groups) {
    return groups.flatten(2, 3).gather(2, index.unsqueeze(-1).expand({-1, -1, -1, groups.size(4)}));
  };
  const Tensor mass = call.mass_ratio > 0 ? at::zeros(places.sizes(), keys.options())
                                          : at::empty({0}, keys.options());
  return {taken(keys), taken(values), mass, positions};
}

}  // namespace ctx
