#include "ctx/model_memory.h"

#include <ATen/ATen.h>

#include "core/memory_spec.h"
#include "ops/check.h"
#include "ops/rows.h"

namespace ctx {

using at::Tensor;

ModelMemory::ModelMemory(std::shared_ptr<const MemorySpec> spec, rows::State state)
    : spec_(std::move(spec)), state_(std::move(state)) {}

const rows::State& ModelMemory::tensors() const {
  CTX_CHECK_VALUE(defined(), "ctx.ModelMemory", "memory must be one of a module, got none");
  return state_;
}

const Tensor& ModelMemory::seen() const { return ops::seen_of(tensors()); }

const Tensor& ModelMemory::rewindable() const { return ops::rewindable_of(tensors()); }

int64_t ModelMemory::layers() const { return static_cast<int64_t>(ops::layers_of(tensors())); }

int64_t ModelMemory::nbytes() const {
  int64_t total = 0;
  for (const Tensor& tensor : tensors()) total += static_cast<int64_t>(tensor.nbytes());
  return total;
}

void ModelMemory::reset() {
  rows::reset(seen(), rewindable(), std::nullopt, "ctx.ModelMemory.reset");
}

void ModelMemory::reset(const Tensor& rows) {
  rows::reset(seen(), rewindable(), rows, "ctx.ModelMemory.reset");
}

void ModelMemory::rewind(int64_t tokens) { rewind(at::full_like(seen(), tokens)); }

void ModelMemory::rewind(const Tensor& tokens) {
  rows::rewind(this->tensors(), tokens, "ctx.ModelMemory.rewind");
}

ModelMemory ModelMemory::select(const Tensor& rows) const {
  return {spec_, rows::select(tensors(), rows, "ctx.ModelMemory.select")};
}

ModelMemory ModelMemory::clone() const {
  const ops::Ordinary ordinary;
  rows::State made;
  for (const Tensor& tensor : tensors()) made.push_back(tensor.clone());
  return {spec_, std::move(made)};
}

}  // namespace ctx
