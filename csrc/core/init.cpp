#include <torch/version.h>

#include "ctx/ctx.h"
#include "ops/registry.h"

namespace ctx {

std::vector<std::string> cpu_capabilities() { return ops::variants_for(c10::DeviceType::CPU); }

std::string cpu_capability() { return ops::kernels_for(c10::DeviceType::CPU).name; }

std::string version() {
  return std::to_string(CTX_VERSION_MAJOR) + "." + std::to_string(CTX_VERSION_MINOR) + "." +
         std::to_string(CTX_VERSION_PATCH);
}

std::string torch_version() { return TORCH_VERSION; }

void init() {}

}  // namespace ctx
