// The CPU kernels, built once per instruction set from the same sources: each set is its own
// namespace with one table.
//
// The best set this machine has is used, or the one that the environment variable
// CTX_CPU_CAPABILITY (default | avx2 | avx512) names; it is read once, at the first use, and
// refused with a ValueError if it is not compiled or not supported.
#pragma once

#include "ops/kernels.h"

namespace ctx::cpu {

namespace DEFAULT {
extern const Kernels kTable;
}
namespace AVX2 {
extern const Kernels kTable;
}
namespace AVX512 {
extern const Kernels kTable;
}

}  // namespace ctx::cpu
