// State dicts as Python's torch.save writes them.
#pragma once

#include <ATen/core/ivalue.h>

#include <vector>

namespace ctx {

// What an archive of torch.save holds. Throws c10::Error for anything else, or a damaged one.
c10::IValue read_pickle(const std::vector<char>& bytes);

}  // namespace ctx
