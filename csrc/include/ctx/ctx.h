// Everything that libctx offers to C++ programs, but for its modules (modules.h).
#pragma once

#include <string>
#include <vector>

#include "ctx/attention.h"
#include "ctx/compressor.h"
#include "ctx/export.h"
#include "ctx/memory.h"
#include "ctx/rows.h"
#include "ctx/schedule.h"
#include "ctx/session.h"
#include "ctx/settings.h"
#include "ctx/snapshot.h"
#include "ctx/version.h"

namespace ctx {

// Instruction sets that the CPU kernels were built for, and the one in use: the best of this
// machine, or what the environment variable CTX_CPU_CAPABILITY names (ValueError if it cannot be
// had).
CTX_API std::vector<std::string> cpu_capabilities();
CTX_API std::string cpu_capability();

// Does nothing; a program that uses libctx only for the operators it registers (torch.ops.ctx,
// exported graphs) calls this once, so that the linker keeps the library.
CTX_API void init();

}  // namespace ctx
