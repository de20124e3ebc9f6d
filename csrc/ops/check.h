// The grammar of messages: *where: what must be, got what*. Check once, at the boundary; behind it,
// assume.
#pragma once

#include <c10/util/Exception.h>

// `where` is the public name that the user called, e.g. "ctx.KVMemory.step".
#define CTX_CHECK_VALUE(condition, where, ...) \
  TORCH_CHECK_VALUE(condition, where, ": ", __VA_ARGS__)
#define CTX_CHECK_TYPE(condition, where, ...) TORCH_CHECK_TYPE(condition, where, ": ", __VA_ARGS__)
#define CTX_CHECK_INDEX(condition, where, ...) \
  TORCH_CHECK_INDEX(condition, where, ": ", __VA_ARGS__)
