// The rings of one memory as kernels take them, checked.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "ops/registry.h"
#include "ops/settings.h"
#include "ops/state.h"

namespace ctx::ops {

struct Memory {
  std::vector<at::Tensor> rings;
  Settings settings;
  MemoryView view;
  int64_t max_rewind;

  // For calls of `batch` rows; -1: of all its rows. Throws ValueError or TypeError unless the tensors
  // are a memory of these settings.
  Memory(at::TensorList tensors, const Settings& settings, const char* where, int64_t batch = -1);

  int64_t rows() const { return rings[kWindowKeys].size(0); }

  // What a call brings. A view of the memory's own rings would change while it is read.
  at::Tensor apart(const at::Tensor& x) const;

  const Kernels& kernels() const { return kernels_for(rings[kWindowKeys].device().type()); }
};

}  // namespace ctx::ops
