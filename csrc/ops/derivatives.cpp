#include "ops/derivatives.h"

#include <ATen/FuncTorchTLS.h>

namespace ctx::ops {

bool is_transformed() {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (!transforms) return false;
  try {
    transforms->checkSupportsCppAutogradFunction();  // the one question its header lets us ask
  } catch (const c10::Error&) {
    return true;
  }
  return false;
}

void refuse_tangent(const char* name) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false,
      "Trying to use forward AD with ",
      name,
      " that does not support it because it writes into a memory and records nothing. Call the "
      "differentiable path: ctx.CompressiveAttention, or torch.ops.ctx.attend_sequence.");
}

}  // namespace ctx::ops
