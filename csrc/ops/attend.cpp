// ctx::attend: attention over three spans as a functional operator, and its backward, which
// recomputes the weights from the log-sum-exp instead of keeping them. On the CPU both are kernels
// of our own (spans.h); elsewhere, and for what those leave out, composites of torch's operators.
#include "ops/attend.h"

#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>

#include "core/check.h"
#include "ops/composite.h"
#include "ops/derivatives.h"
#include "ops/settings.h"
#include "ops/spans.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

void check_spans(const Tensor& q,
                 const Tensor& position,
                 const Spans& s,
                 const Scores& scores,
                 const Schedule& schedule) {
  constexpr const char* where = "ctx.attend";
  CTX_CHECK_VALUE(q.dim() == 4, where, "q must be [B, H, T, D], got ", q.sizes());
  storage_of(q.scalar_type(), where, "q");
  const int64_t batch = q.size(0);
  CTX_CHECK_VALUE(s.window_values.dim() == 4,
                  where,
                  "window_values must be [B, Hkv, K, Dv], got ",
                  s.window_values.sizes());
  const int64_t kv_heads = s.window_values.size(1);
  const auto pair = [&](const Tensor& keys,
                        const Tensor& values,
                        const char* keys_name,
                        const char* values_name) {
    CTX_CHECK_VALUE(keys.dim() == 4 && keys.size(0) == batch && keys.size(1) == kv_heads &&
                        keys.size(3) == q.size(3),
                    where,
                    keys_name,
                    " must be [B, Hkv, keys, D] = [",
                    batch,
                    ", ",
                    kv_heads,
                    ", keys, ",
                    q.size(3),
                    "], got ",
                    keys.sizes());
    CTX_CHECK_VALUE(values.dim() == 4 && values.size(0) == batch && values.size(1) == kv_heads &&
                        values.size(2) == keys.size(2) && values.size(3) == s.window_values.size(3),
                    where,
                    values_name,
                    " must be [B, Hkv, keys, Dv] = [",
                    batch,
                    ", ",
                    kv_heads,
                    ", ",
                    keys.size(2),
                    ", ",
                    s.window_values.size(3),
                    "], got ",
                    values.sizes());
    CTX_CHECK_TYPE(keys.scalar_type() == q.scalar_type() && values.scalar_type() == q.scalar_type(),
                   where,
                   keys_name,
                   " and ",
                   values_name,
                   " must be ",
                   q.scalar_type(),
                   " as q, got ",
                   keys.scalar_type(),
                   " and ",
                   values.scalar_type());
  };
  pair(s.sink_keys, s.sink_values, "sink_keys", "sink_values");
  pair(s.compressed_keys, s.compressed_values, "compressed_keys", "compressed_values");
  pair(s.window_keys, s.window_values, "window_keys", "window_values");
  CTX_CHECK_VALUE(kv_heads > 0 && q.size(1) % kv_heads == 0,
                  where,
                  "q must have a multiple of ",
                  kv_heads,
                  " heads, got ",
                  q.size(1));
  const auto integers = [&](const Tensor& x, const char* name) {
    CTX_CHECK_VALUE(x.dim() == 2 && x.size(0) == batch && x.size(1) == q.size(2) &&
                        x.scalar_type() == at::kLong,
                    where,
                    name,
                    " must be int64 [B, T] = [",
                    batch,
                    ", ",
                    q.size(2),
                    "], got ",
                    x.scalar_type(),
                    " ",
                    x.sizes());
  };
  integers(position, "position");
  integers(s.first_sink, "first_sink");
  integers(s.first_slot, "first_slot");
  integers(s.first_token, "first_token");
  const auto per_head = [&](const OptionalTensor& x, const char* name) {
    CTX_CHECK_VALUE(!x || (x->dim() == 1 && (x->size(0) == q.size(1) || x->size(0) == 1)),
                    where,
                    name,
                    " must be [",
                    q.size(1),
                    "], got ",
                    x ? x->sizes() : at::IntArrayRef{});
  };
  per_head(scores.bias, "bias");
  per_head(scores.slopes, "slopes");
  s.past.check(schedule, s.window_keys, s.window_values, where);
  if (s.slot_positions.defined()) {
    const std::vector<int64_t> sizes = {
        batch, kv_heads, s.past.size(schedule, kCompressed) + s.compressed_keys.size(2)};
    CTX_CHECK_VALUE(s.slot_positions.sizes() == at::IntArrayRef(sizes) &&
                        s.slot_positions.scalar_type() == at::kLong,
                    where,
                    "slot_positions must be int64 [B, Hkv, G] = ",
                    at::IntArrayRef(sizes),
                    ", got ",
                    s.slot_positions.scalar_type(),
                    " ",
                    s.slot_positions.sizes());
  }
  CTX_CHECK_VALUE(scores.relative.has_value() == scores.compressed_relative.has_value(),
                  where,
                  "relative and compressed_relative must come together, got one");
  if (!scores.relative) return;
  for (const Tensor& x : {*scores.relative, *scores.compressed_relative}) {
    CTX_CHECK_VALUE(x.dim() == 4 && x.sizes().slice(0, 3) == q.sizes().slice(0, 3) &&
                        x.size(3) > 0 && x.size(3) % 2 == 0,
                    where,
                    "relative must be [B, H, T, P] with q's B, H, T and an even P, got ",
                    x.sizes());
  }
}

// The operators' common arguments, in the order of their schemas.
#define CTX_ATTEND_PARAMETERS                                                                     \
  const Tensor &q, [[maybe_unused]] const Tensor &position,                                       \
      [[maybe_unused]] const Tensor &sink_keys, [[maybe_unused]] const Tensor &sink_values,       \
      [[maybe_unused]] const Tensor &compressed_keys,                                             \
      [[maybe_unused]] const Tensor &compressed_values,                                           \
      [[maybe_unused]] const Tensor &window_keys, [[maybe_unused]] const Tensor &window_values,   \
      [[maybe_unused]] const Tensor &first_sink, [[maybe_unused]] const Tensor &first_slot,       \
      [[maybe_unused]] const Tensor &first_token,                                                 \
      [[maybe_unused]] const OptionalTensor &slot_positions,                                      \
      [[maybe_unused]] const OptionalTensor &bias, [[maybe_unused]] const OptionalTensor &slopes, \
      [[maybe_unused]] const OptionalTensor &relative,                                            \
      [[maybe_unused]] const OptionalTensor &compressed_relative,                                 \
      [[maybe_unused]] at::IntArrayRef schedule, [[maybe_unused]] c10::string_view distance,      \
      [[maybe_unused]] int64_t rotary_dim, [[maybe_unused]] double rotary_base,                   \
      [[maybe_unused]] bool rotary_interleaved, [[maybe_unused]] double scale,                    \
      [[maybe_unused]] OptionalList past
#define CTX_ATTEND_ARGUMENTS                                                                       \
  q, position, sink_keys, sink_values, compressed_keys, compressed_values, window_keys,            \
      window_values, first_sink, first_slot, first_token, slot_positions, bias, slopes, relative,  \
      compressed_relative, schedule, distance, rotary_dim, rotary_base, rotary_interleaved, scale, \
      past

AttendCall check_call(CTX_ATTEND_PARAMETERS) {
  constexpr const char* where = "ctx.attend";
  const Spans spans{sink_keys,
                    sink_values,
                    compressed_keys,
                    compressed_values,
                    window_keys,
                    window_values,
                    first_sink,
                    first_slot,
                    first_token,
                    slot_positions.value_or(Tensor()),
                    Past::of(or_empty(past), where)};
  const Scores scores{bias, slopes, relative, compressed_relative};
  check_spans(q, position, spans, scores, parse_schedule(schedule, where));
  const Clock clock{parse_schedule(schedule, where),
                    parse_token_distance({distance.data(), distance.size()}, where)};
  const BasedRotary turned =
      parse_rotary(rotary_dim, rotary_base, rotary_interleaved, q.size(3), where);
  return {q, position, spans, bias, slopes, clock, turned, scale};
}

Composite make_composite(CTX_ATTEND_PARAMETERS, bool recorded) {
  const AttendCall c = check_call(CTX_ATTEND_ARGUMENTS);
  const Scores scores{bias, slopes, relative, compressed_relative};
  return {q,
          position,
          joined(c.spans, c.clock.schedule, arithmetic_type(q.scalar_type())),
          scores,
          c.clock,
          c.rotary,
          scale,
          recorded};
}

std::tuple<Tensor, Tensor, Tensor> attend_composite(CTX_ATTEND_PARAMETERS,
                                                    bool with_region_weights,
                                                    bool recorded) {
  const auto precision = own_precision();
  auto [out, logsumexp, region_weights] =
      make_composite(CTX_ATTEND_ARGUMENTS, recorded).forward(with_region_weights);
  return {out.to(q.scalar_type()), logsumexp, region_weights};
}

std::tuple<Tensor, Tensor, Tensor> attend_forward(CTX_ATTEND_PARAMETERS, bool with_region_weights) {
  return attend_composite(CTX_ATTEND_ARGUMENTS, with_region_weights, /*recorded=*/false);
}

std::tuple<Tensor, Tensor, Tensor> attend_meta(CTX_ATTEND_PARAMETERS, bool with_region_weights) {
  auto sizes = q.sym_sizes().vec();
  const Tensor logsumexp = q.new_empty_symint(c10::SymIntArrayRef(sizes).slice(0, 3),
                                              q.options().dtype(arithmetic_type(q.scalar_type())));
  sizes[3] = window_values.sym_size(3);
  return {q.new_empty_symint(sizes), logsumexp, new_region_weights(q, with_region_weights)};
}

// Of q, sink keys and values, compressed, window, bias, and the queries of relative positions.
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The sum of what the regions give; zeros where none of them has keys.
Tensor relative_gradient(const OptionalTensor& like,
                         std::initializer_list<Tensor> parts,
                         const Tensor& q) {
  if (!like) return at::zeros({0}, q.options());
  Tensor sum = at::zeros_like(*like);
  for (const Tensor& part : parts) {
    if (part.defined()) sum = sum + part.to(sum.scalar_type());
  }
  return sum;
}

Gradients backward_composite(const Tensor& grad_out,
                             const Tensor& grad_logsumexp,
                             const Tensor& out,
                             const Tensor& logsumexp,
                             CTX_ATTEND_PARAMETERS,
                             bool recorded) {
  const auto precision = own_precision();
  auto g = make_composite(CTX_ATTEND_ARGUMENTS, recorded)
               .backward(grad_out, grad_logsumexp, out, logsumexp);
  const auto type = q.scalar_type();
  const auto own = [&](const Tensor& grad, const Tensor& keys) {  // without the past's
    const int64_t count = keys.size(2);
    return grad.narrow(2, grad.size(2) - count, count).to(type).contiguous();
  };
  return {g.q.to(type),
          g.keys[kSinks].to(type),
          g.values[kSinks].to(type),
          own(g.keys[kCompressed], compressed_keys),
          own(g.values[kCompressed], compressed_values),
          own(g.keys[kWindow], window_keys),
          own(g.values[kWindow], window_values),
          bias ? g.bias.to(bias->scalar_type()) : at::zeros({0}, q.options()),
          relative_gradient(relative, {g.relative[kWindow], g.relative[kSinks]}, q),
          relative_gradient(compressed_relative, {g.relative[kCompressed]}, q)};
}

Gradients attend_backward(const Tensor& grad_out,
                          const Tensor& grad_logsumexp,
                          const Tensor& out,
                          const Tensor& logsumexp,
                          CTX_ATTEND_PARAMETERS) {
  return backward_composite(
      grad_out, grad_logsumexp, out, logsumexp, CTX_ATTEND_ARGUMENTS, /*recorded=*/false);
}

// What the kernels of spans.h leave to torch's operators: relative positions, and distances to slots
// that are single tokens.
bool is_composite(const OptionalTensor& slot_positions,
                  const OptionalTensor& slopes,
                  const OptionalTensor& relative,
                  c10::string_view distance) {
  return relative || (slopes && slot_positions && distance == "token");
}

std::tuple<Tensor, Tensor, Tensor> attend_forward_cpu(CTX_ATTEND_PARAMETERS,
                                                      bool with_region_weights) {
  if (is_composite(slot_positions, slopes, relative, distance))
    return attend_forward(CTX_ATTEND_ARGUMENTS, with_region_weights);
  const auto precision = own_precision();
  return spans_forward(check_call(CTX_ATTEND_ARGUMENTS), with_region_weights);
}

Gradients attend_backward_cpu(const Tensor& grad_out,
                              const Tensor& grad_logsumexp,
                              const Tensor& out,
                              const Tensor& logsumexp,
                              CTX_ATTEND_PARAMETERS) {
  if (is_composite(slot_positions, slopes, relative, distance)) {
    return attend_backward(grad_out, grad_logsumexp, out, logsumexp, CTX_ATTEND_ARGUMENTS);
  }
  const auto precision = own_precision();
  const auto g =
      spans_backward(check_call(CTX_ATTEND_ARGUMENTS), grad_out, grad_logsumexp, out, logsumexp);
  const auto none = [&] { return at::zeros({0}, q.options()); };  // outputs share no memory
  return {g.q,
          g.keys[kSinks],
          g.values[kSinks],
          g.keys[kCompressed],
          g.values[kCompressed],
          g.keys[kWindow],
          g.values[kWindow],
          bias ? g.bias : none(),
          none(),
          none()};
}

Gradients attend_backward_meta(const Tensor& /*grad_out*/,
                               const Tensor& /*grad_logsumexp*/,
                               const Tensor& /*out*/,
                               const Tensor& /*logsumexp*/,
                               CTX_ATTEND_PARAMETERS) {
  const auto like = [](const Tensor& x) { return x.new_empty_symint(x.sym_sizes()); };
  return {like(q),
          like(sink_keys),
          like(sink_values),
          like(compressed_keys),
          like(compressed_values),
          like(window_keys),
          like(window_values),
          bias ? like(*bias) : q.new_empty({0}),
          relative ? like(*relative) : q.new_empty({0}),
          compressed_relative ? like(*compressed_relative) : q.new_empty({0})};
}

class AttendFunction : public torch::autograd::Function<AttendFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* saved,
                                                CTX_ATTEND_PARAMETERS,
                                                bool with_region_weights) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ctx::attend", "")
                               .typed<decltype(attend_forward)>();
    auto [out, logsumexp, region_weights] = op.call(CTX_ATTEND_ARGUMENTS, with_region_weights);
    saved->mark_non_differentiable({region_weights});
    torch::autograd::variable_list kept = {out,
                                           logsumexp,
                                           q,
                                           position,
                                           sink_keys,
                                           sink_values,
                                           compressed_keys,
                                           compressed_values,
                                           window_keys,
                                           window_values,
                                           first_sink,
                                           first_slot,
                                           first_token,
                                           slot_positions.value_or(Tensor()),
                                           bias.value_or(Tensor()),
                                           slopes.value_or(Tensor()),
                                           relative.value_or(Tensor()),
                                           compressed_relative.value_or(Tensor())};
    const at::TensorList rings = or_empty(past);
    kept.insert(kept.end(), rings.begin(), rings.end());
    saved->save_for_backward(kept);
    saved->saved_data["schedule"] = schedule.vec();
    saved->saved_data["distance"] = std::string(distance);
    saved->saved_data["rotary_dim"] = rotary_dim;
    saved->saved_data["rotary_base"] = rotary_base;
    saved->saved_data["rotary_interleaved"] = rotary_interleaved;
    saved->saved_data["scale"] = scale;
    return {out, logsumexp, region_weights};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* saved,
                                                 torch::autograd::variable_list grads) {
    const auto x = saved->get_saved_variables();
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ctx::attend_backward", "")
                               .typed<decltype(attend_backward)>();
    const Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(x[0]);
    const Tensor grad_logsumexp = grads[1].defined() ? grads[1] : at::zeros_like(x[1]);
    const auto given = [&](size_t i) {
      return x[i].defined() ? OptionalTensor(x[i]) : std::nullopt;
    };
    const auto& data = saved->saved_data;
    const at::TensorList past = at::TensorList(x).slice(18);
    auto [q, sk, sv, ck, cv, wk, wv, b, r, cr] = op.call(grad_out,
                                                         grad_logsumexp,
                                                         x[0],
                                                         x[1],
                                                         x[2],
                                                         x[3],
                                                         x[4],
                                                         x[5],
                                                         x[6],
                                                         x[7],
                                                         x[8],
                                                         x[9],
                                                         x[10],
                                                         x[11],
                                                         x[12],
                                                         given(13),
                                                         given(14),
                                                         given(15),
                                                         given(16),
                                                         given(17),
                                                         data.at("schedule").toIntVector(),
                                                         data.at("distance").toStringView(),
                                                         data.at("rotary_dim").toInt(),
                                                         data.at("rotary_base").toDouble(),
                                                         data.at("rotary_interleaved").toBool(),
                                                         data.at("scale").toDouble(),
                                                         past);
    torch::autograd::variable_list result(24);  // one for each argument of forward
    result[0] = q, result[2] = sk, result[3] = sv, result[4] = ck, result[5] = cv, result[6] = wk,
    result[7] = wv;
    if (given(14)) result[12] = b;
    if (given(16)) result[14] = r;
    if (given(17)) result[15] = cr;
    return result;
  }
};

#define CTX_DIFFERENTIABLE                                                                         \
  q, sink_keys, sink_values, compressed_keys, compressed_values, window_keys, window_values, bias, \
      relative, compressed_relative

std::tuple<Tensor, Tensor, Tensor> attend_autograd(CTX_ATTEND_PARAMETERS,
                                                   bool with_region_weights) {
  if (is_recorded(CTX_DIFFERENTIABLE))
    return attend_composite(CTX_ATTEND_ARGUMENTS, with_region_weights, /*recorded=*/true);
  auto results = AttendFunction::apply(CTX_ATTEND_ARGUMENTS, with_region_weights);
  return {results[0], results[1], results[2]};
}

// Where a backward is differentiated it is recorded, too, so every order has its value.
Gradients backward_autograd(c10::DispatchKeySet keys,
                            const Tensor& grad_out,
                            const Tensor& grad_logsumexp,
                            const Tensor& out,
                            const Tensor& logsumexp,
                            CTX_ATTEND_PARAMETERS) {
  const auto requires_grad = [](const auto&... x) { return (needs_grad(x) || ...); };
  const bool differentiated =
      at::GradMode::is_enabled() &&
      requires_grad(grad_out, grad_logsumexp, out, logsumexp, CTX_DIFFERENTIABLE);
  if (differentiated || is_recorded(grad_out, grad_logsumexp, out, logsumexp, CTX_DIFFERENTIABLE)) {
    return backward_composite(
        grad_out, grad_logsumexp, out, logsumexp, CTX_ATTEND_ARGUMENTS, /*recorded=*/true);
  }
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::attend_backward", "")
                             .typed<decltype(attend_backward)>();
  return op.redispatch(keys & c10::after_autograd_keyset,
                       grad_out,
                       grad_logsumexp,
                       out,
                       logsumexp,
                       CTX_ATTEND_ARGUMENTS);
}

// What is multiplied with keys, and with the encodings of distances.
struct Queries {
  Tensor content;                      // q + u, [B, H, T, D]
  OptionalTensor relative;             // (q + v) W, [B, H, T, P]
  OptionalTensor compressed_relative;  // the same with those of compressed slots

  // `operands`: as AttentionOptions::relative.
  Queries(const Tensor& q, at::TensorList operands) : content(q) {
    if (operands.empty()) return;
    const auto type = arithmetic_type(q.scalar_type());
    Tensor wide = q.to(type);
    const auto biased = [&](int i) { return wide + operands[i].to(type).unsqueeze(1); };
    content = biased(0).to(q.scalar_type());
    // A query that is not finite is so in `content`; here its product with a gradient of zero would
    // make that of the whole weight NaN.
    wide = wide.masked_fill(at::isfinite(wide.detach()).all(-1, true).logical_not(), 0.0);
    relative = at::matmul(biased(1), operands[2].to(type));
    compressed_relative = at::matmul(biased(3), operands[4].to(type));
  }
};

}  // namespace

Spans joined(Spans s, const Schedule& schedule, at::ScalarType type) {
  if (!s.past.defined()) return s;
  const auto join = [&](const Tensor& ring, Tensor& keys, Region region) {
    if (s.past.size(schedule, region) == 0) return;
    keys = at::cat({s.past.read(ring, schedule, region, type), keys.to(type)}, 2);
  };
  join(s.past.window_keys, s.window_keys, kWindow);
  join(s.past.window_values, s.window_values, kWindow);
  join(s.past.compressed_keys, s.compressed_keys, kCompressed);
  join(s.past.compressed_values, s.compressed_values, kCompressed);
  s.past = {};
  return s;
}

std::tuple<Tensor, Tensor> attend(const Tensor& q,
                                  const Tensor& position,
                                  const Spans& s,
                                  const ScoreOperands& operands,
                                  const Clock& clock,
                                  const BasedRotary& rotary,
                                  double scale,
                                  bool with_region_weights) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::attend", "")
                             .typed<decltype(attend_forward)>();
  const Schedule& l = clock.schedule;
  const Queries queries(q, operands.relative);
  auto [out, logsumexp, region_weights] =
      op.call(queries.content,
              position,
              s.sink_keys,
              s.sink_values,
              s.compressed_keys,
              s.compressed_values,
              s.window_keys,
              s.window_values,
              s.first_sink,
              s.first_slot,
              s.first_token,
              s.slot_positions.defined() ? OptionalTensor(s.slot_positions) : std::nullopt,
              operands.bias,
              operands.slopes,
              queries.relative,
              queries.compressed_relative,
              {l.window, l.compressed, l.ratio, l.segment, l.sinks},
              clock.token_distance ? "token" : "slot",
              rotary.dim,
              rotary.base,
              rotary.interleaved,
              scale,
              s.past.list(),
              with_region_weights);
  return {out, region_weights};
}

Attended attend_now(const Tensor& q,
                    const Tensor& position,
                    const Spans& spans,
                    const ScoreOperands& operands,
                    const Clock& clock,
                    const BasedRotary& rotary,
                    double scale,
                    bool with_region_weights,
                    bool with_usage) {
  const Queries queries(q, operands.relative);
  const Scores scores{
      operands.bias, operands.slopes, queries.relative, queries.compressed_relative};
  const Spans all = joined(spans, clock.schedule, arithmetic_type(q.scalar_type()));
  const Composite call(queries.content, position, all, scores, clock, rotary, scale);
  Tensor usage;
  if (with_usage) {
    usage = at::zeros({q.size(0), all.window_keys.size(1), all.window_keys.size(2), 1},
                      q.options().dtype(arithmetic_type(q.scalar_type())));
  }
  const auto [out, logsumexp, region_weights] = call.forward(with_region_weights, usage);
  return {out.to(q.scalar_type()), region_weights, with_usage ? usage.squeeze(-1) : usage};
}

#define CTX_ATTEND_SCHEMA                                                                          \
  "Tensor q, Tensor position, Tensor sink_keys, Tensor sink_values, Tensor compressed_keys, "      \
  "Tensor compressed_values, Tensor window_keys, Tensor window_values, Tensor first_sink, Tensor " \
  "first_slot, Tensor "                                                                            \
  "first_token, Tensor? slot_positions, "                                                          \
  "Tensor? bias, Tensor? slopes, Tensor? relative, Tensor? compressed_relative, int[] schedule, "  \
  "str distance, int rotary_dim, float rotary_base, bool "                                         \
  "rotary_interleaved, "                                                                           \
  "float scale, Tensor[]? past"

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def("attend(" CTX_ATTEND_SCHEMA
        ", bool with_region_weights) -> (Tensor out, Tensor logsumexp, Tensor region_weights)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "attend_backward(Tensor grad_out, Tensor grad_logsumexp, Tensor out, Tensor "
      "logsumexp, " CTX_ATTEND_SCHEMA
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CompositeExplicitAutograd, m) {
  m.impl("attend", attend_forward);
  m.impl("attend_backward", attend_backward);
}

TORCH_LIBRARY_IMPL(ctx, CPU, m) {
  m.impl("attend", attend_forward_cpu);
  m.impl("attend_backward", attend_backward_cpu);
}

TORCH_LIBRARY_IMPL(ctx, Meta, m) {
  m.impl("attend", attend_meta);
  m.impl("attend_backward", attend_backward_meta);
}

TORCH_LIBRARY_IMPL(ctx, Autograd, m) {
  m.impl("attend", attend_autograd);
  m.impl("attend_backward", backward_autograd);
}

}  // namespace ctx::ops
