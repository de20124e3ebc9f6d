// Queries of relative positions (AttentionSettings::relative), and their gradients.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "ops/settings.h"

namespace ctx::ops {

// What is multiplied with keys, and with the encodings of distances.
struct RelativeQueries {
  at::Tensor content;     // q + u, [B, H, T, D]
  at::Tensor relative;    // (q + v) W, [B, H, T, P]
  at::Tensor compressed;  // the same with those of compressed slots

  // `operands`: u, v, W, compressed v, compressed W.
  RelativeQueries(const at::Tensor& q, at::TensorList operands);

  // Of q, and of the operands, given those of the three above.
  struct Gradients {
    at::Tensor q;
    std::vector<at::Tensor> operands;
  };
  Gradients backward(const at::Tensor& grad_content,
                     const at::Tensor& grad_relative,
                     const at::Tensor& grad_compressed) const;

 private:
  at::Tensor q_;       // [B, H, T, D] in the arithmetic's type, rows that are not finite zero
  at::Tensor absent_;  // bool [B, H, T, 1]: those rows
  at::TensorList operands_;
};

}  // namespace ctx::ops
