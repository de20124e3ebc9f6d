// What stands in a plan (ops/plan.h), and how one row of it is made: for the host and for devices.
#pragma once

#include <cstdint>

#include "ops/kernels.h"

namespace ctx {

// The columns: a header, then for each of T tokens and for each of G groups one column per quantity;
// and one more, which holds nothing, where rows may begin anew inside the call.
enum PlanColumn : int64_t {
  kPlanSeen,        // tokens of the carried stream before the call
  kPlanCount,       // tokens that the row brings
  kPlanBlock,       // Schedule::block_of of the carried stream's first group that is not made yet
  kPlanFirstToken,  // number of the first token, slot and sink of the memory that precede the call's
  kPlanFirstSlot,   //   in the three spans that queries attend to
  kPlanFirstSink,
  kPlanOldestToken,  // the first that the next token of the carried stream can see
  kPlanOldestSlot,
  kPlanRow,  // the memory's row that the row is; -1: the row of the same number
  kPlanHeader
};
enum PlanToken : int64_t {
  kPlanPosition,  // number of the token in its stream; -1: padding
  kPlanTokenKey,  // number, in the token's stream, of the first key of the window's span
  kPlanSlotKey,   //   of the span of slots
  kPlanSinkKey,   //   of the span of sinks
  kPlanPerToken
};
enum PlanGroup : int64_t {
  kPlanPlace,   // place of the group's first token
  kPlanNumber,  // number of the group in its stream
  kPlanPerGroup
};

// The least width of a plan; one that tells of resets has one column more.
CTX_HOST_DEVICE constexpr int64_t plan_columns(int64_t tokens, int64_t groups) {
  return kPlanHeader + tokens * kPlanPerToken + groups * kPlanPerGroup;
}

struct PlanArgs {
  Schedule schedule;
  bool carried = false;  // whether there is a memory that precedes the call
  bool resets = false;   // whether rows may begin anew inside the call
  int device = 0;
  int64_t batch = 0;
  int64_t tokens = 0;
  int64_t groups = 0;
  int64_t memory_rows = 0;           // entries of `seen`
  const int64_t* seen = nullptr;     // of the rows of the memory
  const int64_t* rows = nullptr;     // [B]: the memory's row that each row is; null: the same
  const int64_t* lengths = nullptr;  // [B]; null: all are as long as the call
  const bool* reset_at = nullptr;    // [B, T]; null: no row begins anew
  int64_t* plan = nullptr;           // [B, columns], contiguous; written
};

struct AdvanceArgs {
  int device = 0;
  int64_t batch = 0;
  int64_t columns = 0;
  int64_t max_rewind = 0;
  int64_t memory_rows = 0;        // entries of `seen` and `rewindable`
  const int64_t* plan = nullptr;  // [B, columns], contiguous
  int64_t* seen = nullptr;        // written where the plan has a row
  int64_t seen_stride = 1;
  int64_t* rewindable = nullptr;  // written where the plan has a row
  int64_t rewindable_stride = 1;
};

// Row b of a plan, filled in three steps; each may be shared by threads where the one before is done.
class PlanRow {
 public:
  CTX_HOST_DEVICE PlanRow(const PlanArgs& args, int64_t b)
      : s_(args.schedule),
        tokens_(args.tokens),
        groups_(args.groups),
        memory_row_(args.rows == nullptr ? -1 : args.rows[b]),
        seen_(args.seen[row_in_memory(memory_row_, b, args.memory_rows)]),
        count_(args.lengths == nullptr ? args.tokens : args.lengths[b]),
        reset_at_(args.reset_at == nullptr ? nullptr : args.reset_at + b * args.tokens),
        behind_tokens_(args.carried ? s_.max_window() : 0),
        behind_slots_(args.carried ? s_.compressed : 0),
        behind_sinks_(args.carried ? s_.sinks : 0),
        row_(args.plan + b * (plan_columns(tokens_, groups_) + args.resets)) {
    constexpr int64_t kLast = Schedule::kLastPosition;  // a damaged counter stays in int64
    seen_ = seen_ < 0 ? 0 : seen_ > kLast ? kLast : seen_;
    count_ = count_ < 0 ? 0 : count_ > tokens_ ? tokens_ : count_;
    begun_ = s_.groups(seen_ - 1);
    block_ = s_.block_of(-seen_, begun_);
    resets_ = args.resets;
  }

  CTX_HOST_DEVICE void fill_header() const {
    row_[kPlanSeen] = seen_;
    row_[kPlanCount] = count_;
    row_[kPlanBlock] = block_;
    row_[kPlanFirstToken] = seen_ - behind_tokens_;
    row_[kPlanFirstSlot] = begun_ - behind_slots_;
    row_[kPlanFirstSink] = sinks_at(seen_) - behind_sinks_;
    row_[kPlanOldestToken] = s_.first_token(begun_);
    const int64_t oldest = s_.groups(seen_) - s_.compressed;
    row_[kPlanOldestSlot] = oldest < 0 ? 0 : oldest;
    row_[kPlanRow] = memory_row_;
    if (resets_) row_[plan_columns(tokens_, groups_)] = 0;
  }

  // Where the stream of tokens begin ... end - 1 starts, given where that of the token before does.
  CTX_HOST_DEVICE int64_t carried_start() const { return -seen_; }
  CTX_HOST_DEVICE int64_t last_start(int64_t begin, int64_t end, int64_t start) const {
    for (int64_t i = end - 1; reset_at_ != nullptr && i >= begin; --i)
      if (i < count_ && reset_at_[i]) return i;
    return start;
  }

  CTX_HOST_DEVICE void fill_tokens(int64_t begin, int64_t end, int64_t start) const {
    int64_t* const row = row_ + kPlanHeader;
    for (int64_t i = begin; i < end; ++i) {
      start = last_start(i, i + 1, start);
      // A stream that begins at the call's first token, in a row that has seen nothing, is carried.
      const bool carried = start == -seen_;
      row[kPlanPosition * tokens_ + i] = i < count_ ? i - start : -1;
      row[kPlanTokenKey * tokens_ + i] = -start - behind_tokens_;
      row[kPlanSlotKey * tokens_ + i] =
          (carried ? begun_ : block_ - s_.block_of(start, 0)) - behind_slots_;
      row[kPlanSinkKey * tokens_ + i] = (carried ? sinks_at(seen_) : -start) - behind_sinks_;
    }
  }

  CTX_HOST_DEVICE void fill_groups(int64_t begin, int64_t end) const {
    int64_t* const row = row_ + kPlanHeader + kPlanPerToken * tokens_;
    for (int64_t g = begin; g < end; ++g) {
      int64_t& place = row[kPlanPlace * groups_ + g];
      int64_t& number = row[kPlanNumber * groups_ + g];
      if (resets_) {
        place = whole_group(block_ + g);
        const int64_t token = place - start_at(place);
        number = place < tokens_ && token > s_.sinks ? s_.group_of(token) : 0;
      } else {
        number = begun_ + g;
        place = s_.first_token(number) - seen_;
      }
    }
  }

 private:
  CTX_HOST_DEVICE int64_t sinks_at(int64_t seen) const { return seen < s_.sinks ? seen : s_.sinks; }

  // Where the stream of a place of the call starts; tokens are filled.
  CTX_HOST_DEVICE int64_t start_at(int64_t place) const {
    if (place < 0) return -seen_;
    if (place >= tokens_) return tokens_;
    return -row_[kPlanHeader + kPlanTokenKey * tokens_ + place] - behind_tokens_;
  }

  // The place in a block at which a group begins that is whole within the call; else the first.
  CTX_HOST_DEVICE int64_t whole_group(int64_t block) const {
    const int64_t c = s_.ratio, first = s_.tokens_of(block);
    const int64_t end = first + c < tokens_ ? first + c : tokens_;
    for (int64_t place = first; place < end; ++place) {
      const int64_t start = start_at(place);
      const int64_t token = place - start;
      const bool begins = token >= s_.sinks && s_.place_in_group(token) == 0;
      if (begins && start_at(place + c - 1) == start) return place;
    }
    return first;
  }

  Schedule s_;
  int64_t tokens_;
  int64_t groups_;
  int64_t memory_row_;
  int64_t seen_;
  int64_t count_;
  const bool* reset_at_;
  int64_t behind_tokens_, behind_slots_, behind_sinks_;
  int64_t* row_;
  int64_t begun_ = 0;
  int64_t block_ = 0;
  bool resets_ = false;
};

// Counts the tokens of row b of a plan: the last one's position says how long the row's stream is now.
CTX_HOST_DEVICE inline void advance_row(const AdvanceArgs& args, int64_t b) {
  const int64_t* const row = args.plan + b * args.columns;
  const int64_t held = row_in_memory(row[kPlanRow], b, args.memory_rows);
  int64_t& tokens = args.seen[held * args.seen_stride];
  int64_t& back = args.rewindable[held * args.rewindable_stride];
  const int64_t count = row[kPlanCount];
  if (count > 0 && count <= args.columns - kPlanHeader) {
    tokens = row[kPlanHeader + count - 1] + 1;
    back = tokens == row[kPlanSeen] + count ? back + count : tokens;
  }
  back = back < args.max_rewind ? back : args.max_rewind;
}

}  // namespace ctx
