// Settings as operators take them.
#pragma once

#include <string>

#include "ctx/settings.h"
#include "ops/settings.h"

namespace ctx {

// Of settings that are resolved.
ops::PackedSettings pack(const AttentionSettings& settings, const std::string& compressor);

}  // namespace ctx
