#include "kernels/cpu/capability.h"

#include <algorithm>
#include <cctype>
#include <cstdlib>
#include <string>
#include <vector>

#include "ops/check.h"
#include "ops/registry.h"

namespace ctx::cpu {
namespace {

struct Variant {
  const Kernels* table;
  bool supported;
};

// Worst first.
const std::vector<Variant>& variants() {
  static const std::vector<Variant> all = {
      {&DEFAULT::kTable, true},
#if defined(CTX_CPU_HAVE_AVX2)
      {&AVX2::kTable,
       __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
           __builtin_cpu_supports("f16c")},
#endif
#if defined(CTX_CPU_HAVE_AVX512)
      {&AVX512::kTable,
       __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")},
#endif
  };
  return all;
}

std::vector<std::string> names() {
  std::vector<std::string> all;
  for (const Variant& variant : variants()) all.emplace_back(variant.table->name);
  return all;
}

const Kernels& choose() {
  const char* asked = std::getenv("CTX_CPU_CAPABILITY");
  if (asked == nullptr || *asked == '\0') {
    return *std::find_if(variants().rbegin(), variants().rend(), [](const Variant& v) {
              return v.supported;
            })->table;
  }
  std::string name = asked;
  std::transform(
      name.begin(), name.end(), name.begin(), [](unsigned char ch) { return std::toupper(ch); });
  for (const Variant& variant : variants()) {
    if (name != variant.table->name) continue;
    CTX_CHECK_VALUE(variant.supported,
                    "CTX_CPU_CAPABILITY",
                    "must be an instruction set of this processor, got ",
                    asked);
    return *variant.table;
  }
  std::string known;
  for (const std::string& one : names()) known += (known.empty() ? "" : ", ") + one;
  CTX_CHECK_VALUE(false, "CTX_CPU_CAPABILITY", "must be one of ", known, ", got ", asked);
}

const Kernels& chosen() {
  static const Kernels& table = choose();
  return table;
}

[[maybe_unused]] const bool registered =
    (ops::register_kernels(c10::DeviceType::CPU, names(), &chosen), true);

}  // namespace
}  // namespace ctx::cpu
