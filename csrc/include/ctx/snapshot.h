// Snapshots: what a memory holds, as plain tensors, numbers and names.
//
// On disk a snapshot is the archive that torch.save writes of a dict, so Python reads it with
// torch.load(path, weights_only=True) and C++ programs without libctx with torch::pickle_load.
//
//   "format"        "ctx.KVMemory"
//   "version"       2
//   geometry        batch_size, kv_heads, head_dim, value_dim, window, compressed, ratio, segment,
//                   sinks, overlap, max_rewind, position, rotary_dim, rotary_base,
//                   rotary_interleaved (0 or 1), inv_freq (float64 [rotary_dim / 2]),
//                   attention_factor, keys ("plain" or "rotated"), mass ("none" or "slots"),
//                   distance, compressor
//   tensors         window_keys ... rewindable, as KVMemory::tensors() orders them
//
// The scale, the cap of scores, the compressed bias, ALiBi's slopes, the tensors of relative positions and the
// compressor's parameters belong to the model: a snapshot does not hold them.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>
#include <variant>
#include <vector>

#include "ctx/export.h"

namespace ctx {

// A tensor is tried first: to Python's bindings one of a single integer could be a number as well.
using Snapshot = std::map<std::string, std::variant<at::Tensor, int64_t, double, std::string>>;

// Writes a snapshot whole or not at all: to a file beside `path`, which then takes its place. A
// process that dies meanwhile leaves the old file, and perhaps a `path`.<process>.<number>.part
// beside it, which nothing ever reads. Throws std::system_error where the file cannot be written.
CTX_API void write_snapshot(const Snapshot& snapshot,
                            const std::string& path,
                            const char* where = "ctx.KVMemory.save");

// Reads what write_snapshot or Python's torch.save wrote; tensors are on the CPU. Throws
// std::system_error where the file cannot be read, and ValueError for a foreign or damaged one:
// every checksum of the archive is looked at. Messages begin with `where`.
CTX_API Snapshot read_snapshot(const std::string& path, const char* where = "ctx.KVMemory.load");

// The same without a file: the bytes that it would hold.
CTX_API std::vector<char> snapshot_bytes(const Snapshot& snapshot);
CTX_API Snapshot snapshot_of_bytes(const std::vector<char>& bytes, const char* where);

}  // namespace ctx
