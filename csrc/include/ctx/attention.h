// Compressive attention as a pure function: differentiable, nothing is written.
//
// For streaming, KVMemory::step computes the same numbers in one operator call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <vector>

#include "ctx/compressor.h"
#include "ctx/export.h"
#include "ctx/settings.h"

namespace ctx {

// Attends from T new tokens per row to a memory and to themselves.
//
//   q [B, H, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], un-rotated; H a multiple of Hkv; one
//   dtype, one device
//   memory          empty for streams that begin here, else the tensors of KVMemory::tensors();
//                   constants, which may be written to as soon as this returns
//   bias            [H], added to the scores of compressed slots; undefined or absent: none
//   constant_slots  no gradient passes through compressed slots (the paper's training scheme)
//   lengths         int64 [B]: row b is its first lengths[b] tokens, the rest is padding
//   reset_at        bool [B, T]: true where a token is the first of a new stream
//   returns [B, H, T, Dv]; zero at padding
//
// Gradients reach q, k, v, the compressor's parameters, the bias and the tensors of relative
// positions. Throws ValueError for shapes, dtypes or devices that do not belong together.
CTX_API at::Tensor compressive_attention(const at::Tensor& q,
                                         const at::Tensor& k,
                                         const at::Tensor& v,
                                         const std::vector<at::Tensor>& memory,
                                         const Compressor& compressor,
                                         const std::optional<at::Tensor>& bias,
                                         const AttentionSettings& settings,
                                         bool constant_slots = false,
                                         const std::optional<at::Tensor>& lengths = std::nullopt,
                                         const std::optional<at::Tensor>& reset_at = std::nullopt);

}  // namespace ctx
