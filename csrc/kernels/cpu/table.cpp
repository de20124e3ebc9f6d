#include "kernels/cpu/table.h"

#include "kernels/cpu/capability.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

namespace {

void write(const AppendArgs& pairs, const CompressArgs& groups) {
  append(pairs);
  compress(groups);
}

}  // namespace

#define CTX_STRING(x) #x
#define CTX_NAME(x) CTX_STRING(x)

const Kernels kTable = {CTX_NAME(CTX_CPU_CAPABILITY),
                        /*host_reads=*/true,
                        &plan,
                        &advance,
                        &rotate,
                        &write,
                        &attend,
                        &spans_forward,
                        &spans_backward};

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
