// What writes a call's pairs into a memory, and makes the slots that fall due.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "core/check.h"
#include "ops/walk.h"

namespace ctx::ops {

// The pairs of one call, kept alive and laid out for the kernels.
class Writer {
 public:
  Writer(const Memory& memory,
         const at::Tensor& k,
         const at::Tensor& v,
         at::TensorList parameters,
         c10::string_view compressor,
         at::TensorList slots,
         bool resets,
         const char* where)
      : memory_(memory), k_(rows(memory.apart(k))), v_(rows(memory.apart(v))) {
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
                    memory.state[kAttentionReceived].sizes());
    if (compress_.kind == CompressorKind::kGiven || !slots.empty())
      take_slots(slots, resets, where);
    append_.memory = compress_.memory = view;
    append_.keys = strided(k_);
    append_.values = strided(v_);
    // Parameters may be stored as the memory is, or as the arithmetic is; anything else is
    // converted to the latter.
    const auto storage = memory.state[kWindowKeys].scalar_type();
    bool same = true;
    for (const at::Tensor& parameter : parameters)
      same = same && parameter.scalar_type() == storage;
    compress_.wide_parameters = !same;
    const auto type = same ? storage : arithmetic_type(storage);
    for (size_t i = 0; i < parameters.size(); ++i) {
      parameters_.push_back(parameters[i].to(type).contiguous());
      compress_.parameters[i] = parameters_.back().const_data_ptr();
    }
  }

  // Reports which tokens became the slots of `chosen` and `positions`, [B, Hkv, slots], of which
  // the first is that of block[b] (group_block).
  void report(const at::Tensor& chosen,
              const at::Tensor& positions,
              const at::Tensor& block,
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
    const auto check = [&](const at::Tensor& x, const char* name, std::vector<int64_t> sizes) {
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
  std::vector<at::Tensor> slots_;
  at::Tensor k_;
  at::Tensor v_;
  std::vector<at::Tensor> parameters_;
  AppendArgs append_;
  CompressArgs compress_;
};

}  // namespace ctx::ops
