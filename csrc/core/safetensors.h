// Safetensors files (https://github.com/huggingface/safetensors#format): a header in JSON that says
// where in the data each tensor lies, and the data. The reader trusts nothing that it finds.
#pragma once

#include <span>
#include <vector>

#include "ctx/snapshot.h"

namespace ctx::safetensors {

// The bytes of a file, with the metadata of kChecksum. Throws std::invalid_argument.
std::vector<char> encode(const TensorFile& file);

// What encode() or another writer of this format wrote; tensors are on the CPU. Throws
// std::invalid_argument for anything else, and for a checksum that is not that of the bytes.
TensorFile decode(std::span<const char> bytes);

}  // namespace ctx::safetensors
