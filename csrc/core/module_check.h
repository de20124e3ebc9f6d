// What a call of a layer or a model may be given, checked before anything is written; and empty
// memories.
#pragma once

#include <ATen/ATen.h>

#include <memory>
#include <optional>

#include "core/module_call.h"
#include "ctx/attention_module.h"

namespace ctx {

// Raises unless x has the dtype of the parameters, where nothing casts it, and their device.
void check_floating_input(const at::Tensor& x, const at::Tensor& parameter, const char* where);

// The call that continues streams of a memory of `spec` by what x [B, T, ...] holds. Raises where an
// argument does not fit; `name` is x's.
ModuleCall checked_call(const std::shared_ptr<const MemorySpec>& spec,
                        const at::Tensor& x,
                        const char* name,
                        const ModelMemory& memory,
                        const CallOptions& said,
                        const char* where);

ModelMemory empty_memory(const std::shared_ptr<const MemorySpec>& spec,
                         int64_t batch_size,
                         at::ScalarType dtype,
                         std::optional<at::ScalarType> compressed_dtype,
                         at::Device device,
                         const char* where);

}  // namespace ctx
