// One plan per call and law: where the tokens of a call stand in the streams of their rows, what each
// query may see, and which groups may fall due. An int64 tensor [B, columns], computed once by
// ctx::plan on the memory's device and shared by all layers; ctx::advance_ counts the call at its end.
//
// Places are counted from the call's first token: what a memory holds has negative ones. A row may
// begin a new stream at any place; the stream that the memory carries starts at place -seen.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "ops/plan_layout.h"

namespace ctx::ops {

using ctx::plan_columns;
inline c10::SymInt plan_columns(const c10::SymInt& tokens, const c10::SymInt& groups) {
  return tokens * int64_t{kPlanPerToken} + groups * int64_t{kPlanPerGroup} + int64_t{kPlanHeader};
}

// Groups that a plan lays out: one for each that can fall due or, where rows begin anew inside the
// call, for each block (Schedule::block_of) of places from the first that a carried group begins in.
c10::SymInt plan_groups(const Schedule& schedule,
                        const c10::SymInt& tokens,
                        bool resets,
                        bool carried);

// The plan as tensors, views of it.
class PlanTensors {
 public:
  // Throws ValueError unless it can be the plan of a call of so many tokens in B rows.
  PlanTensors(const at::Tensor& plan,
              const c10::SymInt& batch,
              const c10::SymInt& tokens,
              const char* where);

  at::Tensor header(PlanColumn column) const { return plan_.select(1, column); }  // [B]
  at::Tensor token(PlanToken quantity) const;                                     // [B, T]
  at::Tensor group(PlanGroup quantity) const;                                     // [B, G]
  const c10::SymInt& tokens() const { return tokens_; }
  const c10::SymInt& groups() const { return groups_; }
  // Whether rows may begin anew inside the call.
  bool resets() const { return plan_.sym_size(1) > plan_columns(tokens_, groups_); }
  const at::Tensor& tensor() const { return plan_; }

 private:
  at::Tensor plan_;
  c10::SymInt tokens_;
  c10::SymInt groups_;
};

// The plan of a call as kernels take it; keeps the tensor.
class PlanRows {
 public:
  PlanRows(const at::Tensor& plan, int64_t batch, int64_t tokens, const char* where);

  int64_t batch() const { return plan_.size(0); }
  int64_t tokens() const { return tokens_; }
  int64_t groups() const { return groups_; }
  // Whether rows may begin anew inside the call.
  bool resets() const { return width_ > plan_columns(tokens_, groups_); }
  // Row 0's entry; the next row's is row_stride() behind it.
  const int64_t* column(PlanColumn column) const { return data_ + column; }
  // The memory's row that row b is; -1: the row of the same number.
  int64_t memory_row(int64_t b) const {
    const int64_t row = header(b, kPlanRow);
    return row < 0 ? b : row;
  }
  const int64_t* position(int64_t token) const { return data_ + kPlanHeader + token; }
  int64_t row_stride() const { return width_; }

  // Where the host reads what tensors hold.
  int64_t header(int64_t b, PlanColumn column) const { return row(b)[column]; }
  int64_t token(int64_t b, PlanToken quantity, int64_t i) const {
    return row(b)[kPlanHeader + quantity * tokens_ + i];
  }
  int64_t group(int64_t b, PlanGroup quantity, int64_t g) const {
    return row(b)[kPlanHeader + kPlanPerToken * tokens_ + quantity * groups_ + g];
  }

 private:
  const int64_t* row(int64_t b) const { return data_ + b * width_; }

  at::Tensor plan_;
  const int64_t* data_;
  int64_t width_;
  int64_t tokens_;
  int64_t groups_;
};

// Dispatches ctx::plan.
//
//   seen       int64 [rows of the memory]
//   lengths    int64 [B], 0 <= length <= T; absent: all T
//   reset_at   bool [B, T]: true where a token is the first of a new stream; absent: nowhere
//   settings   packed; the schedule is read
//   carried    whether there is a memory; without one `seen` is zero
//   rows       int64 [B], the memory's row that each row of the call is, all different; absent: the
//              call has the memory's rows, and seen is [B]
at::Tensor plan(const at::Tensor& seen,
                const std::optional<at::Tensor>& lengths,
                const std::optional<at::Tensor>& reset_at,
                const c10::SymInt& tokens,
                at::IntArrayRef settings,
                bool carried,
                const std::optional<at::Tensor>& rows = std::nullopt);

// Rows of a call into a memory whose rings have `memory_rows` rows: as many, or those that the plan
// names.
c10::SymInt call_rows(const at::Tensor& plan, const c10::SymInt& memory_rows);

// Dispatches ctx::advance_: `seen` and `rewindable` of the plan's rows after the call.
void advance_(const at::Tensor& seen,
              const at::Tensor& rewindable,
              const at::Tensor& plan,
              const c10::SymInt& max_rewind);

}  // namespace ctx::ops
