// What a memory of modules was made with: the settings that decide what is stored and how it is read,
// and the geometry of its tensors. Python's is ctx/spec.py.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "ctx/rows.h"
#include "ctx/settings.h"

namespace ctx {

struct LayerSpec {
  LayerShape shape;
  // Every setting by its name, in words: compared, and named in messages.
  std::vector<std::pair<std::string, std::string>> settings;
};

struct MemorySpec {
  std::vector<LayerSpec> layers;
};

// `position` is the scheme's name, which settings without their tensors do not know.
LayerSpec layer_spec(const LayerShape& shape,
                     const AttentionSettings& resolved,
                     const std::string& position,
                     const std::string& compressor);

// Throws ValueError naming the settings that differ, unless a memory made with `held` is one of
// `wanted`.
void check_spec(const MemorySpec& wanted, const MemorySpec& held, const char* where);

}  // namespace ctx
