// What attends from a call's queries to a memory.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <tuple>
#include <vector>

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
         bool with_region_weights,
         bool counts)
      : memory_(memory),
        operands_(operands),
        q_(rows(memory.apart(q))),
        out_(at::empty({q.size(0), q.size(1), q.size(2), memory.view.value_dim}, q.options())),
        region_weights_(new_region_weights(q, with_region_weights)) {
    args_.memory = memory.view;
    args_.heads = q.size(1);
    args_.scale = scale;
    args_.queries = strided(q_);
    args_.out = strided(out_);
    if (operands.bias) args_.bias = per_head(*operands.bias, bias_);
    if (operands.slopes) args_.slopes = per_head(*operands.slopes, slopes_);
    if (with_region_weights) args_.region_weights = region_weights_.data_ptr();
    args_.call_tokens = q.size(2);
    args_.count_usage = counts && memory.view.usage != nullptr;
  }

  void attend(const Block& block) {
    if (!operands_.relative.empty()) return compose(block);
    if (many(block)) return attend_spans(block);
    args_.block = block;
    memory_.kernels().attend(args_);
  }

  std::tuple<at::Tensor, at::Tensor> result() const { return {out_, region_weights_}; }

 private:
  const void* per_head(const at::Tensor& values, at::Tensor& kept) const {
    kept = values.to(arithmetic_type(q_.scalar_type())).expand({q_.size(1)}).contiguous();
    return kept.const_data_ptr();
  }

  // Whether a block has so many queries that the kernels of the differentiable path are faster, and
  // they know all that it asks for.
  bool many(const Block& block) const {
    constexpr int64_t kManyRows = 16;  // query heads of a kv head times tokens; measured
    const MemoryView& m = memory_.view;
    const int64_t rows = block.tokens * (args_.heads / m.kv_heads);
    const bool threads_share = m.kv_heads > 1 || rows >= 8 * kManyRows;
    const bool single_tokens = m.slot_positions != nullptr && m.clock.token_distance;
    return block.tokens > 1 && rows >= kManyRows && threads_share &&
           memory_.kernels().spans_forward != nullptr && !args_.count_usage &&
           !(args_.slopes != nullptr && single_tokens);
  }

  // The rings are the past of all queries, and nothing comes behind it.
  void attend_spans(const Block& block) {
    const MemoryView& m = memory_.view;
    const Schedule& s = m.clock.schedule;
    const int64_t all = m.batch * block.tokens;
    std::vector<int64_t> position(all, -1), sink(all, 0), slot(all), token(all);
    std::vector<int64_t> no_sink(m.batch, 0), first_slot(m.batch), first_token(m.batch);
    for (int64_t b = 0; b < m.batch; ++b) {
      const int64_t t = block.first(b);
      const int64_t begin = std::max<int64_t>(0, t);
      first_slot[b] = s.groups(begin) - s.compressed;
      first_token[b] = s.window_begin(begin);
      for (int64_t i = 0; i < block.tokens; ++i) {
        const int64_t place = b * block.tokens + i;
        if (i < block.count(b) && t + i >= 0) position[place] = t + i;
        slot[place] = first_slot[b];
        token[place] = first_token[b];
      }
    }
    SpansArgs a;
    a.clock = m.clock, a.rotary = m.rotary, a.storage = m.storage, a.device = m.device;
    a.batch = m.batch, a.heads = args_.heads, a.kv_heads = m.kv_heads, a.tokens = block.tokens;
    a.head_dim = m.head_dim, a.value_dim = m.value_dim;
    a.scale = args_.scale, a.bias = args_.bias, a.slopes = args_.slopes;
    a.position = position.data();
    const at::Tensor q = q_.narrow(2, block.offset, block.tokens);
    const at::Tensor out = out_.narrow(2, block.offset, block.tokens);
    a.queries = strided(q), a.out = strided(out);
    const auto past = [](int64_t size, Storage storage, void* keys, void* values, auto& first) {
      return PastSpan{size, size, storage, keys, values, first.data()};
    };
    a.spans[kSinks] = {s.sinks,
                       past(s.sinks, m.storage, m.sink_keys, m.sink_values, no_sink),
                       {},
                       {},
                       sink.data()};
    a.spans[kCompressed] = {m.compressed_capacity,
                            past(m.compressed_capacity,
                                 m.compressed_storage,
                                 m.compressed_keys,
                                 m.compressed_values,
                                 first_slot),
                            {},
                            {},
                            slot.data()};
    a.spans[kWindow] = {
        m.window_capacity,
        past(m.window_capacity, m.storage, m.window_keys, m.window_values, first_token),
        {},
        {},
        token.data()};
    const auto wide = q_.options().dtype(arithmetic_type(q_.scalar_type()));
    const at::Tensor logsumexp = at::empty({a.batch, a.heads, a.tokens}, wide);
    a.logsumexp = logsumexp.data_ptr();
    const bool with_region_weights = args_.region_weights != nullptr;
    const at::Tensor region_weights = new_region_weights(q, with_region_weights);
    if (with_region_weights) a.region_weights = region_weights.data_ptr();
    memory_.kernels().spans_forward(a);
    if (with_region_weights)
      region_weights_.narrow(2, block.offset, block.tokens).copy_(region_weights);
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
    const at::Tensor tokens = count_from(window_begin_of(s, begun), s.max_window() + block.tokens);
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
    spans.first_token = each(window_begin_of(s, begun));
    const auto narrow = [&](const at::Tensor& x) {
      return x.narrow(2, block.offset, block.tokens);
    };
    const bool with_region_weights = region_weights_.dim() == 4;
    const Attended got = attend_now(narrow(q_),
                                    position,
                                    spans,
                                    operands_,
                                    clock,
                                    memory_.rotary,
                                    args_.scale,
                                    with_region_weights,
                                    args_.count_usage);
    const at::Tensor absent = position.lt(0).unsqueeze(1).unsqueeze(-1);
    narrow(out_).copy_(got.out.masked_fill(absent, 0.0));
    if (with_region_weights)
      narrow(region_weights_).copy_(got.region_weights.masked_fill(absent, 0.0));
    if (!args_.count_usage) return;
    const at::Tensor index = tokens.remainder(memory_.view.window_capacity).unsqueeze(1);
    at::Tensor usage = state[kAttentionReceived];
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
  at::Tensor region_weights_;
  AttendArgs args_;
};

}  // namespace ctx::ops
