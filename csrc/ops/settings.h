// What operators take as plain numbers and strings, parsed and checked.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <string_view>

#include "ctx/schedule.h"
#include "ops/kernels.h"

namespace ctx::ops {

// Arithmetic is float32, float64 for float64.
inline at::ScalarType arithmetic_type(at::ScalarType storage) {
  return storage == at::kDouble ? at::kDouble : at::kFloat;
}

// What an operator computes is its dtypes' business: autocast, which stands for whole models, ends
// where one of ours begins. Lives as long as the operator runs.
using OwnPrecision = c10::impl::ExcludeDispatchKeyGuard;
inline OwnPrecision own_precision() { return OwnPrecision(c10::autocast_dispatch_keyset); }

// A list of tensors as operators take it: None is the empty one. AOTInductor's proxy passes None for
// a list that is empty, so no schema may ask for more.
using OptionalList = std::optional<at::TensorList>;
inline at::TensorList or_empty(const OptionalList& list) { return list.value_or(at::TensorList()); }

// The storage of compressed slots in a memory of such pairs: one with the same arithmetic, or int8.
Storage slot_storage_of(at::ScalarType dtype,
                        at::ScalarType pairs,
                        const char* where,
                        const char* name);

// The storage of a dtype; throws TypeError for one that a memory cannot have.
Storage storage_of(at::ScalarType dtype, const char* where, const char* name);

// [window, compressed, ratio, segment, sinks] and perhaps overlap, validated.
Schedule parse_schedule(at::IntArrayRef values, const char* where);

// "slot" or "token".
bool parse_token_distance(std::string_view distance, const char* where);

// With the base that the operators' schemas pass on.
struct BasedRotary : Rotary {
  double base = 10000.0;
};

// 0 <= dim <= head_dim and even, base positive and finite.
BasedRotary parse_rotary(
    int64_t dim, double base, bool interleaved, int64_t head_dim, const char* where);

CompressorKind parse_compressor(std::string_view name, const char* where);

// Tokens left of a group that a compressor of the engine reads, as its parameters say; 0 where they
// are not what they must be.
int64_t overlap_of(CompressorKind kind, at::TensorList parameters, int64_t ratio);

// Number, shapes and devices of a compressor's parameters (compressor.h), and that it reads
// `overlap` tokens left of a group.
void check_parameters(CompressorKind kind,
                      at::TensorList parameters,
                      int64_t kv_heads,
                      int64_t ratio,
                      int64_t overlap,
                      int64_t head_dim,
                      int64_t value_dim,
                      at::Device device,
                      const char* where);

// Slots that a call of so many tokens lays out: one for each group that can fall due or, where rows
// begin anew inside the call, for each block (group_block) from the token `behind` the call on.
c10::SymInt slot_count(const Schedule& schedule, const c10::SymInt& tokens);
c10::SymInt slot_count(const Schedule& schedule, const c10::SymInt& tokens, int64_t behind);

// n(t) and w(t) of semantics.md for a tensor of positions.
at::Tensor groups_of(const Schedule& schedule, const at::Tensor& t);
at::Tensor window_begin_of(const Schedule& schedule, const at::Tensor& groups);

}  // namespace ctx::ops
