// ctx::step_, ctx::append_, ctx::attend_memory, ctx::choose_: the memory at inference. They write
// into the tensors of a memory, or read them, and hand spans to the device's kernels; nothing is
// concatenated, no size depends on what was seen, and no value of a device is waited for.
#include <torch/library.h>

#include "core/check.h"
#include "ops/derivatives.h"
#include "ops/reader.h"
#include "ops/walk.h"
#include "ops/writer.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Result = std::tuple<Tensor, Tensor>;  // output, and the weight that each region got

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
  const OptionalTensor &bias, const OptionalTensor &slopes, OptionalList relative
#define CTX_UNUSED_ATTEND \
  const OptionalTensor& /*bias*/, const OptionalTensor& /*slopes*/, OptionalList /*relative*/
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
            OptionalList parameters,
            c10::string_view compressor,
            OptionalList slots,
            CTX_ATTEND_PARAMETERS,
            CTX_SETTINGS_PARAMETERS,
            double scale,
            bool with_region_weights) {
  constexpr const char* where = "ctx.step_";
  const Memory memory(CTX_STATE, CTX_SETTINGS, where);
  check_pairs(memory.state, k, v, where);
  const ScoreOperands operands{bias, slopes, or_empty(relative)};
  check_queries(memory.state, q, k.size(2), operands, where);
  check_rows(k, lengths, reset_at, where);
  check_lengths(lengths, k.size(2), where);
  Writer writer(
      memory, k, v, or_empty(parameters), compressor, or_empty(slots), reset_at.has_value(), where);
  Reader reader(memory, q, operands, scale, with_region_weights, /*counts=*/true);
  Rows calls(memory, k.size(2), lengths, reset_at);
  walk(calls, writer, reader);
  return reader.result();
}

using Chosen = std::tuple<Tensor, Tensor>;

// As step with the compressor "most_used", but what it tells is which tokens became slots: as the
// place of the token among those of evicted_groups, [B, Hkv, slots], and as its number in its stream.
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
  const ScoreOperands operands{bias, slopes, or_empty(relative)};
  check_queries(memory.state, q, k.size(2), operands, where);
  check_rows(k, lengths, reset_at, where);
  check_lengths(lengths, k.size(2), where);
  CTX_CHECK_VALUE(slots >= 0, where, "slots must be at least 0, got ", slots);
  Writer writer(memory, k, v, {}, "most_used", {}, reset_at.has_value(), where);
  Reader reader(memory, q, operands, scale, /*with_region_weights=*/false, /*counts=*/true);
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
            OptionalList parameters,
            c10::string_view compressor,
            OptionalList slots,
            CTX_SETTINGS_PARAMETERS) {
  constexpr const char* where = "ctx.append_";
  CTX_CHECK_VALUE(compressor != "most_used",
                  where,
                  "compressor must be one that needs no queries, got \"most_used\": use ctx.step_");
  const Memory memory(CTX_STATE, CTX_SETTINGS, where);
  check_pairs(memory.state, k, v, where);
  check_rows(k, lengths, reset_at, where);
  check_lengths(lengths, k.size(2), where);
  Writer writer(
      memory, k, v, or_empty(parameters), compressor, or_empty(slots), reset_at.has_value(), where);
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
                     bool with_region_weights) {
  constexpr const char* where = "ctx.attend_memory";
  const Memory memory(CTX_STATE, CTX_SETTINGS, where);
  const ScoreOperands operands{bias, slopes, or_empty(relative)};
  check_queries(memory.state, q, -1, operands, where);
  const int64_t tokens = q.size(2);
  CTX_CHECK_VALUE(tokens <= memory.max_rewind,
                  where,
                  "q must have at most max_rewind = ",
                  memory.max_rewind,
                  " tokens, got ",
                  tokens);
  Reader reader(memory, q, operands, scale, with_region_weights, /*counts=*/false);
  const Tensor first = memory.state[kSeen].sub(tokens);
  if (tokens > 0) reader.attend({first.const_data_ptr<int64_t>(), nullptr, 0, tokens});
  return reader.result();
}

Result attended(const Tensor& q, const Tensor& window_values, bool with_region_weights) {
  auto sizes = q.sym_sizes().vec();
  sizes[3] = window_values.sym_size(3);
  return {q.new_empty_symint(sizes), new_region_weights(q, with_region_weights)};
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
                 OptionalList /*parameters*/,
                 c10::string_view /*compressor*/,
                 OptionalList /*slots*/,
                 CTX_UNUSED_ATTEND,
                 CTX_UNUSED_SETTINGS,
                 double /*scale*/,
                 bool with_region_weights) {
  return attended(q, window_values, with_region_weights);
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
                 OptionalList /*parameters*/,
                 c10::string_view /*compressor*/,
                 OptionalList /*slots*/,
                 CTX_UNUSED_SETTINGS) {}

Result attend_memory_meta(const Tensor& q,
                          CTX_UNUSED_STATE,
                          CTX_UNUSED_ATTEND,
                          CTX_UNUSED_SETTINGS,
                          double /*scale*/,
                          bool with_region_weights) {
  return attended(q, window_values, with_region_weights);
}

}  // namespace

#define CTX_MUTABLE_STATE                                                                         \
  "Tensor(a!) window_keys, Tensor(b!) window_values, Tensor(c!) compressed_keys, Tensor(d!) "     \
  "compressed_values, Tensor(e!) sink_keys, Tensor(f!) sink_values, Tensor(g!) seen, Tensor(h!) " \
  "rewindable, Tensor(i!) usage, Tensor(j!) slot_positions, "
#define CTX_ATTEND_SCHEMA "Tensor? bias, Tensor? slopes, Tensor[]? relative, "
#define CTX_SETTINGS_SCHEMA \
  "int[] schedule, str distance, int rotary_dim, float rotary_base, bool rotary_interleaved"

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def("step_(Tensor q, Tensor k, Tensor v, Tensor? lengths, Tensor? reset_at, " CTX_MUTABLE_STATE
        "Tensor[]? parameters, str compressor, Tensor[]? "
        "slots, " CTX_ATTEND_SCHEMA CTX_SETTINGS_SCHEMA
        ", float scale, bool with_region_weights) -> (Tensor out, Tensor region_weights)",
        {at::Tag::pt2_compliant_tag});
  m.def("append_(Tensor k, Tensor v, Tensor? lengths, Tensor? reset_at, " CTX_MUTABLE_STATE
        "Tensor[]? parameters, str compressor, Tensor[]? slots, " CTX_SETTINGS_SCHEMA ") -> ()",
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
      ", float scale, bool with_region_weights) -> (Tensor out, Tensor region_weights)",
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
struct Step {
  static constexpr const char* kName = "ctx::step_";
};
struct Append {
  static constexpr const char* kName = "ctx::append_";
};
struct Choose {
  static constexpr const char* kName = "ctx::choose_";
};
struct AttendMemory {
  static constexpr const char* kName = "ctx::attend_memory";
};

TORCH_LIBRARY_IMPL(ctx, Autograd, m) {
  m.impl("step_", WithoutTangents<Step, decltype(step)>::call);
  m.impl("append_", WithoutTangents<Append, decltype(append)>::call);
  m.impl("choose_", WithoutTangents<Choose, decltype(choose)>::call);
  m.impl("attend_memory", WithoutTangents<AttendMemory, decltype(attend_memory)>::call);
}

}  // namespace ctx::ops
