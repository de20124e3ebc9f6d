// The options of a layer, checked once for the layer and for a model's configuration.
#pragma once

#include "core/attention_calls.h"
#include "ctx/attention_module.h"

namespace ctx {

// Throws what CompressiveAttentionOptions::validate throws; messages begin with `where`.
void check_options(const CompressiveAttentionOptions& options, const char* where);

// What follows from options that have been checked.
LayerLaw law_of(const CompressiveAttentionOptions& options);

// "name must be one of a, b, got c"
void check_one_of(const std::string& value,
                  const char* name,
                  std::initializer_list<const char*> allowed,
                  const char* where);

}  // namespace ctx
