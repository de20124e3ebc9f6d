// ctx::evicted_groups in its two ways; operators' signatures.
#pragma once

#include "ops/groups.h"
#include "ops/plan.h"

namespace ctx::ops {

inline constexpr const char* kGroups = "ctx.evicted_groups";

inline int64_t tokens_read(const Schedule& s) { return s.ratio + s.overlap; }

// Raises unless pairs, memory and settings belong together. A plan may name rows of the memory
// where it is given; else the call has all of them.
Settings check_groups(const at::Tensor& k,
                      const at::Tensor& v,
                      at::TensorList memory,
                      at::IntArrayRef settings,
                      at::ArrayRef<double> numbers,
                      const at::Tensor& plan = {});

// Out of torch's own operators, for every device; and by the CPU's kernels.
Pairs groups_composite(const at::Tensor& k,
                       const at::Tensor& v,
                       const at::Tensor& plan,
                       OptionalList memory,
                       at::IntArrayRef settings,
                       at::ArrayRef<double> numbers);
Pairs groups_cpu(const at::Tensor& k,
                 const at::Tensor& v,
                 const at::Tensor& plan,
                 OptionalList memory,
                 at::IntArrayRef settings,
                 at::ArrayRef<double> numbers);

// Gradients of the call's pairs [B, Hkv, T, width]; a place that is not the call's has none. `grad_k`
// and `grad_v` are the groups', `tokens` T, `type` that of the pairs.
Pairs groups_backward_composite(const at::Tensor& grad_k,
                                const at::Tensor& grad_v,
                                const at::Tensor& plan,
                                c10::SymInt tokens,
                                at::ScalarType type,
                                at::IntArrayRef settings,
                                at::ArrayRef<double> numbers);
Pairs groups_backward_cpu(const at::Tensor& grad_k,
                          const at::Tensor& grad_v,
                          const at::Tensor& plan,
                          c10::SymInt tokens,
                          at::ScalarType type,
                          at::IntArrayRef settings,
                          at::ArrayRef<double> numbers);

}  // namespace ctx::ops
