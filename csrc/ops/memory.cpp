// ctx::step_, ctx::append_, ctx::attend_memory, ctx::choose_: the memory at inference. They write
// into the tensors of a memory, or read them, and hand spans to the device's kernels; nothing is
// concatenated, no size depends on what was seen, and no value of a device is waited for.
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <cstring>

#include "core/check.h"
#include "ops/attend.h"
#include "ops/layout.h"
#include "ops/registry.h"
#include "ops/rings.h"
#include "ops/settings.h"
#include "ops/state.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Result = std::tuple<Tensor, Tensor>;  // output, and the weight that each region got

// The tensors and settings that all operators take, in the order of their schemas.
struct Memory {
  State state;
  MemoryView view;
  int64_t headroom;

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
    headroom = check_state(state, view.clock.schedule, where).expect_int();
    check_seen(state[kSeen], where);
    const Tensor& keys = state[kWindowKeys];
    view.rotary = parse_rotary(rotary_dim, rotary_base, rotary_interleaved, keys.size(3), where);
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
    view.usage = state[kUsage].data_ptr();
    view.slot_positions = state[kSlotPositions].data_ptr<int64_t>();
  }

  const Kernels& kernels() const { return kernels_for(state[kWindowKeys].device().type()); }
};

// Where the tokens of one call stand in their rows' streams. A row may begin a new stream inside
// the call, so its first token's position is kept apart from `seen`, which changes last.
class Rows {
 public:
  Rows(const Memory& memory,
       int64_t tokens,
       const OptionalTensor& lengths,
       const OptionalTensor& reset_at)
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

  // Runs over the call in blocks that the rings have headroom for, and in which no row begins anew
  // but at the first token; nor a segment, where what leaves then depends on the queries so far.
  template <typename F>
  void for_each_block(const F& run) {
    for (int64_t begin = 0, end; begin < tokens_; begin = end) {
      end = next_reset(begin);
      if (reset_at_.defined()) begin_anew(begin);
      for (int64_t offset = begin, tokens; offset < end; offset += tokens) {
        tokens = std::min(memory_.headroom, end - offset);
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
    Tensor seen = memory_.state[kSeen];
    Tensor rewindable = memory_.state[kRewindable];
    if (reset_at_.defined()) seen.copy_(origin_), rewindable.copy_(spare_);
    if (lengths_.defined()) {
      seen.add_(lengths_);
      rewindable.add_(lengths_);
    } else {
      seen.add_(tokens_);
      rewindable.add_(tokens_);
    }
    rewindable.clamp_max_(memory_.headroom);
  }

 private:
  // The first column after `begin` in which a row begins anew. What a device holds is not known
  // here, so each of its tokens may be one.
  int64_t next_reset(int64_t begin) const {
    if (!reset_at_.defined()) return tokens_;
    if (!reset_at_.is_cpu()) return begin + 1;
    const Tensor any = reset_at_.narrow(1, begin + 1, tokens_ - begin - 1).any(0);
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
    const Tensor anew = reset_at_.select(1, column);
    origin_.masked_fill_(anew, -column);
    spare_.masked_fill_(anew, -column);
  }

  const Memory& memory_;
  int64_t tokens_;
  Tensor lengths_;
  Tensor reset_at_;  // undefined: no row begins anew
  Tensor origin_;    // position of the call's first token, [B]
  Tensor spare_;     // what `rewindable` was before the call, or would have been
};

// The pairs of one call, kept alive and laid out for the kernels.
class Writer {
 public:
  Writer(const Memory& memory,
         const Tensor& k,
         const Tensor& v,
         at::TensorList parameters,
         c10::string_view compressor,
         at::TensorList slots,
         bool resets,
         const char* where)
      : memory_(memory), k_(rows(k)), v_(rows(v)) {
    const MemoryView& view = memory.view;
    compress_.kind = parse_compressor({compressor.data(), compressor.size()}, where);
    check_parameters(compress_.kind,
                     parameters,
                     view.kv_heads,
                     view.clock.schedule.ratio,
                     view.clock.schedule.overlap,
                     view.head_dim,
                     view.value_dim,
                     k.device(),
                     where);
    const bool by_usage = compress_.kind == CompressorKind::kMostUsed;
    CTX_CHECK_VALUE(by_usage == counts_usage(memory.state),
                    where,
                    "usage must ",
                    by_usage ? "have" : "not have",
                    " entries for this compressor, got ",
                    memory.state[kUsage].sizes());
    if (compress_.kind == CompressorKind::kGiven || !slots.empty())
      take_slots(slots, resets, where);
    append_.memory = compress_.memory = view;
    append_.keys = strided(k_);
    append_.values = strided(v_);
    // Parameters may be stored as the memory is, or as the arithmetic is; anything else is
    // converted to the latter.
    const auto storage = memory.state[kWindowKeys].scalar_type();
    bool same = true;
    for (const Tensor& parameter : parameters) same = same && parameter.scalar_type() == storage;
    compress_.wide_parameters = !same;
    const auto type = same ? storage : arithmetic_type(storage);
    for (size_t i = 0; i < parameters.size(); ++i) {
      parameters_.push_back(parameters[i].to(type).contiguous());
      compress_.parameters[i] = parameters_.back().const_data_ptr();
    }
  }

  // Reports which tokens became the slots of `chosen` and `positions`, [B, Hkv, slots], of which
  // the first is that of block[b] (group_block).
  void report(const Tensor& chosen,
              const Tensor& positions,
              const Tensor& block,
              bool resets,
              const char* where) {
    check_count(chosen.size(2), resets, where);
    CTX_CHECK_VALUE(
        block.sizes() == at::IntArrayRef{memory_.view.batch} && block.device() == k_.device(),
        where,
        "block must be [B] = [",
        memory_.view.batch,
        "] on ",
        k_.device(),
        ", got ",
        block.sizes(),
        " on ",
        block.device());
    CTX_CHECK_TYPE(
        block.scalar_type() == at::kLong, where, "block must be int64, got ", block.scalar_type());
    slots_ = {block.contiguous()};
    compress_.slots = chosen.size(2);
    compress_.slot_block = slots_[0].const_data_ptr<int64_t>();
    compress_.chosen = chosen.data_ptr<int64_t>();
    compress_.chosen_positions = positions.data_ptr<int64_t>();
  }

  void write(const Block& block) {
    append_.block = compress_.block = block;
    memory_.kernels().append(append_);
    memory_.kernels().compress(compress_);
  }

 private:
  // The two numbers of slots that a call of so many tokens may lay out: where rows begin anew, one
  // that began without a memory lays out fewer.
  std::pair<int64_t, int64_t> slot_counts(bool resets) const {
    const Schedule& schedule = memory_.view.clock.schedule;
    const int64_t tokens = k_.size(2);
    if (!resets || tokens == 0) {
      const int64_t count = slot_count(schedule, tokens).expect_int();
      return {count, count};
    }
    return {slot_count(schedule, tokens, 0).expect_int(),
            slot_count(schedule, tokens, schedule.max_window()).expect_int()};
  }

  void check_count(int64_t slots, bool resets, const char* where) const {
    const auto [fewest, most] = slot_counts(resets);
    CTX_CHECK_VALUE(slots == fewest || slots == most,
                    where,
                    "slots must be ",
                    most,
                    " for a call of ",
                    k_.size(2),
                    " tokens, got ",
                    slots);
  }

  // Slots of a compressor that is not written here: keys, values, and the block of the first.
  void take_slots(at::TensorList slots, bool resets, const char* where) {
    CTX_CHECK_VALUE(slots.size() == 3 && compress_.kind == CompressorKind::kGiven,
                    where,
                    "slots must be keys, values and block for the compressor \"custom\", and none "
                    "for any other, got ",
                    slots.size());
    const MemoryView& view = memory_.view;
    const auto [fewest, most] = slot_counts(resets);
    const int64_t given = slots[0].dim() == 4 ? slots[0].size(2) : -1;
    const int64_t count = given == fewest ? fewest : most;
    const auto check = [&](const Tensor& x, const char* name, std::vector<int64_t> sizes) {
      CTX_CHECK_VALUE(x.sizes() == at::IntArrayRef(sizes) && x.device() == k_.device(),
                      where,
                      name,
                      " must be ",
                      at::IntArrayRef(sizes),
                      " on ",
                      k_.device(),
                      ", got ",
                      x.sizes(),
                      " on ",
                      x.device());
    };
    check(slots[0], "slot keys", {view.batch, view.kv_heads, count, view.head_dim});
    check(slots[1], "slot values", {view.batch, view.kv_heads, count, view.value_dim});
    check(slots[2], "slot block", {view.batch});
    CTX_CHECK_TYPE(slots[2].scalar_type() == at::kLong,
                   where,
                   "slot block must be int64, got ",
                   slots[2].scalar_type());
    const auto type = arithmetic_type(memory_.state[kWindowKeys].scalar_type());
    slots_ = {rows(slots[0].to(type)), rows(slots[1].to(type)), slots[2].contiguous()};
    compress_.slots = count;
    compress_.slot_keys = strided(slots_[0]);
    compress_.slot_values = strided(slots_[1]);
    compress_.slot_block = slots_[2].const_data_ptr<int64_t>();
  }

  const Memory& memory_;
  std::vector<Tensor> slots_;
  Tensor k_;
  Tensor v_;
  std::vector<Tensor> parameters_;
  AppendArgs append_;
  CompressArgs compress_;
};

class Reader {
 public:
  // `counts`: queries add to the usage of what they attend to, where the memory counts it.
  Reader(const Memory& memory,
         const Tensor& q,
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

  Result result() const { return {out_, mass_}; }

 private:
  const void* per_head(const Tensor& values, Tensor& kept) const {
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
    const Tensor first = from(block.origin).add(block.offset);
    const Tensor place = at::arange(block.tokens, integers).unsqueeze(0);
    Tensor position = first.unsqueeze(1) + place;
    Tensor last = first + (block.tokens - 1);
    if (block.lengths != nullptr) {
      const Tensor count = from(block.lengths).sub(block.offset).clamp(0, block.tokens);
      position = position.masked_fill(place.ge(count.unsqueeze(1)), -1);
      last = first + count - 1;
    }
    const Tensor begun = groups_of(s, first);
    const Tensor tokens = count_from(edge_of(s, begun), s.max_window() + block.tokens);
    const Tensor written = tokens.le(last.unsqueeze(1)).logical_and(last.unsqueeze(1).ge(0));
    const Tensor groups =
        count_from(begun - s.compressed, s.compressed + s.max_new_groups(block.tokens));
    const Tensor made = groups.ge(0).logical_and(groups.lt(groups_of(s, last).unsqueeze(1)));
    Spans spans;
    const Tensor sinks =
        at::arange(s.sinks, integers).unsqueeze(0).expand({memory_.view.batch, -1});
    const Tensor begins = sinks.le(last.unsqueeze(1));
    const bool some = s.sinks > 0;
    spans.sink_keys = some ? read_ring(state[kSinkKeys], sinks, begins) : state[kSinkKeys];
    spans.sink_values = some ? read_ring(state[kSinkValues], sinks, begins) : state[kSinkValues];
    spans.window_keys = read_ring(state[kWindowKeys], tokens, written);
    spans.window_values = read_ring(state[kWindowValues], tokens, written);
    const bool slots = s.compressed > 0;
    const auto read_slots = [&](const Tensor& ring) {
      return slots_as(slots ? read_ring(ring, groups, made) : ring, q_.scalar_type());
    };
    spans.compressed_keys = read_slots(state[kCompressedKeys]);
    spans.compressed_values = read_slots(state[kCompressedValues]);
    if (memory_.view.slot_positions != nullptr && clock.token_distance) {
      const Tensor ring = state[kSlotPositions].unsqueeze(-1);
      spans.slot_positions =
          slots ? read_ring(ring, groups, made).squeeze(-1) : state[kSlotPositions];
    }
    const auto each = [&](const Tensor& x) { return x.unsqueeze(1).expand_as(position); };
    spans.first_sink = at::zeros_like(position);
    spans.first_slot = each(begun - s.compressed);
    spans.first_token = each(edge_of(s, begun));
    const auto narrow = [&](const Tensor& x) { return x.narrow(2, block.offset, block.tokens); };
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
    const Tensor absent = position.lt(0).unsqueeze(1).unsqueeze(-1);
    narrow(out_).copy_(got.out.masked_fill(absent, 0.0));
    if (with_mass) narrow(mass_).copy_(got.mass.masked_fill(absent, 0.0));
    if (!args_.count_usage) return;
    const Tensor index = tokens.remainder(memory_.view.window_capacity).unsqueeze(1);
    Tensor usage = state[kUsage];
    usage.scatter_add_(2,
                       index.expand_as(got.usage),
                       got.usage.masked_fill(written.logical_not().unsqueeze(1), 0.0));
  }

  const Memory& memory_;
  ScoreOperands operands_;
  Tensor q_;
  Tensor bias_;
  Tensor slopes_;
  Tensor out_;
  Tensor mass_;
  AttendArgs args_;
};

#define CTX_STATE_PARAMETERS                                                               \
  const Tensor &window_keys, const Tensor &window_values, const Tensor &compressed_keys,   \
      const Tensor &compressed_values, const Tensor &sink_keys, const Tensor &sink_values, \
      const Tensor &seen, const Tensor &rewindable, const Tensor &usage,                   \
      const Tensor &slot_positions
#define CTX_STATE     \
  {window_keys,       \
   window_values,     \
   compressed_keys,   \
   compressed_values, \
   sink_keys,         \
   sink_values,       \
   seen,              \
   rewindable,        \
   usage,             \
   slot_positions}
// What scores are made of besides queries and keys.
#define CTX_ATTEND_PARAMETERS \
  const OptionalTensor &bias, const OptionalTensor &slopes, at::TensorList relative
#define CTX_UNUSED_ATTEND \
  const OptionalTensor& /*bias*/, const OptionalTensor& /*slopes*/, at::TensorList /*relative*/
#define CTX_SETTINGS_PARAMETERS                                                                \
  at::IntArrayRef schedule, c10::string_view distance, int64_t rotary_dim, double rotary_base, \
      bool rotary_interleaved
#define CTX_SETTINGS schedule, distance, rotary_dim, rotary_base, rotary_interleaved

// A block is written before its first query attends.
void walk(Rows& calls, Writer& writer, Reader& reader) {
  calls.for_each_block([&](const Block& block) {
    writer.write(block);
    reader.attend(block);
  });
  calls.finish();
}

Result step(const Tensor& q,
            const Tensor& k,
            const Tensor& v,
            const OptionalTensor& lengths,
            const OptionalTensor& reset_at,
            CTX_STATE_PARAMETERS,
            at::TensorList parameters,
            c10::string_view compressor,
            at::TensorList slots,
            CTX_ATTEND_PARAMETERS,
            CTX_SETTINGS_PARAMETERS,
            double scale,
            bool with_mass) {
  constexpr const char* where = "ctx.step_";
  const Memory memory(CTX_STATE, CTX_SETTINGS, where);
  check_pairs(memory.state, k, v, where);
  const ScoreOperands operands{bias, slopes, relative};
  check_queries(memory.state, q, k.size(2), operands, where);
  check_rows(k, lengths, reset_at, where);
  check_lengths(lengths, k.size(2), where);
  Writer writer(memory, k, v, parameters, compressor, slots, reset_at.has_value(), where);
  Reader reader(memory, q, operands, scale, with_mass, /*counts=*/true);
  Rows calls(memory, k.size(2), lengths, reset_at);
  walk(calls, writer, reader);
  return reader.result();
}

using Chosen = std::tuple<Tensor, Tensor>;

// As step with the compressor "most_used", but what it tells is which tokens became slots: as the
// place of the token among those of due_groups, [B, Hkv, slots], and as its number in its stream.
// Those that are not due are some token.
Chosen choose(const Tensor& q,
              const Tensor& k,
              const Tensor& v,
              const OptionalTensor& lengths,
              const OptionalTensor& reset_at,
              CTX_STATE_PARAMETERS,
              CTX_ATTEND_PARAMETERS,
              CTX_SETTINGS_PARAMETERS,
              double scale,
              const Tensor& block,
              c10::SymInt slots) {
  constexpr const char* where = "ctx.choose_";
  const Memory memory(CTX_STATE, CTX_SETTINGS, where);
  check_pairs(memory.state, k, v, where);
  const ScoreOperands operands{bias, slopes, relative};
  check_queries(memory.state, q, k.size(2), operands, where);
  check_rows(k, lengths, reset_at, where);
  check_lengths(lengths, k.size(2), where);
  CTX_CHECK_VALUE(slots >= 0, where, "slots must be at least 0, got ", slots);
  Writer writer(memory, k, v, {}, "most_used", {}, reset_at.has_value(), where);
  Reader reader(memory, q, operands, scale, /*with_mass=*/false, /*counts=*/true);
  const int64_t ratio = memory.view.clock.schedule.ratio;
  const Tensor chosen = at::arange(slots.expect_int(), seen.options())
                            .mul(ratio)
                            .expand({k.size(0), k.size(1), -1})
                            .contiguous();
  const Tensor positions = at::zeros_like(chosen);
  writer.report(chosen, positions, block, reset_at.has_value(), where);
  Rows calls(memory, k.size(2), lengths, reset_at);
  walk(calls, writer, reader);
  return {chosen, positions};
}

void append(const Tensor& k,
            const Tensor& v,
            const OptionalTensor& lengths,
            const OptionalTensor& reset_at,
            CTX_STATE_PARAMETERS,
            at::TensorList parameters,
            c10::string_view compressor,
            at::TensorList slots,
            CTX_SETTINGS_PARAMETERS) {
  constexpr const char* where = "ctx.append_";
  CTX_CHECK_VALUE(compressor != "most_used",
                  where,
                  "compressor must be one that needs no queries, got \"most_used\": use ctx.step_");
  const Memory memory(CTX_STATE, CTX_SETTINGS, where);
  check_pairs(memory.state, k, v, where);
  check_rows(k, lengths, reset_at, where);
  check_lengths(lengths, k.size(2), where);
  Writer writer(memory, k, v, parameters, compressor, slots, reset_at.has_value(), where);
  Rows calls(memory, k.size(2), lengths, reset_at);
  calls.for_each_block([&](const Block& block) { writer.write(block); });
  calls.finish();
}

// The queries of the last tokens, once `seen` counts these: a block that began as many tokens ago.
Result attend_memory(const Tensor& q,
                     CTX_STATE_PARAMETERS,
                     CTX_ATTEND_PARAMETERS,
                     CTX_SETTINGS_PARAMETERS,
                     double scale,
                     bool with_mass) {
  constexpr const char* where = "ctx.attend_memory";
  const Memory memory(CTX_STATE, CTX_SETTINGS, where);
  const ScoreOperands operands{bias, slopes, relative};
  check_queries(memory.state, q, -1, operands, where);
  const int64_t tokens = q.size(2);
  CTX_CHECK_VALUE(tokens <= memory.headroom,
                  where,
                  "q must have at most headroom = ",
                  memory.headroom,
                  " tokens, got ",
                  tokens);
  Reader reader(memory, q, operands, scale, with_mass, /*counts=*/false);
  const Tensor first = memory.state[kSeen].sub(tokens);
  if (tokens > 0) reader.attend({first.const_data_ptr<int64_t>(), nullptr, 0, tokens});
  return reader.result();
}

Result attended(const Tensor& q, const Tensor& window_values, bool with_mass) {
  auto sizes = q.sym_sizes().vec();
  sizes[3] = window_values.sym_size(3);
  return {q.new_empty_symint(sizes), new_mass(q, with_mass)};
}

#define CTX_UNUSED_STATE                                                                     \
  const Tensor & /*window_keys*/, [[maybe_unused]] const Tensor &window_values,              \
      const Tensor & /*compressed_keys*/, const Tensor & /*compressed_values*/,              \
      const Tensor & /*sink_keys*/, const Tensor & /*sink_values*/, const Tensor & /*seen*/, \
      const Tensor & /*rewindable*/, const Tensor & /*usage*/, const Tensor & /*slot_positions*/
#define CTX_UNUSED_SETTINGS                                                            \
  at::IntArrayRef /*schedule*/, c10::string_view /*distance*/, int64_t /*rotary_dim*/, \
      double /*rotary_base*/, bool /*rotary_interleaved*/

Result step_meta(const Tensor& q,
                 const Tensor& /*k*/,
                 const Tensor& /*v*/,
                 const OptionalTensor& /*lengths*/,
                 const OptionalTensor& /*reset_at*/,
                 CTX_UNUSED_STATE,
                 at::TensorList /*parameters*/,
                 c10::string_view /*compressor*/,
                 at::TensorList /*slots*/,
                 CTX_UNUSED_ATTEND,
                 CTX_UNUSED_SETTINGS,
                 double /*scale*/,
                 bool with_mass) {
  return attended(q, window_values, with_mass);
}

Chosen choose_meta(const Tensor& /*q*/,
                   const Tensor& k,
                   const Tensor& /*v*/,
                   const OptionalTensor& /*lengths*/,
                   const OptionalTensor& /*reset_at*/,
                   CTX_UNUSED_STATE,
                   CTX_UNUSED_ATTEND,
                   CTX_UNUSED_SETTINGS,
                   double /*scale*/,
                   const Tensor& block,
                   c10::SymInt slots) {
  const auto empty = [&] { return block.new_empty_symint({k.sym_size(0), k.sym_size(1), slots}); };
  return {empty(), empty()};
}

void append_meta(const Tensor& /*k*/,
                 const Tensor& /*v*/,
                 const OptionalTensor& /*lengths*/,
                 const OptionalTensor& /*reset_at*/,
                 CTX_UNUSED_STATE,
                 at::TensorList /*parameters*/,
                 c10::string_view /*compressor*/,
                 at::TensorList /*slots*/,
                 CTX_UNUSED_SETTINGS) {}

Result attend_memory_meta(const Tensor& q,
                          CTX_UNUSED_STATE,
                          CTX_UNUSED_ATTEND,
                          CTX_UNUSED_SETTINGS,
                          double /*scale*/,
                          bool with_mass) {
  return attended(q, window_values, with_mass);
}

}  // namespace

#define CTX_MUTABLE_STATE                                                                         \
  "Tensor(a!) window_keys, Tensor(b!) window_values, Tensor(c!) compressed_keys, Tensor(d!) "     \
  "compressed_values, Tensor(e!) sink_keys, Tensor(f!) sink_values, Tensor(g!) seen, Tensor(h!) " \
  "rewindable, Tensor(i!) usage, Tensor(j!) slot_positions, "
#define CTX_ATTEND_SCHEMA "Tensor? bias, Tensor? slopes, Tensor[] relative, "
#define CTX_SETTINGS_SCHEMA \
  "int[] schedule, str distance, int rotary_dim, float rotary_base, bool rotary_interleaved"

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def(
      "step_(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? reset_at, " CTX_MUTABLE_STATE
      "Tensor[] parameters, str compressor, Tensor[] slots, " CTX_ATTEND_SCHEMA CTX_SETTINGS_SCHEMA
      ", float scale, bool with_mass) -> (Tensor out, Tensor mass)",
      {at::Tag::pt2_compliant_tag});
  m.def("append_(Tensor k, Tensor v, Tensor? lengths, Tensor? reset_at, " CTX_MUTABLE_STATE
        "Tensor[] parameters, str compressor, Tensor[] slots, " CTX_SETTINGS_SCHEMA ") -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "choose_(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? reset_at, " CTX_MUTABLE_STATE
          CTX_ATTEND_SCHEMA CTX_SETTINGS_SCHEMA
      ", float scale, Tensor block, SymInt slots) -> (Tensor chosen, Tensor positions)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "attend_memory(Tensor q, Tensor window_keys, Tensor window_values, Tensor compressed_keys, "
      "Tensor compressed_values, Tensor sink_keys, Tensor sink_values, Tensor seen, Tensor "
      "rewindable, Tensor usage, Tensor slot_positions, " CTX_ATTEND_SCHEMA CTX_SETTINGS_SCHEMA
      ", float scale, bool with_mass) -> (Tensor out, Tensor mass)",
      {at::Tag::pt2_compliant_tag});
}

// The kernels' table knows the device; the walk is the same on each.
#define CTX_REGISTER_MEMORY(key)            \
  TORCH_LIBRARY_IMPL(ctx, key, m) {         \
    m.impl("step_", step);                  \
    m.impl("append_", append);              \
    m.impl("choose_", choose);              \
    m.impl("attend_memory", attend_memory); \
  }
CTX_REGISTER_MEMORY(CPU)
CTX_REGISTER_MEMORY(CUDA)

TORCH_LIBRARY_IMPL(ctx, Meta, m) {
  m.impl("step_", step_meta);
  m.impl("append_", append_meta);
  m.impl("choose_", choose_meta);
  m.impl("attend_memory", attend_memory_meta);
}

// Mutation and differentiation never meet in one operator: these record nothing, by contract.
TORCH_LIBRARY_IMPL(ctx, Autograd, m) {
  m.impl("step_", torch::CppFunction::makeFallthrough());
  m.impl("append_", torch::CppFunction::makeFallthrough());
  m.impl("choose_", torch::CppFunction::makeFallthrough());
  m.impl("attend_memory", torch::CppFunction::makeFallthrough());
}

}  // namespace ctx::ops
