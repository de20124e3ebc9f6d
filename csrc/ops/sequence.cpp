// ctx::evicted_groups, ctx::attend_sequence: a call of T tokens as a differentiable function of the
// tokens and of a memory that stays as it is. What the rings hold is gathered in order and the new
// tokens are put behind it; sizes depend on T and on the schedule alone, so that a compiled graph
// serves every position of the stream.
//
// Tokens are counted from the call's first: what the window ring holds has negative places. A row
// may begin a new stream (a document) at any place; the token at place i is token i - start(i) of
// its stream, and the stream that the memory carries starts at -seen.
#include <torch/library.h>

#include <algorithm>
#include <limits>
#include <vector>

#include "core/check.h"
#include "ops/attend.h"
#include "ops/rings.h"
#include "ops/rotary.h"
#include "ops/settings.h"
#include "ops/state.h"
#include "ops/tokens.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

// x [B, Hkv, n, D] rotated to positions [B, Hkv, n].
Tensor rotate_heads(const Tensor& x, const Tensor& position, const BasedRotary& rotary) {
  const Tensor rows = x.flatten(0, 1).unsqueeze(1);
  return rotate(rows, position.flatten(0, 1), rotary).squeeze(1).view_as(x);
}

// The new tokens of a call and what a memory holds of the rows' past.
class Sequence {
 public:
  Sequence(const Tensor& k,
           const Tensor& v,
           const OptionalTensor& lengths,
           const OptionalTensor& reset_at,
           at::TensorList memory,
           at::IntArrayRef schedule,
           c10::string_view distance,
           int64_t rotary_dim,
           double rotary_base,
           bool rotary_interleaved,
           const char* where)
      : memory_(memory.vec()) {
    clock_.schedule = parse_schedule(schedule, where);
    clock_.token_distance = parse_token_distance({distance.data(), distance.size()}, where);
    CTX_CHECK_VALUE(k.dim() == 4, where, "k must be [B, Hkv, T, D], got ", k.sym_sizes());
    CTX_CHECK_VALUE(v.dim() == 4 && v.sym_sizes().slice(0, 3) == k.sym_sizes().slice(0, 3),
                    where,
                    "v must be [B, Hkv, T, Dv] with k's B, Hkv, T, got ",
                    v.sym_sizes(),
                    " for k ",
                    k.sym_sizes());
    CTX_CHECK_TYPE(v.scalar_type() == k.scalar_type(),
                   where,
                   "v must be ",
                   k.scalar_type(),
                   " as k, got ",
                   v.scalar_type());
    storage_of(k.scalar_type(), where, "k");
    check_rows(k, lengths, reset_at, where);
    if (!fresh()) {
      check_state(memory_, law(), where);
      check_pairs(memory_, k, v, where);
    }
    const int64_t head_dim = k.sym_size(3).guard_int(__FILE__, __LINE__);
    rotary_ = parse_rotary(rotary_dim, rotary_base, rotary_interleaved, head_dim, where);
    tokens_ = k.sym_size(2);
    resets_ = reset_at.has_value() && tokens_ > 0;
    const auto integers = k.options().dtype(at::kLong);
    seen_ = fresh() ? at::zeros_symint({k.sym_size(0)}, integers) : memory_[kSeen];
    begun_ = groups_of(law(), seen_ - 1).mul(seen_.gt(0));  // groups made before: n(seen - 1)
    const Tensor place = at::arange(at::Scalar(tokens_), integers).unsqueeze(0);  // [1, T]
    k_ = k, v_ = v;
    if (lengths) {  // nothing that stands at padding may matter, not even a NaN
      padding_ = place.ge(lengths->unsqueeze(1));
      const Tensor cut = padding_.unsqueeze(1).unsqueeze(-1);
      k_ = k_.masked_fill(cut, 0.0), v_ = v_.masked_fill(cut, 0.0);
    }
    const Tensor carried = seen_.neg().unsqueeze(1);
    start_ = resets_ ? std::get<0>(at::where(*reset_at, place, carried).cummax(1))
                     : carried.expand_symint({k.sym_size(0), tokens_});
    position_ = place - start_;
  }

  const Schedule& law() const { return clock_.schedule; }
  const Clock& clock() const { return clock_; }
  const BasedRotary& rotary() const { return rotary_; }
  const Tensor& position() const { return position_; }  // [B, T]
  const Tensor& padding() const { return padding_; }    // [B, T], undefined: none
  bool fresh() const { return memory_.empty(); }

  // Un-rotated pairs of the groups that may fall due, each with what its compressor reads left of
  // it, [B, Hkv, G, c + overlap, width], in the arithmetic's type, and the block that the first of
  // them begins in (group_block), [B].
  std::tuple<Tensor, Tensor, Tensor> evicted_groups() const {
    const auto type = arithmetic_type(k_.scalar_type());
    const int64_t overlap = law().overlap;
    const int64_t read = law().ratio + overlap;
    const Groups groups = this->groups();
    const Tensor place = count_from(groups.place - overlap, read).flatten(1);
    // What a memory holds has been rotated.
    const Tensor position = fresh() ? place : place.add(seen_.unsqueeze(1)).mul(place.lt(0));
    const auto group = [&](const Tensor& x, StateIndex ring, StateIndex sinks, bool turns) {
      Tensor rows = fresh() ? take_rows(x, place) : stored_rows(x, ring, sinks, place);
      rows = rows.to(type);
      if (turns && !fresh()) rows = rotate(rows, position.neg(), rotary_);
      if (overlap > 0) {  // what is before the stream is zero
        const Tensor token = groups.number.mul(law().ratio).add(law().sinks - overlap);
        const Tensor before = count_from(token, read).flatten(1).lt(0);
        rows = rows.masked_fill(before.unsqueeze(1).unsqueeze(-1), 0.0);
      }
      return rows.reshape_symint({x.sym_size(0), x.sym_size(1), new_groups(), read, x.sym_size(3)});
    };
    return {group(k_, kWindowKeys, kSinkKeys, true),
            group(v_, kWindowValues, kSinkValues, false),
            first_block()};
  }

  // The spans that the new tokens attend to, given the slots made of evicted_groups(); and the token
  // that each of them is, [B, Hkv, G], where slots are tokens.
  Spans spans(const Tensor& slot_keys,
              const Tensor& slot_values,
              const OptionalTensor& slot_positions) const {
    const auto type = k_.scalar_type();
    Spans s;
    const Tensor keys = rotate(k_, position_, rotary_);
    add_sinks(s, keys);
    const Groups groups = this->groups();
    if (slot_positions && clock_.token_distance) {
      s.compressed_keys = rotate_heads(slot_keys, *slot_positions, rotary_).to(type);
      s.slot_positions = *slot_positions;
    } else {
      const Tensor clock = clock_.token_distance ? groups.number.mul(law().ratio)
                                                       .to(at::kDouble)
                                                       .add(law().sinks + (law().ratio - 1) / 2.0)
                                                 : groups.number;
      s.compressed_keys = rotate(slot_keys, clock, rotary_).to(type);
    }
    s.compressed_values = slot_values.to(type);
    s.first_slot = groups.first - slots_behind();
    s.window_keys = keys;
    s.window_values = v_;
    s.first_token = start_.neg() - behind();
    if (fresh()) return s;
    s.past = past();
    if (s.slot_positions.defined() && law().compressed > 0) {
      const Tensor ring = memory_[kSlotPositions].unsqueeze(-1);
      const Tensor tokens = s.past.read(ring, law(), kCompressed, at::kLong);
      s.slot_positions = at::cat({tokens.squeeze(-1), s.slot_positions}, 2);
    }
    // Rings are constants, unless they were made out of something else.
    const bool constant = std::none_of(
        memory_.begin(), memory_.begin() + kSinkKeys, [](auto& x) { return x.requires_grad(); });
    return constant ? s : joined(s, law(), type);
  }

 private:
  // The groups that may fall due, in the order in which their slots lie: where each one's first
  // token stands, its number in its stream, and for every query the number of the first in its
  // stream.
  struct Groups {
    Tensor place;   // [B, G]
    Tensor number;  // [B, G]
    Tensor first;   // [B, T]
  };

  // Tokens of the window ring that are put before the new ones, whether a row has that many or not.
  int64_t behind() const { return fresh() ? 0 : law().max_window(); }

  // Past slots that are put before the new ones.
  int64_t slots_behind() const { return fresh() ? 0 : law().compressed; }

  // The rings as they are, and where the past begins in them. Of the past, only what was in the
  // window of the last token can still be seen; a slot that the next token no longer sees may hold
  // what was taken back since, even a NaN.
  Past past() const {
    const Tensor oldest = groups_of(law(), seen_).sub(law().compressed).clamp_min(0);
    // Autograd keeps them, and cannot keep a tensor that was made in inference mode.
    const auto ring = [&](StateIndex index) {
      const Tensor x = memory_[index].contiguous();
      return x.is_inference() && at::GradMode::is_enabled() ? x.clone() : x;
    };
    return {ring(kWindowKeys),
            ring(kWindowValues),
            ring(kCompressedKeys),
            ring(kCompressedValues),
            at::stack(
                {seen_ - behind(), window_begin_of(law(), begun_), begun_ - slots_behind(), oldest},
                1)};
  }

  // New tokens, and those of the past that can still be compressed or read left of a group, which
  // may be sinks.
  Tensor stored_rows(const Tensor& x,
                     StateIndex ring,
                     StateIndex sinks,
                     const Tensor& place) const {
    const Tensor oldest = window_begin_of(law(), begun_).sub(law().overlap);
    return take_tokens(x, memory_[ring], memory_[sinks], seen_, oldest, place);
  }

  // The most groups that this call can make due.
  SymInt new_groups() const {
    return resets_ ? slot_count(law(), tokens_, behind()) : slot_count(law(), tokens_);
  }

  Groups groups() const {
    const int64_t c = law().ratio;
    const int64_t a = law().sinks;
    if (!resets_ || law().compressed == 0) {
      const Tensor number = count_from(begun_, new_groups());
      return {number.mul(c).add(a).sub(seen_.unsqueeze(1)),
              number,
              begun_.unsqueeze(1).expand_symint(position_.sym_sizes())};
    }
    // A group is c places in a row, whichever stream it is of: its slot lies where its block is.
    const Tensor block = first_block();
    const Tensor places = count_from(block.mul(c), new_groups() * c);  // [B, G c]
    const Tensor padded = at::constant_pad_nd(start_, {0, c}, std::numeric_limits<int64_t>::max());
    const auto start_at = [&](const Tensor& place) {  // past the call's end: no stream's
      const Tensor index = place.clamp_min(0).clamp_max(at::Scalar(tokens_ + (c - 1)));
      return at::where(place.lt(0), seen_.neg().unsqueeze(1), padded.gather(1, index));
    };
    const Tensor start = start_at(places);
    const Tensor token = places - start;
    const Tensor whole = token.ge(a)
                             .logical_and(token.sub(a).remainder(c).eq(0))
                             .logical_and(start_at(places + (c - 1)).eq(start))
                             .logical_and(places.lt(at::Scalar(tokens_)));
    const Tensor offset = whole.unflatten_symint(1, {new_groups(), c}).to(at::kInt).argmax(-1);
    const Tensor place = count_from(block, new_groups()).mul(c) + offset;
    const Tensor number = (place - start_at(place) - a).div(c, "floor").clamp_min(0);
    const Tensor first = block.unsqueeze(1) - (start_ + a).div(c, "floor");
    return {place, number, first};
  }

  // The block (group_block) that the first group of the carried stream begins in, [B].
  Tensor first_block() const {
    return begun_.mul(law().ratio).add(law().sinks).sub(seen_).div(law().ratio, "floor");
  }

  void add_sinks(Spans& s, const Tensor& keys) const {
    const int64_t a = law().sinks;
    if (a == 0 || (resets_ && fresh())) {  // where every stream's sinks are among the new tokens
      s.sink_keys = a == 0 ? keys.slice(2, 0, 0) : keys;
      s.sink_values = a == 0 ? v_.slice(2, 0, 0) : v_;
      s.first_sink = start_.neg();
      return;
    }
    if (!resets_) {
      const Tensor mine = count_from(seen_.neg(), a);  // which new token is sink 0, 1, ...
      const Tensor old = mine.lt(0).unsqueeze(1).unsqueeze(-1);
      s.sink_keys = take_rows(keys, mine);
      s.sink_values = take_rows(v_, mine);
      if (!fresh()) {
        s.sink_keys = at::where(old, memory_[kSinkKeys], s.sink_keys);
        s.sink_values = at::where(old, memory_[kSinkValues], s.sink_values);
      }
      s.first_sink = at::zeros_like(position_);
      return;
    }
    // The carried stream's sinks right before the new tokens, so that they are one span with those
    // of them that are still to come.
    const Tensor stored = seen_.clamp_max(a);
    const Tensor index = count_from(stored - a, a);
    const Tensor held = index.ge(0);
    s.sink_keys = at::cat({read_ring(memory_[kSinkKeys], index, held), keys}, 2);
    s.sink_values = at::cat({read_ring(memory_[kSinkValues], index, held), v_}, 2);
    const Tensor carried = start_.lt(0);
    s.first_sink = at::where(carried, (stored - a).unsqueeze(1), start_.neg() - a);
  }

  std::vector<Tensor> memory_;
  bool resets_ = false;
  Tensor k_;
  Tensor v_;
  Clock clock_;
  BasedRotary rotary_;
  SymInt tokens_;
  Tensor seen_;      // [B]
  Tensor begun_;     // [B]
  Tensor padding_;   // [B, T]
  Tensor start_;     // [B, T]: the place at which the token's stream starts
  Tensor position_;  // [B, T]: the token's number in its stream
};

std::tuple<Tensor, Tensor, Tensor> evicted_groups(const Tensor& k,
                                                  const Tensor& v,
                                                  const OptionalTensor& lengths,
                                                  const OptionalTensor& reset_at,
                                                  OptionalList memory,
                                                  at::IntArrayRef schedule,
                                                  c10::string_view distance,
                                                  int64_t rotary_dim,
                                                  double rotary_base,
                                                  bool rotary_interleaved) {
  const auto precision = own_precision();
  return Sequence(k,
                  v,
                  lengths,
                  reset_at,
                  or_empty(memory),
                  schedule,
                  distance,
                  rotary_dim,
                  rotary_base,
                  rotary_interleaved,
                  "ctx.evicted_groups")
      .evicted_groups();
}

std::tuple<Tensor, Tensor> attend_sequence(const Tensor& q,
                                           const Tensor& k,
                                           const Tensor& v,
                                           const OptionalTensor& lengths,
                                           const OptionalTensor& reset_at,
                                           OptionalList memory,
                                           const Tensor& slot_keys,
                                           const Tensor& slot_values,
                                           const OptionalTensor& slot_positions,
                                           const OptionalTensor& bias,
                                           const OptionalTensor& slopes,
                                           OptionalList relative,
                                           at::IntArrayRef schedule,
                                           c10::string_view distance,
                                           int64_t rotary_dim,
                                           double rotary_base,
                                           bool rotary_interleaved,
                                           double scale,
                                           bool with_region_weights) {
  constexpr const char* where = "ctx.attend_sequence";
  const auto precision = own_precision();
  const Sequence sequence(k,
                          v,
                          lengths,
                          reset_at,
                          or_empty(memory),
                          schedule,
                          distance,
                          rotary_dim,
                          rotary_base,
                          rotary_interleaved,
                          where);
  CTX_CHECK_VALUE(q.dim() == 4 && q.sym_size(0) == k.sym_size(0) &&
                      q.sym_size(2) == k.sym_size(2) && q.sym_size(3) == k.sym_size(3),
                  where,
                  "q must be [B, H, T, D] with k's B, T, D, got ",
                  q.sym_sizes(),
                  " for k ",
                  k.sym_sizes());
  check_score_operands(q, {bias, slopes, or_empty(relative)}, where);
  if (q.sym_size(2) == 0) {
    return {q.new_zeros_symint({q.sym_size(0), q.sym_size(1), 0, v.sym_size(3)}),
            new_region_weights(q, with_region_weights)};
  }
  const Tensor& padding = sequence.padding();
  const Tensor cut = padding.defined() ? padding.unsqueeze(1).unsqueeze(-1) : padding;
  auto [out, region_weights] = attend(cut.defined() ? q.masked_fill(cut, 0.0) : q,
                                      sequence.position(),
                                      sequence.spans(slot_keys, slot_values, slot_positions),
                                      {bias, slopes, or_empty(relative)},
                                      sequence.clock(),
                                      sequence.rotary(),
                                      scale,
                                      with_region_weights);
  if (!cut.defined()) return {out, region_weights};
  return {out.masked_fill(cut, 0.0),
          with_region_weights ? region_weights.masked_fill(cut, 0.0) : region_weights};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def(
      "evicted_groups(Tensor k, Tensor v, Tensor? lengths, Tensor? reset_at, Tensor[]? memory, "
      "int[] "
      "schedule, str distance, int rotary_dim, float rotary_base, bool rotary_interleaved) -> "
      "(Tensor keys, Tensor values, Tensor block)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "attend_sequence(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? reset_at, Tensor[]? "
      "memory, Tensor slot_keys, Tensor slot_values, Tensor? slot_positions, Tensor? bias, Tensor? "
      "slopes, Tensor[]? relative, int[] schedule, str distance, int rotary_dim, float "
      "rotary_base, "
      "bool rotary_interleaved, float scale, bool with_region_weights) -> (Tensor out, Tensor "
      "region_weights)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CompositeImplicitAutograd, m) {
  m.impl("evicted_groups", evicted_groups);
  m.impl("attend_sequence", attend_sequence);
}

}  // namespace ctx::ops
