// A memory's tensors in one list, the rings of every layer and last the clock (ctx/rows.h), and what
// a graph can hold of row operations.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>

#include <optional>
#include <string_view>
#include <vector>

#include "ops/state.h"

namespace ctx::ops {

constexpr int kClock = 2;

inline const at::Tensor& seen_of(at::TensorList state) { return state[state.size() - 2]; }
inline const at::Tensor& rewindable_of(at::TensorList state) { return state[state.size() - 1]; }
inline size_t layers_of(at::TensorList state) { return (state.size() - kClock) / kRings; }
inline at::TensorList rings_of(at::TensorList state, size_t layer) {
  return state.slice(layer * kRings, kRings);
}

// In it tensors are made that can be used under grad later, also in inference mode.
class Ordinary {
 public:
  Ordinary() {
    if (c10::InferenceMode::is_enabled()) guard_.emplace(false);
  }

 private:
  std::optional<c10::InferenceMode> guard_;
};

// In it a memory is written in place, also one whose tensors were made in inference mode.
class Writing {
 public:
  explicit Writing(const at::Tensor& clock) {
    if (clock.is_inference()) guard_.emplace(true);
  }

 private:
  at::NoGradGuard no_grad_;
  std::optional<c10::InferenceMode> guard_;
};

// The numbers of a tensor of integers.
std::vector<int64_t> numbers(const at::Tensor& x);

// Checks row indices: int64 [N], or bool [B].
void check_chosen(const at::Tensor& rows, int64_t batch, std::string_view where);

// Raises where slots are chosen by attention received: it cannot be taken back, and depends on sizes
// and on what was read since.
void refuse_counted(at::TensorList state, std::string_view where);

// Raises unless two states have rings of equal shapes and dtypes; where they are put together, on one
// device and of any number of rows.
void check_same_kind(at::TensorList state,
                     at::TensorList other,
                     bool together,
                     std::string_view where);

// As ctx/rows.h says.
void reset_rows(const at::Tensor& seen,
                const at::Tensor& rewindable,
                const std::optional<at::Tensor>& rows,
                std::string_view where);
std::vector<at::Tensor> merge_rows(at::TensorList states, int64_t memories, std::string_view where);
std::vector<at::Tensor> rows_to(at::TensorList state,
                                std::optional<at::ScalarType> pairs,
                                std::optional<at::ScalarType> slots,
                                std::optional<at::Device> device,
                                std::string_view where);

}  // namespace ctx::ops
