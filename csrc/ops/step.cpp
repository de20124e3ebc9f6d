#include "ops/step.h"

#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include "ops/attend.h"
#include "ops/check.h"
#include "ops/derivatives.h"
#include "ops/enlarged.h"
#include "ops/reader.h"
#include "ops/walk.h"
#include "ops/writer.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Kernels wrote into the rings; a graph that still needs them as they were has to hear of it.
void bump_versions(at::TensorList rings) {
  const c10::InferenceMode writes(true);  // a memory that was made in it is written outside, too
  for (const Tensor& ring : rings) ring.unsafeGetTensorImpl()->bump_version();
}

int64_t call_rows(const Tensor& plan, at::TensorList rings) {
  return rings.empty() || rings[0].dim() == 0
             ? -1
             : ops::call_rows(plan, rings[kWindowKeys].size(0)).expect_int();
}

void check_carried(const Memory& memory, const PlanRows& plan, const char* where) {
  if (!memory.kernels().host_reads) return;
  const Schedule& schedule = memory.settings.schedule();
  for (int64_t b = 0; b < plan.batch(); ++b) {
    const int64_t row = plan.header(b, kPlanRow);
    CTX_CHECK_VALUE(row < memory.rows() && (row >= 0 || plan.batch() == memory.rows()),
                    where,
                    "plan must be one of this memory's rows, 0 to ",
                    memory.rows() - 1,
                    ", got ",
                    row,
                    " in row ",
                    b);
    const int64_t seen = plan.header(b, kPlanSeen);
    CTX_CHECK_VALUE(seen >= 0 && seen <= Schedule::kLastPosition &&
                        plan.header(b, kPlanOldestToken) == schedule.window_begin(seen - 1),
                    where,
                    "plan must be one of these settings, got another in row ",
                    b);
  }
}

// The queries of the last tokens: a block that began as many tokens ago.
std::tuple<Tensor, Tensor> read(const Memory& memory,
                                const Tensor& q,
                                const PlanRows& plan,
                                const ScoreOperands& scores,
                                bool with_region_weights) {
  Reader reader(memory, q, scores, with_region_weights, /*counts=*/false);
  const Block block{plan.column(kPlanSeen),
                    nullptr,
                    0,
                    q.size(2),
                    0,
                    plan.row_stride(),
                    plan.column(kPlanRow),
                    memory.rows()};
  if (block.tokens > 0) reader.attend(block);
  return reader.result();
}

Stepped step(const Tensor& q,
             const Tensor& k,
             const Tensor& v,
             const Tensor& plan,
             at::TensorList list,
             OptionalList operands,
             const OptionalTensor& bias,
             const OptionalTensor& slopes,
             OptionalList relative,
             at::IntArrayRef settings,
             at::ArrayRef<double> numbers,
             bool with_region_weights) {
  constexpr const char* where = "ctx.step_";
  const auto precision = own_precision();
  const int64_t batch = call_rows(plan, list);
  const Memory memory(list, unpack(settings, numbers, where), where, batch);
  check_pairs(memory.rings, k, v, where, batch);
  const ScoreOperands scores{bias, slopes, or_empty(relative)};
  const bool reads = k.size(2) == 0;
  check_queries(memory.rings, q, reads ? -1 : k.size(2), scores, where, batch);
  const PlanRows rows(plan, q.size(0), q.size(2), where);
  if (reads) {
    const auto [out, weights] = read(memory, q, rows, scores, with_region_weights);
    const bool chooses = memory.settings.compressor == CompressorKind::kMostUsed;
    const auto none = [&] {
      return chooses ? at::zeros({k.size(0), k.size(1), rows.groups()}, plan.options())
                     : at::empty({0}, plan.options());
    };
    return {out, weights, none(), none()};
  }
  check_carried(memory, rows, where);
  std::optional<Enlarged> enlarged;
  if (Enlarged::pays(memory, rows)) enlarged.emplace(memory, rows, where);
  const Memory& written = enlarged ? enlarged->memory() : memory;
  // A view of the memory's own rings would change while it is read.
  Writer writer(written, rows, memory.apart(k), memory.apart(v), or_empty(operands), where);
  Reader reader(written, memory.apart(q), scores, with_region_weights, /*counts=*/true);
  Walk(written, rows, enlarged.has_value()).for_each_block([&](const Block& block) {
    writer.write(block);  // before its first query attends
    reader.attend(block);
  });
  if (enlarged) enlarged->finish(rows);
  bump_versions(memory.rings);
  const auto [out, weights] = reader.result();
  return {out, weights, writer.chosen(), writer.chosen_positions()};
}

void append(const Tensor& k,
            const Tensor& v,
            const Tensor& plan,
            at::TensorList list,
            OptionalList operands,
            at::IntArrayRef settings,
            at::ArrayRef<double> numbers) {
  constexpr const char* where = "ctx.append_";
  const Settings unpacked = unpack(settings, numbers, where);
  CTX_CHECK_VALUE(unpacked.compressor != CompressorKind::kMostUsed,
                  where,
                  "compressor must be one that needs no queries, got \"most_used\": use ctx.step_");
  const int64_t batch = call_rows(plan, list);
  const Memory memory(list, unpacked, where, batch);
  check_pairs(memory.rings, k, v, where, batch);
  const PlanRows rows(plan, k.size(0), k.size(2), where);
  check_carried(memory, rows, where);
  Writer writer(memory, rows, k, v, or_empty(operands), where);
  Walk(memory, rows).for_each_block([&](const Block& block) { writer.write(block); });
  bump_versions(memory.rings);
}

Stepped step_meta(const Tensor& q,
                  const Tensor& k,
                  const Tensor& v,
                  const Tensor& plan,
                  at::TensorList /*list*/,
                  OptionalList /*operands*/,
                  const OptionalTensor& /*bias*/,
                  const OptionalTensor& /*slopes*/,
                  OptionalList /*relative*/,
                  at::IntArrayRef settings,
                  at::ArrayRef<double> numbers,
                  bool with_region_weights) {
  constexpr const char* where = "ctx.step_";
  auto sizes = q.sym_sizes().vec();
  sizes[3] = v.sym_size(3);
  const auto chosen = [&] {
    if (unpack(settings, numbers, where).compressor != CompressorKind::kMostUsed)
      return plan.new_empty({0});
    const PlanTensors tensors(plan, q.sym_size(0), q.sym_size(2), where);
    return plan.new_empty_symint({k.sym_size(0), k.sym_size(1), tensors.groups()});
  };
  return {
      q.new_empty_symint(sizes), new_region_weights(q, with_region_weights), chosen(), chosen()};
}

void append_meta(const Tensor& /*k*/,
                 const Tensor& /*v*/,
                 const Tensor& /*plan*/,
                 at::TensorList /*list*/,
                 OptionalList /*operands*/,
                 at::IntArrayRef /*settings*/,
                 at::ArrayRef<double> /*numbers*/) {}

// Mutation and differentiation never meet in one operator: these record nothing, by contract.
struct Step {
  static constexpr const char* kName = "ctx::step_";
};
struct Append {
  static constexpr const char* kName = "ctx::append_";
};

}  // namespace

Stepped step_(const Tensor& q,
              const Tensor& k,
              const Tensor& v,
              const Tensor& plan,
              at::TensorList memory,
              at::TensorList operands,
              const ScoreOperands& scores,
              const PackedSettings& settings,
              bool with_region_weights) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("ctx::step_", "").typed<decltype(step)>();
  return op.call(q,
                 k,
                 v,
                 plan,
                 memory,
                 operands,
                 scores.bias,
                 scores.slopes,
                 scores.relative,
                 settings.settings,
                 settings.numbers,
                 with_region_weights);
}

void append_(const Tensor& k,
             const Tensor& v,
             const Tensor& plan,
             at::TensorList memory,
             at::TensorList operands,
             const PackedSettings& settings) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("ctx::append_", "").typed<decltype(append)>();
  op.call(k, v, plan, memory, operands, settings.settings, settings.numbers);
}

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def(
      "step_(Tensor q, Tensor k, Tensor v, Tensor plan, Tensor(a!)[] memory, Tensor[]? operands, "
      "Tensor? bias, Tensor? slopes, Tensor[]? relative, int[] settings, float[] numbers, bool "
      "with_region_weights) -> (Tensor out, Tensor region_weights, Tensor chosen, Tensor "
      "positions)",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "append_(Tensor k, Tensor v, Tensor plan, Tensor(a!)[] memory, Tensor[]? operands, int[] "
      "settings, float[] numbers) -> ()",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CompositeExplicitAutograd, m) {
  m.impl("step_", step);
  m.impl("append_", append);
}

TORCH_LIBRARY_IMPL(ctx, Meta, m) {
  m.impl("step_", step_meta);
  m.impl("append_", append_meta);
}

TORCH_LIBRARY_IMPL(ctx, Autograd, m) {
  m.impl("step_", WithoutTangents<Step, decltype(step)>::call);
  m.impl("append_", WithoutTangents<Append, decltype(append)>::call);
}

}  // namespace ctx::ops
