#include "core/module_call.h"

#include <ATen/core/grad_mode.h>

#include "ctx/rows.h"
#include "ops/plan.h"
#include "ops/rows.h"

namespace ctx {

using at::Tensor;

ModuleCall::ModuleCall(const ModelMemory& memory,
                       Tokens tokens,
                       int64_t max_rewind,
                       bool counts_attention,
                       bool update)
    : memory_(memory),
      tokens_(std::move(tokens)),
      max_rewind_(max_rewind),
      counts_attention_(counts_attention),
      update_(update),
      carried_(memory.defined()),
      in_place_(update && carried_ && !at::GradMode::is_enabled()) {
  if (carried_) {
    seen_ = memory.seen(), rewindable_ = memory.rewindable();
    return;
  }
  const ops::Ordinary ordinary;
  const auto counts = at::TensorOptions(at::kLong).device(tokens_.device);
  seen_ = at::zeros({tokens_.rows}, counts), rewindable_ = at::zeros({tokens_.rows}, counts);
}

const Tensor& ModuleCall::plan(const ops::PackedSettings& settings) {
  Tensor& plan = plans_[settings.settings];
  if (!plan.defined()) {
    plan = ops::plan(
        seen_, tokens_.lengths, tokens_.reset_at, tokens_.tokens, settings.settings, carried_);
  }
  return plan;
}

std::pair<Tensor, Tensor> ModuleCall::ends(const Tensor& plan) const {
  const at::NoGradGuard no_grad;
  const ops::Ordinary ordinary;
  std::pair<Tensor, Tensor> after(seen_.clone(), rewindable_.clone());
  ops::advance_(after.first, after.second, plan, max_rewind_);
  return after;
}

void ModuleCall::begin() {
  if (begun_ || !in_place_) return;
  begun_ = true;
  const ops::Writing writing(rewindable_);
  const bool plain = !tokens_.lengths && !tokens_.reset_at && !counts_attention_;
  if (plain && tokens_.tokens <= max_rewind_) {
    rewindable_.clamp_max_(max_rewind_ - tokens_.tokens);
    return;
  }
  after_ = ends(plans_.begin()->second);
  const Tensor count =
      tokens_.lengths ? *tokens_.lengths : at::full_like(rewindable_, tokens_.tokens);
  Tensor opened = count > max_rewind_;
  if (counts_attention_) opened = opened | (count > 0);
  if (tokens_.reset_at) opened = opened | tokens_.reset_at->any(1);
  const Tensor left = at::minimum(rewindable_, max_rewind_ - count);
  rewindable_.copy_(at::where(opened, at::full_like(left, rows::kOpen), left));
}

ModelMemory ModuleCall::finish(const std::shared_ptr<const MemorySpec>& spec,
                               std::vector<Tensor> rings,
                               const ops::PackedSettings& settings) {
  if (!update_) return memory_;
  if (!in_place_) {
    auto [seen, rewindable] = ends(plan(settings));
    rings.insert(rings.end(), {seen, rewindable});
    return {spec, std::move(rings)};
  }
  const ops::Writing writing(seen_);
  if (after_) {
    seen_.copy_(after_->first);
    rewindable_.copy_(after_->second);
  } else {
    ops::advance_(seen_, rewindable_, plan(settings), max_rewind_);
  }
  return memory_;
}

}  // namespace ctx
