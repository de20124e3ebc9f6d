// How a call is walked through a memory: which pieces of it are written before their queries attend.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "ops/memory.h"
#include "ops/plan.h"

namespace ctx::ops {

class Walk {
 public:
  // `whole`: the memory has the call's rows, whatever the plan says.
  Walk(const Memory& memory, const PlanRows& plan, bool whole = false)
      : memory_(memory), plan_(plan), whole_(whole) {}

  // Runs over the call in blocks that the rings have spare entries for, and in which no row begins
  // anew but at the first token; nor a segment, where what leaves then depends on the queries so far.
  template <typename F>
  void for_each_block(const F& run) {
    const int64_t tokens = plan_.tokens();
    const bool by_token = plan_.resets() || counts_attention(memory_.rings);
    if (by_token && tokens > 1 && memory_.kernels().host_reads) return over_rows(run);
    // Where the host cannot read where rows begin anew, any token may be one.
    const int64_t most = by_token ? 1 : memory_.max_rewind;
    for (int64_t offset = 0, size; offset < tokens; offset += size) {
      size = std::min(most, tokens - offset);
      const int64_t origin_at = by_token ? offset : 0;
      const int64_t* const origin = by_token ? plan_.position(offset) : plan_.column(kPlanSeen);
      const int64_t* const lengths = plan_.column(kPlanCount);
      const int64_t* const rows = whole_ ? nullptr : plan_.column(kPlanRow);
      run(Block{
          origin, lengths, offset, size, origin_at, plan_.row_stride(), rows, memory_.rows()});
    }
  }

 private:
  template <typename F>
  void over_rows(const F& run) {
    for (int64_t b = 0; b < plan_.batch(); ++b) {
      origin_.push_back(plan_.header(b, kPlanSeen));
      lengths_.push_back(plan_.header(b, kPlanCount));
      rows_.push_back(whole_ ? b : plan_.memory_row(b));
    }
    for (int64_t begin = 0, end; begin < plan_.tokens(); begin = end) {
      end = next_reset(begin);
      begin_anew(begin);
      for (int64_t offset = begin, tokens; offset < end; offset += tokens) {
        tokens = std::min(memory_.max_rewind, end - offset);
        if (counts_attention(memory_.rings)) tokens = std::min(tokens, segment_left(offset));
        run(Block{
            origin_.data(), lengths_.data(), offset, tokens, 0, 1, rows_.data(), memory_.rows()});
      }
    }
  }

  // Where row b is at token i, and whether it begins anew there.
  int64_t start(int64_t b, int64_t i) const { return i - plan_.token(b, kPlanPosition, i); }
  bool begins(int64_t b, int64_t i) const {
    return i < lengths_[b] && plan_.token(b, kPlanPosition, i) == 0 && -origin_[b] != i;
  }

  int64_t next_reset(int64_t begin) const {
    for (int64_t i = begin + 1; plan_.resets() && i < plan_.tokens(); ++i) {
      for (int64_t b = 0; b < plan_.batch(); ++b)
        if (begins(b, i)) return i;
    }
    return plan_.tokens();
  }

  // Position of the call's first token in the streams that the rows have from this column on.
  void begin_anew(int64_t column) {
    for (int64_t b = 0; b < plan_.batch(); ++b)
      if (column < lengths_[b]) origin_[b] = -start(b, column);
  }

  // Tokens from `offset` on until the first row's segment ends.
  int64_t segment_left(int64_t offset) const {
    const Schedule& schedule = memory_.view.clock.schedule;
    int64_t left = schedule.segment;
    for (int64_t b = 0; b < plan_.batch(); ++b) {
      if (lengths_[b] > offset) left = std::min(left, schedule.segment_left(origin_[b] + offset));
    }
    return left;
  }

  const Memory& memory_;
  const PlanRows& plan_;
  const bool whole_;
  std::vector<int64_t> origin_;  // position of the call's first token
  std::vector<int64_t> lengths_;
  std::vector<int64_t> rows_;  // of the memory
};

}  // namespace ctx::ops
