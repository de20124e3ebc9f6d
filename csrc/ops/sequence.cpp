// ctx::due_groups, ctx::attend_sequence: a call of T tokens as a differentiable function of the
// tokens and of a memory that stays as it is. What the rings hold is gathered in order and the new
// tokens are put behind it; sizes depend on T and on the schedule alone, so that a compiled graph
// serves every position of the stream.
#include <torch/library.h>

#include <vector>

#include "core/check.h"
#include "ops/attend.h"
#include "ops/memory.h"
#include "ops/rotary.h"
#include "ops/settings.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using c10::SymInt;

// The entries of a ring [B, Hkv, capacity, width] at absolute positions [B, n], in order.
Tensor read_ring(const Tensor& ring, const Tensor& positions) {
  const Tensor index = positions.remainder(ring.size(2)).unsqueeze(1).unsqueeze(-1);
  return ring.gather(
      2,
      index.expand_symint(
          {ring.sym_size(0), ring.sym_size(1), positions.sym_size(1), ring.sym_size(3)}));
}

// Rows `index` [B, n] of x [B, Hkv, m, width]; an index outside reads some row that the law hides.
Tensor take_rows(const Tensor& x, const Tensor& index) {
  const Tensor inside = index.clamp(0, x.sym_size(2) - 1).unsqueeze(1).unsqueeze(-1);
  return x.gather(
      2, inside.expand_symint({x.sym_size(0), x.sym_size(1), index.sym_size(1), x.sym_size(3)}));
}

Tensor count_from(const Tensor& first, const SymInt& n) {
  return first.unsqueeze(-1) + at::arange(at::Scalar(n), first.options());
}

// The new tokens of a call and what a memory holds of the rows' past.
class Sequence {
 public:
  Sequence(const Tensor& k,
           const Tensor& v,
           at::TensorList memory,
           at::IntArrayRef schedule,
           c10::string_view distance,
           int64_t rotary_dim,
           double rotary_base,
           bool rotary_interleaved,
           const char* where)
      : memory_(memory.vec()), k_(k), v_(v) {
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
    rotary_ = parse_rotary(rotary_dim, rotary_base, rotary_interleaved, k.size(3), where);
    if (!memory_.empty()) {
      check_state(memory_, clock_.schedule, where);
      check_pairs(memory_, k, v, std::nullopt, where);
    }
    seen_ = fresh() ? at::zeros_symint({k.sym_size(0)}, k.options().dtype(at::kLong)) : memory_[6];
    first_token_ = seen_ - behind();
    begun_ =
        groups_of(law(), seen_ - 1).mul(seen_.gt(0));  // groups made before this call: n(seen - 1)
  }

  const Schedule& law() const { return clock_.schedule; }
  const Clock& clock() const { return clock_; }
  const Rotary& rotary() const { return rotary_; }
  const Tensor& seen() const { return seen_; }
  bool fresh() const { return memory_.empty(); }

  // Tokens of the window ring that are put before the new ones, whether a row has that many or not.
  int64_t behind() const { return fresh() ? 0 : law().max_window(); }

  // Past slots that are put before the new ones.
  int64_t slots_behind() const { return fresh() ? 0 : law().compressed; }

  // The most groups that this call can make due.
  SymInt new_groups() const {
    if (law().compressed == 0) return 0;
    const SymInt boundaries = (k_.sym_size(2) + (law().segment - 1)) / law().segment;
    return (boundaries * law().segment + (law().ratio - 1)) / law().ratio;
  }

  Tensor group_indices() const { return count_from(begun_, new_groups()); }  // [B, G]

  // Un-rotated pairs of the groups that may fall due, [B, Hkv, G, c, width], in the arithmetic's
  // type.
  std::tuple<Tensor, Tensor> due_groups() const {
    const auto type = arithmetic_type(k_.scalar_type());
    Tensor keys = k_.to(type);
    Tensor values = v_.to(type);
    if (!fresh()) {
      const Tensor positions = count_from(first_token_, behind());
      keys = at::cat(
          {rotate(read_ring(memory_[0], positions).to(type), positions.neg(), rotary_), keys}, 2);
      values = at::cat({read_ring(memory_[1], positions).to(type), values}, 2);
    }
    const Tensor first =
        group_indices().mul(law().ratio).add(law().sinks).sub(first_token_.unsqueeze(-1));
    const Tensor index = count_from(first, law().ratio).flatten(1);  // [B, G c]
    const auto group = [&](const Tensor& x) {
      return take_rows(x, index).reshape_symint(
          {x.sym_size(0), x.sym_size(1), new_groups(), law().ratio, x.sym_size(3)});
    };
    return {group(keys), group(values)};
  }

  // The spans that the new tokens attend to, given the slots made of due_groups().
  Spans spans(const Tensor& slot_keys, const Tensor& slot_values) const {
    const auto type = k_.scalar_type();
    Spans s;
    const Tensor keys = rotate(k_, count_from(seen_, k_.sym_size(2)), rotary_);
    const Tensor sink = count_from(
        seen_.neg(), law().sinks);  // which new token is sink 0, 1, ...; negative: a past one
    s.sink_keys = sinks(keys, sink, 4);
    s.sink_values = sinks(v_, sink, 5);
    s.first_token = first_token_;
    s.first_slot = begun_ - slots_behind();
    const Tensor positions = clock_.token_distance ? group_indices()
                                                         .mul(law().ratio)
                                                         .to(at::kDouble)
                                                         .add(law().sinks + (law().ratio - 1) / 2.0)
                                                   : group_indices();
    s.compressed_keys = rotate(slot_keys, positions, rotary_).to(type);
    s.compressed_values = slot_values.to(type);
    s.window_keys = keys;
    s.window_values = v_;
    if (fresh()) return s;
    const Tensor past = count_from(first_token_, behind());
    s.window_keys = at::cat({read_ring(memory_[0], past), keys}, 2);
    s.window_values = at::cat({read_ring(memory_[1], past), v_}, 2);
    if (law().compressed == 0) return s;
    const Tensor slots = count_from(s.first_slot, slots_behind());
    s.compressed_keys = at::cat({read_ring(memory_[2], slots), s.compressed_keys}, 2);
    s.compressed_values = at::cat({read_ring(memory_[3], slots), s.compressed_values}, 2);
    return s;
  }

 private:
  Tensor sinks(const Tensor& fresh_rows, const Tensor& index, int stored) const {
    if (law().sinks == 0) return fresh_rows.slice(2, 0, 0);
    const Tensor mine = take_rows(fresh_rows, index);
    return fresh() ? mine
                   : at::where(index.ge(0).unsqueeze(1).unsqueeze(-1), mine, memory_[stored]);
  }

  std::vector<Tensor> memory_;
  Tensor k_;
  Tensor v_;
  Clock clock_;
  Rotary rotary_;
  Tensor seen_;
  Tensor first_token_;
  Tensor begun_;
};

std::tuple<Tensor, Tensor> due_groups(const Tensor& k,
                                      const Tensor& v,
                                      at::TensorList memory,
                                      at::IntArrayRef schedule,
                                      c10::string_view distance,
                                      int64_t rotary_dim,
                                      double rotary_base,
                                      bool rotary_interleaved) {
  return Sequence(k,
                  v,
                  memory,
                  schedule,
                  distance,
                  rotary_dim,
                  rotary_base,
                  rotary_interleaved,
                  "ctx.due_groups")
      .due_groups();
}

Tensor attend_sequence(const Tensor& q,
                       const Tensor& k,
                       const Tensor& v,
                       at::TensorList memory,
                       const Tensor& slot_keys,
                       const Tensor& slot_values,
                       const std::optional<Tensor>& bias,
                       at::IntArrayRef schedule,
                       c10::string_view distance,
                       int64_t rotary_dim,
                       double rotary_base,
                       bool rotary_interleaved,
                       double scale) {
  constexpr const char* where = "ctx.attend_sequence";
  const Sequence sequence(
      k, v, memory, schedule, distance, rotary_dim, rotary_base, rotary_interleaved, where);
  CTX_CHECK_VALUE(q.dim() == 4 && q.sym_size(0) == k.sym_size(0) &&
                      q.sym_size(2) == k.sym_size(2) && q.sym_size(3) == k.sym_size(3),
                  where,
                  "q must be [B, H, T, D] with k's B, T, D, got ",
                  q.sym_sizes(),
                  " for k ",
                  k.sym_sizes());
  if (q.sym_size(2) == 0)
    return q.new_zeros_symint({q.sym_size(0), q.sym_size(1), 0, v.sym_size(3)});
  return attend(q,
                sequence.seen(),
                sequence.spans(slot_keys, slot_values),
                bias,
                sequence.clock(),
                sequence.rotary(),
                scale);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def(
      "due_groups(Tensor k, Tensor v, Tensor[] memory, int[] schedule, str distance, int "
      "rotary_dim, float "
      "rotary_base, bool rotary_interleaved) -> (Tensor keys, Tensor values)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "attend_sequence(Tensor q, Tensor k, Tensor v, Tensor[] memory, Tensor slot_keys, Tensor "
      "slot_values, Tensor? "
      "bias, int[] schedule, str distance, int rotary_dim, float rotary_base, bool "
      "rotary_interleaved, float scale) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CompositeImplicitAutograd, m) {
  m.impl("due_groups", due_groups);
  m.impl("attend_sequence", attend_sequence);
}

}  // namespace ctx::ops
