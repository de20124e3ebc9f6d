// How a call is walked through a memory: which pieces of it are written before their queries attend.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>

#include <algorithm>
#include <cstring>
#include <optional>

#include "ops/layout.h"
#include "ops/registry.h"
#include "ops/settings.h"
#include "ops/state.h"

namespace ctx::ops {

// The tensors and settings that all operators take, in the order of their schemas.
struct Memory {
  State state;
  MemoryView view;
  int64_t max_rewind;
  BasedRotary rotary;

  Memory(State tensors,
         at::IntArrayRef schedule,
         c10::string_view distance,
         int64_t rotary_dim,
         double rotary_base,
         bool rotary_interleaved,
         const char* where)
      : state(std::move(tensors)) {
    view.clock.schedule = parse_schedule(schedule, where);
    view.clock.token_distance = parse_token_distance({distance.data(), distance.size()}, where);
    max_rewind = check_state(state, view.clock.schedule, where).expect_int();
    check_seen(state[kSeen], where);
    const at::Tensor& keys = state[kWindowKeys];
    view.rotary = rotary =
        parse_rotary(rotary_dim, rotary_base, rotary_interleaved, keys.size(3), where);
    view.storage = storage_of(keys.scalar_type(), where, "window_keys");
    view.compressed_storage = slot_storage_of(
        state[kCompressedKeys].scalar_type(), keys.scalar_type(), where, "compressed_keys");
    view.device = device_index(keys);
    view.batch = keys.size(0);
    view.kv_heads = keys.size(1);
    view.head_dim = keys.size(3);
    view.value_dim = state[kWindowValues].size(3);
    view.window_capacity = keys.size(2);
    view.compressed_capacity = state[kCompressedKeys].size(2);
    view.window_keys = keys.data_ptr();
    view.window_values = state[kWindowValues].data_ptr();
    view.compressed_keys = state[kCompressedKeys].data_ptr();
    view.compressed_values = state[kCompressedValues].data_ptr();
    view.sink_keys = state[kSinkKeys].data_ptr();
    view.sink_values = state[kSinkValues].data_ptr();
    if (!counts_usage(state)) return;
    view.usage = state[kAttentionReceived].data_ptr();
    view.slot_positions = state[kSlotPositions].data_ptr<int64_t>();
  }

  // What a call brings. A view of the memory's own rings would change while it is read.
  at::Tensor apart(const at::Tensor& x) const {
    const bool own = std::any_of(
        state.begin(), state.end(), [&](const at::Tensor& part) { return x.is_alias_of(part); });
    return own ? x.clone() : x;
  }

  const Kernels& kernels() const { return kernels_for(state[kWindowKeys].device().type()); }
};

// Where the tokens of one call stand in their rows' streams. A row may begin a new stream inside
// the call, so its first token's position is kept apart from `seen`, which changes last.
class Rows {
 public:
  Rows(const Memory& memory,
       int64_t tokens,
       const std::optional<at::Tensor>& lengths,
       const std::optional<at::Tensor>& reset_at)
      : memory_(memory),
        tokens_(tokens),
        origin_(memory.state[kSeen]),
        spare_(memory.state[kRewindable]) {
    if (lengths) {
      const bool own = lengths->is_alias_of(origin_) || lengths->is_alias_of(spare_);
      lengths_ = own ? lengths->clone() : lengths->contiguous();
    }
    if (!reset_at) return;
    reset_at_ = lengths ? reset_at->logical_and(
                              at::arange(tokens, lengths_.options()).lt(lengths_.unsqueeze(1)))
                        : *reset_at;
    origin_ = origin_.clone();
    spare_ = spare_.clone();
  }

  // Runs over the call in blocks that the rings have max_rewind for, and in which no row begins anew
  // but at the first token; nor a segment, where what leaves then depends on the queries so far.
  template <typename F>
  void for_each_block(const F& run) {
    for (int64_t begin = 0, end; begin < tokens_; begin = end) {
      end = next_reset(begin);
      if (reset_at_.defined()) begin_anew(begin);
      for (int64_t offset = begin, tokens; offset < end; offset += tokens) {
        tokens = std::min(memory_.max_rewind, end - offset);
        if (counts_usage(memory_.state)) tokens = std::min(tokens, segment_left(offset));
        run(Block{origin_.const_data_ptr<int64_t>(),
                  lengths_.defined() ? lengths_.const_data_ptr<int64_t>() : nullptr,
                  offset,
                  tokens});
      }
    }
  }

  // Counts the call's tokens.
  void finish() {
    // A memory that was made in inference mode may be streamed into outside of it, too.
    const c10::InferenceMode writes(true);
    at::Tensor seen = memory_.state[kSeen];
    at::Tensor rewindable = memory_.state[kRewindable];
    if (reset_at_.defined()) seen.copy_(origin_), rewindable.copy_(spare_);
    if (lengths_.defined()) {
      seen.add_(lengths_);
      rewindable.add_(lengths_);
    } else {
      seen.add_(tokens_);
      rewindable.add_(tokens_);
    }
    rewindable.clamp_max_(memory_.max_rewind);
    // Kernels wrote into the rings; a graph that still needs them as they were has to hear of it.
    for (const at::Tensor& part : memory_.state) part.unsafeGetTensorImpl()->bump_version();
  }

 private:
  // The first column after `begin` in which a row begins anew. What a device holds is not known
  // here, so each of its tokens may be one.
  int64_t next_reset(int64_t begin) const {
    if (!reset_at_.defined()) return tokens_;
    if (!reset_at_.is_cpu()) return begin + 1;
    const at::Tensor any = reset_at_.narrow(1, begin + 1, tokens_ - begin - 1).any(0);
    const bool* found = static_cast<const bool*>(
        any.numel() == 0 ? nullptr : std::memchr(any.const_data_ptr<bool>(), 1, any.numel()));
    return found == nullptr ? tokens_ : begin + 1 + (found - any.const_data_ptr<bool>());
  }

  // Tokens from `offset` on until the first row's segment ends. What a device holds is not known
  // here, so each token may end one.
  int64_t segment_left(int64_t offset) const {
    if (!origin_.is_cpu()) return 1;
    const int64_t segment = memory_.view.clock.schedule.segment;
    int64_t left = segment;
    for (int64_t b = 0; b < memory_.view.batch; ++b) {
      if (lengths_.defined() && lengths_.const_data_ptr<int64_t>()[b] <= offset) continue;
      const int64_t position = origin_.const_data_ptr<int64_t>()[b] + offset;
      left = std::min(left, segment - position % segment);
    }
    return left;
  }

  void begin_anew(int64_t column) {
    const at::Tensor anew = reset_at_.select(1, column);
    origin_.masked_fill_(anew, -column);
    spare_.masked_fill_(anew, -column);
  }

  const Memory& memory_;
  int64_t tokens_;
  at::Tensor lengths_;
  at::Tensor reset_at_;  // undefined: no row begins anew
  at::Tensor origin_;    // position of the call's first token, [B]
  at::Tensor spare_;     // what `rewindable` was before the call, or would have been
};

}  // namespace ctx::ops
