// What attends from a call's queries to a memory.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

#include "ops/memory.h"
#include "ops/relative.h"

namespace ctx::ops {

class Reader {
 public:
  // `counts`: what queries give to tokens of the window is added up, where the memory wants it.
  Reader(const Memory& memory,
         const at::Tensor& q,
         const ScoreOperands& operands,
         bool with_region_weights,
         bool counts);

  void attend(const Block& block);

  // Output [B, H, T, Dv], and the weight of each region (new_region_weights).
  std::tuple<at::Tensor, at::Tensor> result() const { return {out_, region_weights_}; }

 private:
  const void* per_head(const std::optional<at::Tensor>& values);
  Strided keep_rows(const at::Tensor& x);
  bool many(const Block& block) const;
  void attend_spans(const Block& block);

  const Memory& memory_;
  at::Tensor q_;
  std::vector<at::Tensor> kept_;
  at::Tensor out_;
  at::Tensor region_weights_;
  AttendArgs args_;
};

}  // namespace ctx::ops
