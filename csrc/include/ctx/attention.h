// Compressive attention as a pure function: differentiable, nothing is written.
//
// For streaming, KVMemory::step computes the same numbers in one operator call.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <string>
#include <vector>

#include "ctx/compressor.h"
#include "ctx/export.h"
#include "ctx/schedule.h"

namespace ctx {

// What attention is, but for the compressor and the bias of its slots.
struct AttentionOptions {
  Schedule schedule;
  std::string distance =
      "slot";              // or "token": how far a compressed slot or a sink is from the query
  int64_t rotary_dim = 0;  // channels that are rotated, even; 0: no positions
  double rotary_base = 10000.0;
  bool rotary_interleaved =
      false;           // pairs (0, 1), (2, 3), ... instead of (0, dim/2), (1, dim/2 + 1), ...
  double scale = 0.0;  // of the scores; 0: head_dim^-1/2
  // ALiBi (Press et al. 2022, arXiv:2108.12409): slope * distance is taken from every scaled score;
  // [H], absent: not.
  std::optional<at::Tensor> alibi_slopes = std::nullopt;
  // Relative positions (Dai et al. 2019, arXiv:1901.02860, section 3.3): a score is (q + u) . k +
  // (q + v) . R(distance), R(d) = W [sin(d w); cos(d w)], w_i = 10000^(-2i/P); v and W are others
  // for compressed slots (Rae et al. 2019). Empty: not; else
  //   u [H, D], v [H, D], W [H, D, P], compressed v [H, D], compressed W [H, D, P]; P even
  std::vector<at::Tensor> relative = {};

  // "rotary", "alibi", "relative" or "none": the scheme that the above amounts to.
  CTX_API std::string position() const;

  // Throws ValueError naming the first setting that is out of range, or two schemes at once.
  CTX_API void validate(int64_t head_dim) const;
};

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
                                         const AttentionOptions& options,
                                         bool constant_slots = false,
                                         const std::optional<at::Tensor>& lengths = std::nullopt,
                                         const std::optional<at::Tensor>& reset_at = std::nullopt);

}  // namespace ctx
