#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>

#include "ctx/schedule.h"

namespace ctx::ops {

// The seven tensors of a memory, in this order everywhere: window keys and values, compressed keys
// and values, sink keys and values, seen.
constexpr int kStateTensors = 7;

// Sizes of the seven tensors for a schedule and a headroom.
std::array<std::vector<int64_t>, kStateTensors> state_sizes(const Schedule& schedule,
                                                            int64_t batch,
                                                            int64_t kv_heads,
                                                            int64_t head_dim,
                                                            int64_t value_dim,
                                                            int64_t headroom);

// Checks seven tensors against each other and a schedule, and returns their headroom.
int64_t check_state(at::TensorList state, const Schedule& schedule, const char* where);

// Checks pairs against a memory: k [B, Hkv, T, D], v [B, Hkv, T, Dv], lengths int64 [B] in 0 ... T.
void check_pairs(at::TensorList state,
                 const at::Tensor& k,
                 const at::Tensor& v,
                 const std::optional<at::Tensor>& lengths,
                 const char* where);

// Checks queries against a memory: q [B, H, T, D], H a multiple of Hkv, T as given (-1: any); bias
// [H] or [1].
void check_queries(at::TensorList state,
                   const at::Tensor& q,
                   int64_t tokens,
                   const std::optional<at::Tensor>& bias,
                   const char* where);

}  // namespace ctx::ops
