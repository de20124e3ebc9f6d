// Which kernels serve which device. Kernel libraries enter themselves; operators look them up.
#pragma once

#include <c10/core/Device.h>

#include <string>
#include <vector>

#include "ctx/export.h"
#include "ops/kernels.h"

namespace ctx::ops {

// `choose` picks a table at the first use, out of the variants that were compiled. Call it once per
// device type, from a static initialiser. Exported for kernels in libraries of their own; not part of
// the API.
CTX_API void register_kernels(c10::DeviceType type,
                              std::vector<std::string> variants,
                              const Kernels& (*choose)());

// Throws ValueError for a device that this build has no kernels for.
const Kernels& kernels_for(c10::DeviceType type);

bool has_kernels(c10::DeviceType type);

// What was compiled for a device; empty for one that this build has no kernels for.
const std::vector<std::string>& variants_for(c10::DeviceType type);

}  // namespace ctx::ops
