// Settings as operators take them.
#pragma once

#include <string>

#include "ctx/settings.h"
#include "ops/settings.h"

namespace ctx {

// Of settings that are resolved.
ops::PackedSettings pack(const AttentionSettings& settings, const std::string& compressor);

// ValueError unless least <= size <= Schedule::kLimit.
void check_size(const char* where, const char* name, int64_t size, int64_t least = 1);

}  // namespace ctx
