#include "core/huge_pages.h"

#include <ATen/ATen.h>

#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace ctx {

at::Tensor in_huge_pages(const at::Tensor& x) {
  at::Tensor made = at::empty_like(x);
#ifdef __linux__
  constexpr uintptr_t page = uintptr_t{2} << 20;
  if (made.is_cpu() && made.nbytes() >= 2 * page) {
    const auto begin = reinterpret_cast<uintptr_t>(made.data_ptr());
    const uintptr_t first = (begin + page - 1) / page * page;
    const uintptr_t end = (begin + made.nbytes()) / page * page;
    // Before it is first written; a kernel that cannot says so, which is no error here.
    if (end > first) madvise(reinterpret_cast<void*>(first), end - first, MADV_HUGEPAGE);
  }
#endif
  return made.copy_(x);
}

}  // namespace ctx
