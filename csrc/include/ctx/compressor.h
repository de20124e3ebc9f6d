// Compressors: c tokens -> 1 slot, per kv head.
//
//   name         slot (the value slot likewise, with its own parameters)
//   "mean"       mean over the c tokens
//   "max"        maximum over the c tokens, channel by channel
//   "conv"       sum_i x_i W_i (+ b): stride c, kernel k >= c; i runs over the k - c tokens left of
//                the group, too, which are zero before the stream
//   "dilated"    L layers ReLU(x_(t - 2^l) W_0 + x_t W_1), l = 0 ... L - 1, then sum_i h_i W_i over
//                the group; L = max(1, ceil(log2 c)), so that 2^L - 1 tokens left of it are read
//   "gated"      sum_i softmax_i(key_i . gate + position_i) x_i
//   "most_used"  of the c k tokens that leave the window at one boundary the k which got the most
//                attention, in the order of their positions; of equals the earlier
//   "custom"     whatever its function makes of them
//
//   name         parameters, in this order
//   "conv"       key_weight [Hkv, k, D, D], value_weight [Hkv, k, Dv, Dv], and perhaps
//                key_bias [Hkv, D], value_bias [Hkv, Dv]
//   "dilated"    key_first [Hkv, 2, D, 2D], key_hidden [Hkv, L - 1, 2, 2D, 2D],
//                key_weight [Hkv, c, 2D, D], and value_first, value_hidden, value_weight with Dv
//   "gated"      key_gate [Hkv, D], key_position [Hkv, c], value_gate [Hkv, D],
//                value_position [Hkv, c]
//
// All but gated pooling are the compression functions of Rae et al. 2019 (arXiv:1911.05507, section
// 3.2); they work there on hidden states shared by all heads, here on the pairs of each kv head.
// The paper does not say how deep or wide its dilated convolutions are.
//
// The log-mass of a slot is log c for mean, max, conv and dilated, the entropy of the key gate's weights
// for gated, and 0 for most_used, whose slot is one token.
//
// What "most_used" means by usage: the weights that a token got from queries since it was written,
// averaged over the query heads of its kv head. It is state of the row, as is the position of the
// token that a slot is, which the slot keeps under the distance "token": so such a memory cannot be
// rewound, and tokens come with their queries (KVMemory::step) or not at all.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <string>
#include <tuple>
#include <vector>

#include "ctx/export.h"

namespace ctx {

struct Compressor {
  // Slots of groups: keys [B, Hkv, G, c + overlap, D], values [B, Hkv, G, c + overlap, Dv],
  // un-rotated, float32 (float64 for float64) -> {[B, Hkv, G, D], [B, Hkv, G, Dv]} and perhaps their
  // log-mass [B, Hkv, G]; without it that is log c. Groups that are not due yet are among them.
  using Function = std::function<std::vector<at::Tensor>(const at::Tensor&, const at::Tensor&)>;

  std::string name = "mean";
  std::vector<at::Tensor> parameters;
  Function function =
      nullptr;  // of the compressor "custom", which is yours; called once for each call
  // Tokens left of a group that the function gets, too, c + overlap in all: zeros before a stream.
  // Others know it from their parameters.
  int64_t overlap = 0;

  // A compressor with its first values: conv, dilated and gated start as mean pooling. value_dim may
  // be 0, for a memory without values. Throws ValueError for an unknown name, another size below 1,
  // or a kernel (of "conv" only; 0: ratio) below the ratio.
  CTX_API static Compressor make(const std::string& name,
                                 int64_t kv_heads,
                                 int64_t ratio,
                                 int64_t head_dim,
                                 int64_t value_dim,
                                 const at::TensorOptions& options = {},
                                 int64_t kernel = 0);

  // Tokens left of a group that it reads where c tokens make a slot.
  CTX_API int64_t reads_left(int64_t ratio) const;
};

// Compresses groups of un-rotated pairs; differentiable in everything.
//
//   keys [B, Hkv, G, c + overlap, D], values [B, Hkv, G, c + overlap, Dv]; any floating dtype, any
//     device
//   ratio     c, where the log-mass of slots is asked for; 0: it is not
//   returns [B, Hkv, G, D], [B, Hkv, G, Dv], and the log-mass [B, Hkv, G] or [0]
//
// Throws ValueError for shapes that do not belong together, and for "most_used", which chooses by
// more than the pairs.
CTX_API std::tuple<at::Tensor, at::Tensor, at::Tensor> compress(const at::Tensor& keys,
                                                                const at::Tensor& values,
                                                                const Compressor& compressor,
                                                                int64_t ratio = 0);

}  // namespace ctx
