// ctx::evicted_groups and its backward: on the CPU one pass over the tokens that are read; elsewhere
// out of torch's own operators.
#include "ops/groups.h"

#include <ATen/Dispatch.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>

#include "ops/check.h"
#include "ops/derivatives.h"
#include "ops/layout.h"
#include "ops/plan.h"
#include "ops/registry.h"
#include "ops/rings.h"
#include "ops/rotary.h"
#include "ops/shapes.h"
#include "ops/state.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using c10::SymInt;

constexpr const char* kWhere = "ctx.evicted_groups";

Settings check(const Tensor& k,
               const Tensor& v,
               at::TensorList memory,
               at::IntArrayRef settings,
               at::ArrayRef<double> numbers) {
  const Settings x = unpack(settings, numbers, kWhere);
  check_shape(kWhere, "k", k, {{"B"}, {"Hkv"}, {"T"}, {"D"}});
  check_shape(
      kWhere, "v", v, {{"B", k.sym_size(0)}, {"Hkv", k.sym_size(1)}, {"T", k.sym_size(2)}, {"Dv"}});
  check_type(kWhere, "v", v, k.scalar_type(), " as k");
  storage_of(k.scalar_type(), kWhere, "k");
  check_head_dim(x, k.sym_size(3), kWhere);
  if (memory.empty()) return x;
  check_rings(memory, x.schedule(), kWhere);
  check_pairs(memory, k, v, kWhere);
  return x;
}

int64_t tokens_read(const Schedule& s) { return s.ratio + s.overlap; }

// The tokens that each group reads: their places in the call, [B, G read], their numbers in their
// streams, and where they are the call's: a place below zero is the memory's.
struct Reading {
  Tensor place;
  Tensor number;

  Reading(const PlanTensors& plan, const Schedule& s) {
    const int64_t read = tokens_read(s);
    place = count_from(plan.group(kPlanPlace) - s.overlap, read).flatten(1);
    const Tensor first = plan.group(kPlanNumber).mul(s.ratio).add(s.sinks - s.overlap);
    number = count_from(first, read).flatten(1);
  }

  Tensor wide(const Tensor& mask) const { return mask.unsqueeze(1).unsqueeze(-1); }
};

// Rows of x [B, heads, T, width] at places [B, n]; out-of-range places are clamped.
Tensor take_rows(const Tensor& x, const Tensor& place) {
  const Tensor inside =
      place.clamp_min(0).clamp_max(at::Scalar(x.sym_size(2) - 1)).unsqueeze(1).unsqueeze(-1);
  return x.gather(
      2, inside.expand_symint({x.sym_size(0), x.sym_size(1), place.sym_size(1), x.sym_size(3)}));
}

// Pairs of the carried stream that a memory holds, by their places in the call.
Tensor held_rows(at::TensorList memory,
                 StateIndex ring,
                 StateIndex sinks,
                 const PlanTensors& plan,
                 const Schedule& s,
                 const Tensor& place) {
  const auto column = [](const Tensor& x) { return x.unsqueeze(1); };
  const Tensor token = column(plan.header(kPlanSeen)) + place;
  const Tensor held = token.ge(column(plan.header(kPlanOldestToken).sub(s.overlap).clamp_min(0)));
  const Tensor rows = read_ring(memory[ring], token, held);
  if (s.sinks == 0) return rows;
  const Tensor sink = token.lt(s.sinks).logical_and(held);
  return at::where(sink.unsqueeze(1).unsqueeze(-1), take_rows(memory[sinks], token), rows);
}

// x are rows as a memory holds them: keys are rotated.
Tensor group_elsewhere(const Tensor& x,
                       const PlanTensors& plan,
                       at::TensorList memory,
                       StateIndex ring,
                       StateIndex sinks,
                       const Schedule& s) {
  const auto type = arithmetic_type(x.scalar_type());
  const Reading reading(plan, s);
  Tensor rows = x.sym_size(2) == 0 ? Tensor() : take_rows(x, reading.place);
  if (!memory.empty()) {
    const Tensor held = held_rows(memory, ring, sinks, plan, s, reading.place);
    rows = rows.defined() ? at::where(reading.wide(reading.place.lt(0)), held, rows) : held;
  }
  if (!rows.defined())
    rows = at::zeros_symint(
        {x.sym_size(0), x.sym_size(1), reading.place.sym_size(1), x.sym_size(3)}, x.options());
  return rows.to(type);
}

// Rotating by the negative angle is the transpose; the inverse divides by the factor twice.
Tensor rotated_back(const Tensor& rows, const Tensor& position, const Rotary& rotary) {
  if (rotary.dim == 0) return rows;
  const double factor = rotary.attention_factor;
  const Tensor turned = rotate(rows, position.neg(), rotary);
  if (factor == 1.0) return turned;
  return at::cat(
      {turned.slice(-1, 0, rotary.dim) / (factor * factor), turned.slice(-1, rotary.dim)}, -1);
}

Pairs groups_elsewhere(const Tensor& k,
                       const Tensor& v,
                       const Tensor& plan,
                       OptionalList list,
                       at::IntArrayRef packed,
                       at::ArrayRef<double> numbers) {
  const at::TensorList memory = or_empty(list);
  const Settings settings = check(k, v, memory, packed, numbers);
  const PlanTensors tensors(plan, k.sym_size(0), k.sym_size(2), kWhere);
  const Schedule& s = settings.schedule();
  const Rotary& rotary = settings.rotary;
  const Tensor stored = rotary.keys_rotated ? k : rotate(k, tensors.token(kPlanPosition), rotary);
  const Reading reading(tensors, s);
  const auto grouped = [&](const Tensor& rows) {
    return rows.masked_fill(reading.wide(reading.number.lt(0)), 0.0)
        .reshape_symint({rows.sym_size(0),
                         rows.sym_size(1),
                         tensors.groups(),
                         tokens_read(s),
                         rows.sym_size(3)});
  };
  const Tensor keys = group_elsewhere(stored, tensors, memory, kWindowKeys, kSinkKeys, s);
  return {grouped(rotated_back(keys, reading.number, rotary)),
          grouped(group_elsewhere(v, tensors, memory, kWindowValues, kSinkValues, s))};
}

// Which row a group reads, and where it lies.
enum class Source : uint8_t { kNone, kCall, kRing, kSink };

struct Read {
  Source source;
  int64_t index;     // in the call, or in the ring
  int64_t position;  // of the token in its stream
};

std::vector<Read> reads_of(const PlanRows& plan,
                           const Schedule& s,
                           bool carried,
                           int64_t capacity) {
  const int64_t read = tokens_read(s);
  std::vector<Read> reads;
  reads.reserve(plan.batch() * plan.groups() * read);
  for (int64_t b = 0; b < plan.batch(); ++b) {
    const int64_t seen = plan.header(b, kPlanSeen);
    const int64_t oldest = std::max<int64_t>(0, plan.header(b, kPlanOldestToken) - s.overlap);
    for (int64_t g = 0; g < plan.groups(); ++g) {
      const int64_t first = plan.group(b, kPlanNumber, g) * s.ratio + s.sinks - s.overlap;
      for (int64_t i = 0; i < read; ++i) {
        const int64_t place = plan.group(b, kPlanPlace, g) - s.overlap + i;
        const int64_t token = seen + place;
        Read r{Source::kNone, 0, first + i};
        if (first + i < 0) {
        } else if (place >= 0) {
          if (plan.tokens() > 0) r = {Source::kCall, std::min(place, plan.tokens() - 1), first + i};
        } else if (carried && token >= oldest) {
          r = token < s.sinks ? Read{Source::kSink, token, token}
                              : Read{Source::kRing, token % capacity, token};
        }
        reads.push_back(r);
      }
    }
  }
  return reads;
}

// Rows [B, heads, n, width] in the arithmetic's type.
Tensor gather(const Tensor& x,
              const Tensor& ring,
              const Tensor& sinks,
              const std::vector<Read>& reads) {
  const auto type = arithmetic_type(x.scalar_type());
  const int64_t batch = x.size(0), heads = x.size(1), width = x.size(3);
  const int64_t count = static_cast<int64_t>(reads.size()) / std::max<int64_t>(batch, 1);
  const Tensor out = at::empty({batch, heads, count, width}, x.options().dtype(type));
  if (out.numel() == 0) return out;
  const Tensor call = rows(x);
  AT_DISPATCH_FLOATING_TYPES_AND2(at::kHalf, at::kBFloat16, x.scalar_type(), "evicted_groups", [&] {
    using Wide = std::conditional_t<std::is_same_v<scalar_t, double>, double, float>;
    auto* const target = out.data_ptr<Wide>();
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / (count * width));
    at::parallel_for(0, batch * heads, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t b = task / heads, h = task % heads;
        const auto row = [&](const Tensor& from, int64_t i) {
          return from.const_data_ptr<scalar_t>() + b * from.stride(0) + h * from.stride(1) +
                 i * from.stride(2);
        };
        for (int64_t i = 0; i < count; ++i) {
          const Read& r = reads[b * count + i];
          Wide* const to = target + (task * count + i) * width;
          if (r.source == Source::kNone) {
            std::fill_n(to, width, Wide(0));
            continue;
          }
          const scalar_t* const from = r.source == Source::kCall   ? row(call, r.index)
                                       : r.source == Source::kRing ? row(ring, r.index)
                                                                   : row(sinks, r.index);
          for (int64_t d = 0; d < width; ++d) to[d] = static_cast<Wide>(from[d]);
        }
      }
    });
  });
  return out;
}

// Rotates rows back, in place; what is before the stream stays zero.
void rotate_back(const Tensor& x, const std::vector<Read>& reads, const Rotary& rotary) {
  if (rotary.dim == 0 || x.numel() == 0) return;
  std::vector<double> positions;
  for (const Read& r : reads) positions.push_back(static_cast<double>(r.position));
  RotateArgs args;
  args.rotary = rotary;
  args.inverse = true;
  args.storage = storage_of(x.scalar_type(), kWhere, "k");
  args.batch = x.size(0), args.heads = x.size(1), args.tokens = x.size(2);
  args.head_dim = x.size(3);
  args.positions = positions.data();
  args.in = args.out = strided(x);
  kernels_for(x.device().type()).rotate(args);
}

Pairs groups_cpu(const Tensor& k,
                 const Tensor& v,
                 const Tensor& plan,
                 OptionalList list,
                 at::IntArrayRef packed,
                 at::ArrayRef<double> numbers) {
  const at::TensorList memory = or_empty(list);
  const Settings settings = check(k, v, memory, packed, numbers);
  const Schedule& s = settings.schedule();
  const PlanRows rows(plan, k.size(0), k.size(2), kWhere);
  const bool carried = !memory.empty();
  const auto reads = reads_of(rows, s, carried, carried ? memory[kWindowKeys].size(2) : 1);
  const auto held = [&](StateIndex index) { return carried ? memory[index] : Tensor(); };
  // As the memory stores them, so that slots do not depend on which call brought a token.
  const Tensor stored =
      settings.rotary.keys_rotated
          ? k
          : rotated(k,
                    PlanTensors(plan, k.size(0), k.size(2), kWhere).token(kPlanPosition),
                    settings.rotary);
  const Tensor keys = gather(stored, held(kWindowKeys), held(kSinkKeys), reads);
  rotate_back(keys, reads, settings.rotary);
  const Tensor values = gather(v, held(kWindowValues), held(kSinkValues), reads);
  const auto grouped = [&](const Tensor& x) {
    return x.view({x.size(0), x.size(1), rows.groups(), tokens_read(s), x.size(3)});
  };
  return {grouped(keys), grouped(values)};
}

Pairs groups_meta(const Tensor& k,
                  const Tensor& v,
                  const Tensor& plan,
                  OptionalList list,
                  at::IntArrayRef packed,
                  at::ArrayRef<double> numbers) {
  const Settings settings = check(k, v, or_empty(list), packed, numbers);
  const PlanTensors tensors(plan, k.sym_size(0), k.sym_size(2), kWhere);
  const auto made = [&](const Tensor& x) {
    return x.new_empty_symint({x.sym_size(0),
                               x.sym_size(1),
                               tensors.groups(),
                               tokens_read(settings.schedule()),
                               x.sym_size(3)},
                              x.options().dtype(arithmetic_type(x.scalar_type())));
  };
  return {made(k), made(v)};
}

// Gradients of the call's pairs [B, Hkv, T, width]; a place that is not the call's has none. `grad_k`
// and `grad_v` are the groups', `tokens` T, `type` that of the pairs.
Pairs backward_elsewhere(const Tensor& grad_k,
                         const Tensor& grad_v,
                         const Tensor& plan,
                         SymInt tokens,
                         at::ScalarType type,
                         at::IntArrayRef packed,
                         at::ArrayRef<double> numbers) {
  const Settings settings = unpack(packed, numbers, kWhere);
  const PlanTensors tensors(plan, grad_k.sym_size(0), tokens, kWhere);
  const Reading reading(tensors, settings.schedule());
  const Tensor outside = reading.wide(reading.place.lt(0).logical_or(
      reading.place.ge(at::Scalar(tokens)).logical_or(reading.number.lt(0))));
  const auto sum = [&](const Tensor& grad, bool rotates) {
    const SymInt batch = grad.sym_size(0), heads = grad.sym_size(1), width = grad.sym_size(4);
    const Tensor total = at::zeros_symint({batch, heads, tokens, width}, grad.options());
    if (tokens == 0) return total.to(type);
    Tensor rows = grad.flatten(2, 3).masked_fill(outside, 0.0);
    if (rotates && settings.rotary.dim > 0) {  // the transpose of the inverse
      const double factor = settings.rotary.attention_factor;
      const int64_t dim = settings.rotary.dim;
      rows = rotate(rows, reading.number, settings.rotary);
      rows = at::cat({rows.slice(-1, 0, dim) / (factor * factor), rows.slice(-1, dim)}, -1);
    }
    const Tensor index = reading.wide(reading.place.clamp_min(0).clamp_max(at::Scalar(tokens - 1)));
    return total.scatter_add(2, index.expand_symint(rows.sym_sizes()), rows).to(type);
  };
  return {sum(grad_k, settings.rotary.keys_rotated), sum(grad_v, false)};
}

Tensor sum_reads(const Tensor& grad, const std::vector<Read>& reads, int64_t tokens) {
  const int64_t batch = grad.size(0), heads = grad.size(1), width = grad.size(4);
  const int64_t count = grad.size(2) * grad.size(3);
  const Tensor total = at::zeros({batch, heads, tokens, width}, grad.options());
  if (total.numel() == 0 || count == 0) return total;
  const Tensor from = grad.contiguous();
  AT_DISPATCH_FLOATING_TYPES(grad.scalar_type(), "evicted_groups_backward", [&] {
    const auto* const source = from.const_data_ptr<scalar_t>();
    auto* const target = total.data_ptr<scalar_t>();
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / (count * width));
    at::parallel_for(0, batch * heads, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        for (int64_t i = 0; i < count; ++i) {
          const Read& r = reads[task / heads * count + i];
          if (r.source != Source::kCall) continue;
          const auto* const row = source + (task * count + i) * width;
          auto* const sum = target + (task * tokens + r.index) * width;
          for (int64_t d = 0; d < width; ++d) sum[d] += row[d];
        }
      }
    });
  });
  return total;
}

Pairs backward_cpu(const Tensor& grad_k,
                   const Tensor& grad_v,
                   const Tensor& plan,
                   SymInt symbolic_tokens,
                   at::ScalarType type,
                   at::IntArrayRef packed,
                   at::ArrayRef<double> numbers) {
  const Settings settings = unpack(packed, numbers, kWhere);
  const int64_t tokens = symbolic_tokens.expect_int();
  if (settings.rotary.keys_rotated)
    return backward_elsewhere(grad_k, grad_v, plan, tokens, type, packed, numbers);
  const PlanRows rows(plan, grad_k.size(0), tokens, kWhere);
  auto reads = reads_of(rows, settings.schedule(), /*carried=*/false, 1);
  // Places past the call's end were clamped; no law shows them.
  const int64_t read = tokens_read(settings.schedule());
  for (int64_t b = 0; b < rows.batch(); ++b) {
    for (int64_t g = 0; g < rows.groups(); ++g) {
      for (int64_t i = 0; i < read; ++i) {
        if (rows.group(b, kPlanPlace, g) - settings.schedule().overlap + i >= tokens)
          reads[(b * rows.groups() + g) * read + i].source = Source::kNone;
      }
    }
  }
  return {sum_reads(grad_k, reads, tokens).to(type), sum_reads(grad_v, reads, tokens).to(type)};
}

Pairs backward_meta(const Tensor& grad_k,
                    const Tensor& grad_v,
                    const Tensor& /*plan*/,
                    SymInt tokens,
                    at::ScalarType type,
                    at::IntArrayRef /*packed*/,
                    at::ArrayRef<double> /*numbers*/) {
  const auto made = [&](const Tensor& grad) {
    return grad.new_empty_symint({grad.sym_size(0), grad.sym_size(1), tokens, grad.sym_size(4)},
                                 grad.options().dtype(type));
  };
  return {made(grad_k), made(grad_v)};
}

auto backward_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::evicted_groups_backward", "")
                             .typed<decltype(backward_cpu)>();
  return op;
}

auto groups_op() {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::evicted_groups", "")
                             .typed<decltype(groups_cpu)>();
  return op;
}

class GroupsFunction : public torch::autograd::Function<GroupsFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* saved,
                                                const Tensor& k,
                                                const Tensor& v,
                                                const Tensor& plan,
                                                OptionalList memory,
                                                at::IntArrayRef settings,
                                                at::ArrayRef<double> numbers) {
    at::AutoDispatchBelowADInplaceOrView guard;
    saved->save_for_backward({plan});
    saved->saved_data["tokens"] = k.sym_size(2);
    saved->saved_data["type"] = static_cast<int64_t>(k.scalar_type());
    saved->saved_data["settings"] = settings.vec();
    saved->saved_data["numbers"] = numbers.vec();
    const auto [keys, values] = groups_op().call(k, v, plan, memory, settings, numbers);
    return {keys, values};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* saved,
                                                 torch::autograd::variable_list grads) {
    const auto& data = saved->saved_data;
    const Tensor plan = saved->get_saved_variables()[0];
    torch::autograd::variable_list result(6);
    std::tie(result[0], result[1]) =
        backward_op().call(grads[0],
                           grads[1],
                           plan,
                           data.at("tokens").toSymInt(),
                           static_cast<at::ScalarType>(data.at("type").toInt()),
                           data.at("settings").toIntVector(),
                           data.at("numbers").toDoubleVector());
    return result;
  }
};

Pairs groups_autograd(const Tensor& k,
                      const Tensor& v,
                      const Tensor& plan,
                      OptionalList memory,
                      at::IntArrayRef settings,
                      at::ArrayRef<double> numbers) {
  const auto precision = own_precision();
  if (is_recorded(k, v)) return groups_elsewhere(k, v, plan, memory, settings, numbers);
  const auto made = GroupsFunction::apply(k, v, plan, memory, settings, numbers);
  return {made[0], made[1]};
}

// Where a backward is differentiated torch's own operators do it, which autograd records.
Pairs backward_autograd(c10::DispatchKeySet keys,
                        const Tensor& grad_k,
                        const Tensor& grad_v,
                        const Tensor& plan,
                        SymInt tokens,
                        at::ScalarType type,
                        at::IntArrayRef settings,
                        at::ArrayRef<double> numbers) {
  const bool differentiated =
      at::GradMode::is_enabled() && (needs_grad(grad_k) || needs_grad(grad_v));
  if (differentiated || is_recorded(grad_k, grad_v))
    return backward_elsewhere(grad_k, grad_v, plan, tokens, type, settings, numbers);
  return backward_op().redispatch(
      keys & c10::after_autograd_keyset, grad_k, grad_v, plan, tokens, type, settings, numbers);
}

}  // namespace

Pairs evicted_groups(const Tensor& k,
                     const Tensor& v,
                     const Tensor& plan,
                     at::TensorList memory,
                     const PackedSettings& settings) {
  return groups_op().call(k, v, plan, memory, settings.settings, settings.numbers);
}

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def(
      "evicted_groups(Tensor k, Tensor v, Tensor plan, Tensor[]? memory, int[] settings, float[] "
      "numbers) -> (Tensor keys, Tensor values)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "evicted_groups_backward(Tensor grad_keys, Tensor grad_values, Tensor plan, SymInt tokens, "
      "ScalarType dtype, int[] settings, float[] numbers) -> (Tensor k, Tensor v)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CompositeExplicitAutograd, m) {
  m.impl("evicted_groups", groups_elsewhere);
  m.impl("evicted_groups_backward", backward_elsewhere);
}

TORCH_LIBRARY_IMPL(ctx, CPU, m) {
  m.impl("evicted_groups", groups_cpu);
  m.impl("evicted_groups_backward", backward_cpu);
}

TORCH_LIBRARY_IMPL(ctx, Meta, m) {
  m.impl("evicted_groups", groups_meta);
  m.impl("evicted_groups_backward", backward_meta);
}

TORCH_LIBRARY_IMPL(ctx, Autograd, m) {
  m.impl("evicted_groups", groups_autograd);
  m.impl("evicted_groups_backward", backward_autograd);
}

}  // namespace ctx::ops
