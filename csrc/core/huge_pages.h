// Large pages of memory for tensors whose rows are read in any order.
#pragma once

#include <ATen/core/Tensor.h>

namespace ctx {

// A copy. On Linux the kernel is asked to put a large one on the CPU into pages of 2 MiB, so that the
// processor needs fewer address translations; where it does not, nothing else changes.
at::Tensor in_huge_pages(const at::Tensor& x);

}  // namespace ctx
