#include "ops/registry.h"

#include <array>

#include "ops/check.h"

namespace ctx::ops {
namespace {

struct Entry {
  std::vector<std::string> variants;
  const Kernels& (*choose)() = nullptr;
};

// A function's local, so that it exists before the first static initialiser that needs it.
Entry& entry(c10::DeviceType type) {
  static std::array<Entry, static_cast<size_t>(c10::COMPILE_TIME_MAX_DEVICE_TYPES)> all;
  return all.at(static_cast<size_t>(type));
}

}  // namespace

void register_kernels(c10::DeviceType type,
                      std::vector<std::string> variants,
                      const Kernels& (*choose)()) {
  entry(type) = {std::move(variants), choose};
}

const Kernels& kernels_for(c10::DeviceType type) {
  const Entry& found = entry(type);
  CTX_CHECK_VALUE(found.choose != nullptr,
                  "ctx",
                  "device must be one that this build has kernels for, got ",
                  c10::DeviceTypeName(type, true));
  return found.choose();
}

bool has_kernels(c10::DeviceType type) { return entry(type).choose != nullptr; }

const std::vector<std::string>& variants_for(c10::DeviceType type) { return entry(type).variants; }

}  // namespace ctx::ops
