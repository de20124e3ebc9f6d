#include "ops/writer.h"

#include "ops/check.h"
#include "ops/layout.h"
#include "ops/shapes.h"

namespace ctx::ops {

using at::Tensor;

Writer::Writer(const Memory& memory,
               const PlanRows& plan,
               const Tensor& k,
               const Tensor& v,
               at::TensorList operands,
               const char* where)
    : memory_(memory), k_(rows(memory.apart(k))), v_(rows(memory.apart(v))) {
  compress_.kind = memory.settings.compressor;
  append_.memory = compress_.memory = memory.view;
  append_.keys = strided(k_);
  append_.values = strided(v_);
  compress_.slots = plan.groups();
  compress_.slot_block = plan.column(kPlanBlock);
  compress_.slot_block_stride = plan.row_stride();
  compress_.kind == CompressorKind::kGiven ? take_slots(plan, operands, where)
                                           : take_parameters(operands, where);
  report_chosen(plan, compress_.kind == CompressorKind::kMostUsed);
}

void Writer::write(const Block& block) {
  append_.block = compress_.block = block;
  memory_.kernels().write(append_, compress_);
}

// Parameters may be stored as the memory is, or as the arithmetic is; anything else is converted to
// the latter.
void Writer::take_parameters(at::TensorList parameters, const char* where) {
  const MemoryView& view = memory_.view;
  const Schedule& schedule = view.clock.schedule;
  check_parameters(compress_.kind,
                   parameters,
                   view.kv_heads,
                   schedule.ratio,
                   schedule.overlap,
                   view.head_dim,
                   view.value_dim,
                   k_.device(),
                   where);
  const auto storage = memory_.rings[kWindowKeys].scalar_type();
  bool same = true;
  for (const Tensor& parameter : parameters) same = same && parameter.scalar_type() == storage;
  compress_.wide_parameters = !same;
  const auto type = same ? storage : arithmetic_type(storage);
  for (size_t i = 0; i < parameters.size(); ++i) {
    kept_.push_back(parameters[i].to(type).contiguous());
    compress_.parameters[i] = kept_.back().const_data_ptr();
  }
}

void Writer::take_slots(const PlanRows& plan, at::TensorList slots, const char* where) {
  CTX_CHECK_VALUE(slots.size() == 2 || slots.size() == 3,
                  where,
                  "slots must be keys, values and perhaps mass for the compressor \"custom\", got ",
                  slots.size());
  const MemoryView& view = memory_.view;
  const int64_t batch = view.batch, heads = view.kv_heads, groups = plan.groups();
  const Dim b{"B", batch}, h{"Hkv", heads}, g{"G", groups};
  check_shape(where, "slot keys", slots[0], {b, h, g, {"D", view.head_dim}});
  check_shape(where, "slot values", slots[1], {b, h, g, {"Dv", view.value_dim}});
  for (const auto& [x, name] : {std::pair{slots[0], "slot keys"}, {slots[1], "slot values"}})
    check_device(where, name, x, k_.device());
  const auto type = arithmetic_type(memory_.rings[kWindowKeys].scalar_type());
  kept_ = {rows(slots[0].to(type)), rows(slots[1].to(type))};
  compress_.slot_keys = strided(kept_[0]);
  compress_.slot_values = strided(kept_[1]);
  if (slots.size() < 3 || slots[2].dim() != 3) return;
  check_shape(where, "slot mass", slots[2], {b, h, g});
  kept_.push_back(slots[2].to(type).contiguous());
  compress_.given_mass = kept_.back().const_data_ptr();
}

void Writer::report_chosen(const PlanRows& plan, bool reports) {
  const auto integers = k_.options().dtype(at::kLong);
  if (!reports) {
    chosen_ = at::empty({0}, integers), chosen_positions_ = at::empty({0}, integers);
    return;
  }
  const MemoryView& view = memory_.view;
  const Schedule& s = view.clock.schedule;
  chosen_ = at::arange(0, s.tokens_of(plan.groups()), s.ratio, integers)
                .expand({view.batch, view.kv_heads, plan.groups()})
                .contiguous();
  chosen_positions_ = at::zeros_like(chosen_);
  compress_.chosen = chosen_.data_ptr<int64_t>();
  compress_.chosen_positions = chosen_positions_.data_ptr<int64_t>();
}

}  // namespace ctx::ops
