#include "core/calls.h"

#include <ATen/core/dispatch/Dispatcher.h>

namespace ctx::calls {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Pair = std::tuple<Tensor, Tensor>;

// The arguments that every operator ends with.
#define CTX_SETTINGS_TYPES at::IntArrayRef, c10::string_view, int64_t, double, bool
#define CTX_SETTINGS_OF(options)                                                        \
  numbers(options.schedule), options.distance, options.rotary_dim, options.rotary_base, \
      options.rotary_interleaved
#define CTX_STATE_TYPES                                                                     \
  const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, \
      const Tensor&, const Tensor&, const Tensor&, const Tensor&
#define CTX_STATE_OF(s) s[0], s[1], s[2], s[3], s[4], s[5], s[6], s[7], s[8], s[9]
static_assert(ops::kStateTensors == 10);

std::array<int64_t, 6> numbers(const Schedule& s) {
  return {s.window, s.compressed, s.ratio, s.segment, s.sinks, s.overlap};
}

template <typename F>
auto find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<F>();
}

}  // namespace

Pair step_(const Tensor& q,
           const Tokens& tokens,
           const ops::State& state,
           const Slots& slots,
           const OptionalTensor& bias,
           const AttentionOptions& options,
           bool with_region_weights) {
  static const auto op = find<Pair(const Tensor&,
                                   const Tensor&,
                                   const Tensor&,
                                   const OptionalTensor&,
                                   const OptionalTensor&,
                                   CTX_STATE_TYPES,
                                   ops::OptionalList,
                                   c10::string_view,
                                   ops::OptionalList,
                                   const OptionalTensor&,
                                   const OptionalTensor&,
                                   ops::OptionalList,
                                   CTX_SETTINGS_TYPES,
                                   double,
                                   bool)>("ctx::step_");
  return op.call(q,
                 tokens.k,
                 tokens.v,
                 tokens.lengths,
                 tokens.reset_at,
                 CTX_STATE_OF(state),
                 slots.parameters,
                 slots.compressor,
                 slots.made,
                 bias,
                 options.alibi_slopes,
                 options.relative,
                 CTX_SETTINGS_OF(options),
                 options.scale,
                 with_region_weights);
}

void append_(const Tokens& tokens,
             const ops::State& state,
             const Slots& slots,
             const AttentionOptions& options) {
  static const auto op = find<void(const Tensor&,
                                   const Tensor&,
                                   const OptionalTensor&,
                                   const OptionalTensor&,
                                   CTX_STATE_TYPES,
                                   ops::OptionalList,
                                   c10::string_view,
                                   ops::OptionalList,
                                   CTX_SETTINGS_TYPES)>("ctx::append_");
  op.call(tokens.k,
          tokens.v,
          tokens.lengths,
          tokens.reset_at,
          CTX_STATE_OF(state),
          slots.parameters,
          slots.compressor,
          slots.made,
          CTX_SETTINGS_OF(options));
}

Pair choose_(const Tensor& q,
             const Tokens& tokens,
             const ops::State& state,
             const OptionalTensor& bias,
             const AttentionOptions& options,
             const Tensor& block,
             const c10::SymInt& slots) {
  static const auto op = find<Pair(const Tensor&,
                                   const Tensor&,
                                   const Tensor&,
                                   const OptionalTensor&,
                                   const OptionalTensor&,
                                   CTX_STATE_TYPES,
                                   const OptionalTensor&,
                                   const OptionalTensor&,
                                   ops::OptionalList,
                                   CTX_SETTINGS_TYPES,
                                   double,
                                   const Tensor&,
                                   c10::SymInt)>("ctx::choose_");
  return op.call(q,
                 tokens.k,
                 tokens.v,
                 tokens.lengths,
                 tokens.reset_at,
                 CTX_STATE_OF(state),
                 bias,
                 options.alibi_slopes,
                 options.relative,
                 CTX_SETTINGS_OF(options),
                 options.scale,
                 block,
                 slots);
}

Pair attend_memory(const Tensor& q,
                   const ops::State& state,
                   const OptionalTensor& bias,
                   const AttentionOptions& options,
                   bool with_region_weights) {
  static const auto op = find<Pair(const Tensor&,
                                   CTX_STATE_TYPES,
                                   const OptionalTensor&,
                                   const OptionalTensor&,
                                   ops::OptionalList,
                                   CTX_SETTINGS_TYPES,
                                   double,
                                   bool)>("ctx::attend_memory");
  return op.call(q,
                 CTX_STATE_OF(state),
                 bias,
                 options.alibi_slopes,
                 options.relative,
                 CTX_SETTINGS_OF(options),
                 options.scale,
                 with_region_weights);
}

std::tuple<Tensor, Tensor, Tensor> evicted_groups(const Tokens& tokens,
                                                  at::TensorList memory,
                                                  const AttentionOptions& options) {
  static const auto op =
      find<std::tuple<Tensor, Tensor, Tensor>(const Tensor&,
                                              const Tensor&,
                                              const OptionalTensor&,
                                              const OptionalTensor&,
                                              ops::OptionalList,
                                              CTX_SETTINGS_TYPES)>("ctx::evicted_groups");
  return op.call(
      tokens.k, tokens.v, tokens.lengths, tokens.reset_at, memory, CTX_SETTINGS_OF(options));
}

Pair attend_sequence(const Tensor& q,
                     const Tokens& tokens,
                     at::TensorList memory,
                     const Tensor& slot_keys,
                     const Tensor& slot_values,
                     const OptionalTensor& slot_positions,
                     const OptionalTensor& bias,
                     const AttentionOptions& options,
                     bool with_region_weights) {
  static const auto op = find<Pair(const Tensor&,
                                   const Tensor&,
                                   const Tensor&,
                                   const OptionalTensor&,
                                   const OptionalTensor&,
                                   ops::OptionalList,
                                   const Tensor&,
                                   const Tensor&,
                                   const OptionalTensor&,
                                   const OptionalTensor&,
                                   const OptionalTensor&,
                                   ops::OptionalList,
                                   CTX_SETTINGS_TYPES,
                                   double,
                                   bool)>("ctx::attend_sequence");
  return op.call(q,
                 tokens.k,
                 tokens.v,
                 tokens.lengths,
                 tokens.reset_at,
                 memory,
                 slot_keys,
                 slot_values,
                 slot_positions,
                 bias,
                 options.alibi_slopes,
                 options.relative,
                 CTX_SETTINGS_OF(options),
                 options.scale,
                 with_region_weights);
}

}  // namespace ctx::calls
