// Compressors: c tokens -> 1 slot, per kv head.
//
//   name     slot (the value slot likewise, with its own parameters)
//   "mean"   mean over the c tokens
//   "max"    maximum over the c tokens, channel by channel
//   "conv"   sum_i x_i W_i (+ b): kernel = stride = c
//   "gated"  sum_i softmax_i(key_i . gate + position_i) x_i
//   "custom" whatever its function makes of them
//
//   name     parameters, in this order
//   "conv"   key_weight [Hkv, c, D, D], value_weight [Hkv, c, Dv, Dv], and perhaps
//            key_bias [Hkv, D], value_bias [Hkv, Dv]
//   "gated"  key_gate [Hkv, D], key_position [Hkv, c], value_gate [Hkv, D], value_position [Hkv, c]
//
// Mean, max and conv are the compression functions of Rae et al. 2019 (arXiv:1911.05507, section
// 3.2); they work there on hidden states shared by all heads, here on the pairs of each kv head.
// Gated pooling is not in the paper.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "ctx/export.h"

namespace ctx {

struct Compressor {
  // Slots of groups: keys [B, Hkv, G, c, D], values [B, Hkv, G, c, Dv], un-rotated, float32
  // (float64 for float64) -> ([B, Hkv, G, D], [B, Hkv, G, Dv]). Groups that are not due yet are
  // among them.
  using Function =
      std::function<std::tuple<at::Tensor, at::Tensor>(const at::Tensor&, const at::Tensor&)>;

  std::string name = "mean";
  std::vector<at::Tensor> parameters;
  Function function =
      nullptr;  // of the compressor "custom", which is yours; called once for each call
  // Tokens left of a group that the function gets, too, c + overlap in all: zeros before a stream.
  int64_t overlap = 0;

  // A compressor that starts as mean pooling (max: as itself). Throws ValueError for an unknown
  // name or a size below 1.
  CTX_API static Compressor make(const std::string& name,
                                 int64_t kv_heads,
                                 int64_t ratio,
                                 int64_t head_dim,
                                 int64_t value_dim,
                                 const at::TensorOptions& options = {});
};

// Compresses groups of un-rotated pairs; differentiable in everything.
//
//   keys [B, Hkv, G, c, D], values [B, Hkv, G, c, Dv]; any floating dtype, any device
//   returns ([B, Hkv, G, D], [B, Hkv, G, Dv])
//
// Throws ValueError for shapes that do not belong together.
CTX_API std::tuple<at::Tensor, at::Tensor> compress(const at::Tensor& keys,
                                                    const at::Tensor& values,
                                                    const Compressor& compressor);

}  // namespace ctx
