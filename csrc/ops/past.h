// What a memory holds of the past, as a differentiable call attends to it: rings as they are, which no
// gradient reaches.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "ops/kernels.h"

namespace ctx::ops {

struct Past {
  at::Tensor window_keys;        // [B, Hkv, capacity, D]
  at::Tensor window_values;      // [B, Hkv, capacity, Dv]
  at::Tensor compressed_keys;    // [B, Hkv, capacity, stored D]
  at::Tensor compressed_values;  // [B, Hkv, capacity, stored Dv]
  // int64 [B, 4]: the first token of the past, the first of them that the next token sees, and the
  // same of slots; undefined: there is no past.
  at::Tensor numbers;

  // From and to what an operator takes: five tensors, or none.
  static Past of(at::TensorList list, const char* where);
  std::vector<at::Tensor> list() const;

  bool defined() const { return numbers.defined(); }

  // How many keys of a region it holds, whether they have been written or not.
  int64_t size(const Schedule& schedule, Region region) const;

  // Number of the first key of a region, and of the first one that the next token sees, [B].
  at::Tensor first(Region region) const;
  at::Tensor first_seen(Region region) const;

  // Raises unless rings and numbers fit the spans that they are before, [B, Hkv, keys, width].
  void check(const Schedule& schedule,
             const at::Tensor& keys,
             const at::Tensor& values,
             const char* where) const;

  // Its keys or values of a region in order, [B, Hkv, size, width]; zero what the next token does
  // not see.
  at::Tensor read(const at::Tensor& ring,
                  const Schedule& schedule,
                  Region region,
                  at::ScalarType type) const;
};

}  // namespace ctx::ops
