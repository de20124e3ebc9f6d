// What attends from a call's queries to a memory.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>

#include "ops/attend.h"
#include "ops/rings.h"
#include "ops/walk.h"

namespace ctx::ops {

class Reader {
 public:
  // `counts`: queries add to the usage of what they attend to, where the memory counts it.
  Reader(const Memory& memory,
         const at::Tensor& q,
         const ScoreOperands& operands,
         double scale,
         bool with_mass,
         bool counts)
      : memory_(memory),
        operands_(operands),
        q_(rows(q)),
        out_(at::empty({q.size(0), q.size(1), q.size(2), memory.view.value_dim}, q.options())),
        mass_(new_mass(q, with_mass)) {
    args_.memory = memory.view;
    args_.heads = q.size(1);
    args_.scale = scale;
    args_.queries = strided(q_);
    args_.out = strided(out_);
    if (operands.bias) args_.bias = per_head(*operands.bias, bias_);
    if (operands.slopes) args_.slopes = per_head(*operands.slopes, slopes_);
    if (with_mass) args_.mass = mass_.data_ptr();
    args_.call_tokens = q.size(2);
    args_.count_usage = counts && memory.view.usage != nullptr;
  }

  void attend(const Block& block) {
    if (!operands_.relative.empty()) return compose(block);
    args_.block = block;
    memory_.kernels().attend(args_);
  }

  std::tuple<at::Tensor, at::Tensor> result() const { return {out_, mass_}; }

 private:
  const void* per_head(const at::Tensor& values, at::Tensor& kept) const {
    kept = values.to(arithmetic_type(q_.scalar_type())).expand({q_.size(1)}).contiguous();
    return kept.const_data_ptr();
  }

  // Relative positions have no kernel: the rings are read in order, and torch's operators do it.
  void compose(const Block& block) {
    const auto precision = own_precision();
    const at::AutoDispatchBelowADInplaceOrView below;  // nothing is recorded
    const State& state = memory_.state;
    const Clock& clock = memory_.view.clock;
    const Schedule& s = clock.schedule;
    const auto integers = state[kSeen].options();
    const auto from = [&](const int64_t* values) {
      return at::from_blob(const_cast<int64_t*>(values), {memory_.view.batch}, integers);
    };
    const at::Tensor first = from(block.origin).add(block.offset);
    const at::Tensor place = at::arange(block.tokens, integers).unsqueeze(0);
    at::Tensor position = first.unsqueeze(1) + place;
    at::Tensor last = first + (block.tokens - 1);
    if (block.lengths != nullptr) {
      const at::Tensor count = from(block.lengths).sub(block.offset).clamp(0, block.tokens);
      position = position.masked_fill(place.ge(count.unsqueeze(1)), -1);
      last = first + count - 1;
    }
    const at::Tensor begun = groups_of(s, first);
    const at::Tensor tokens = count_from(edge_of(s, begun), s.max_window() + block.tokens);
    const at::Tensor written = tokens.le(last.unsqueeze(1)).logical_and(last.unsqueeze(1).ge(0));
    const at::Tensor groups =
        count_from(begun - s.compressed, s.compressed + s.max_new_groups(block.tokens));
    const at::Tensor made = groups.ge(0).logical_and(groups.lt(groups_of(s, last).unsqueeze(1)));
    Spans spans;
    const at::Tensor sinks =
        at::arange(s.sinks, integers).unsqueeze(0).expand({memory_.view.batch, -1});
    const at::Tensor begins = sinks.le(last.unsqueeze(1));
    const bool some = s.sinks > 0;
    spans.sink_keys = some ? read_ring(state[kSinkKeys], sinks, begins) : state[kSinkKeys];
    spans.sink_values = some ? read_ring(state[kSinkValues], sinks, begins) : state[kSinkValues];
    spans.window_keys = read_ring(state[kWindowKeys], tokens, written);
    spans.window_values = read_ring(state[kWindowValues], tokens, written);
    const bool slots = s.compressed > 0;
    const auto read_slots = [&](const at::Tensor& ring) {
      return slots_as(slots ? read_ring(ring, groups, made) : ring, q_.scalar_type());
    };
    spans.compressed_keys = read_slots(state[kCompressedKeys]);
    spans.compressed_values = read_slots(state[kCompressedValues]);
    if (memory_.view.slot_positions != nullptr && clock.token_distance) {
      const at::Tensor ring = state[kSlotPositions].unsqueeze(-1);
      spans.slot_positions =
          slots ? read_ring(ring, groups, made).squeeze(-1) : state[kSlotPositions];
    }
    const auto each = [&](const at::Tensor& x) { return x.unsqueeze(1).expand_as(position); };
    spans.first_sink = at::zeros_like(position);
    spans.first_slot = each(begun - s.compressed);
    spans.first_token = each(edge_of(s, begun));
    const auto narrow = [&](const at::Tensor& x) {
      return x.narrow(2, block.offset, block.tokens);
    };
    const bool with_mass = mass_.dim() == 4;
    const Attended got = attend_now(narrow(q_),
                                    position,
                                    spans,
                                    operands_,
                                    clock,
                                    memory_.view.rotary,
                                    args_.scale,
                                    with_mass,
                                    args_.count_usage);
    const at::Tensor absent = position.lt(0).unsqueeze(1).unsqueeze(-1);
    narrow(out_).copy_(got.out.masked_fill(absent, 0.0));
    if (with_mass) narrow(mass_).copy_(got.mass.masked_fill(absent, 0.0));
    if (!args_.count_usage) return;
    const at::Tensor index = tokens.remainder(memory_.view.window_capacity).unsqueeze(1);
    at::Tensor usage = state[kUsage];
    usage.scatter_add_(2,
                       index.expand_as(got.usage),
                       got.usage.masked_fill(written.logical_not().unsqueeze(1), 0.0));
  }

  const Memory& memory_;
  ScoreOperands operands_;
  at::Tensor q_;
  at::Tensor bias_;
  at::Tensor slopes_;
  at::Tensor out_;
  at::Tensor mass_;
  AttendArgs args_;
};

}  // namespace ctx::ops
