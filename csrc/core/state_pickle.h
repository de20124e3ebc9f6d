// State dicts as Python's torch.save writes them.
#pragma once

#include <vector>

#include "ctx/weights.h"

namespace ctx {

// The tensors of an archive that torch.save wrote of a dict; of a dict with the entry "weights", those
// of that. Throws c10::Error for anything else, or a damaged one.
StateDict read_state_pickle(const std::vector<char>& bytes);

// The archive that torch.save would write of a dict of these tensors.
std::vector<char> state_pickle(const StateDict& state);

}  // namespace ctx
