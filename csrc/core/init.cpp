#include "ctx/ctx.h"
#include "ops/registry.h"

namespace ctx {

std::vector<std::string> cpu_capabilities() { return ops::variants_for(c10::DeviceType::CPU); }

std::string cpu_capability() { return ops::kernels_for(c10::DeviceType::CPU).name; }

void init() {}

}  // namespace ctx
