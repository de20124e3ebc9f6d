// Whether there is anything to be kept apart: most calls have no number that is not finite.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <cmath>

#include "ops/derivatives.h"

namespace ctx::ops {

// Whether a value of x may decide what is done: not on a device, which is not waited for, nor in a
// graph that is traced, nor under a transform.
inline bool is_readable(const at::Tensor& x) {
  return x.is_cpu() && !x.unsafeGetTensorImpl()->is_python_dispatch() &&
         !x.key_set().has(c10::DispatchKey::Functionalize) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() && !is_transformed();
}

// Whether every number is finite, as far as one pass can say.
inline bool surely_finite(const at::Tensor& x) {
  if (!is_readable(x)) return false;
  const at::NoGradGuard no_grad;
  return std::isfinite(x.sum().item<double>());
}

}  // namespace ctx::ops
