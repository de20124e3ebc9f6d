// Snapshots: what a memory holds, as plain tensors, numbers and names.
//
// On disk a snapshot is a safetensors file (https://github.com/huggingface/safetensors): any
// program reads the tensors by name, and the rest in the metadata, as one JSON object under "ctx":
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
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "ctx/export.h"

namespace ctx {

// Names of the metadata: the JSON; and the CRC-32 of the file (zip's, zlib's), eight hexadecimal
// digits, which count as zeros in it.
inline constexpr const char* kAbout = "ctx";
inline constexpr const char* kChecksum = "ctx.crc32";

// A tensor is tried first: to Python's bindings one of a single integer could be a number as well.
using Snapshot = std::map<std::string, std::variant<at::Tensor, int64_t, double, std::string>>;

// Writes a snapshot whole or not at all: to a file beside `path`, which then takes its place. A
// process that dies meanwhile leaves the old file, and perhaps a `path`.<process>.<number>.part
// beside it, which nothing ever reads. Throws std::system_error where the file cannot be written,
// and ValueError for a number that is not finite or a tensor that has no values.
CTX_API void write_snapshot(const Snapshot& snapshot,
                            const std::string& path,
                            const char* where = "ctx.KVMemory.save");

// Reads what write_snapshot wrote, or torch.save of such a dict (as it was written up to format 1);
// tensors are on the CPU, and what JSON has besides numbers and names comes as its text. Throws
// std::system_error where the file cannot be read, and ValueError, which says why, for a foreign or
// damaged one: no changed byte of a safetensors file goes unnoticed. Messages begin with `where`.
CTX_API Snapshot read_snapshot(const std::string& path, const char* where = "ctx.KVMemory.load");

// The same without a file: the bytes that it would hold.
CTX_API std::vector<char> snapshot_bytes(const Snapshot& snapshot,
                                         const char* where = "ctx::snapshot_bytes");
CTX_API Snapshot snapshot_of_bytes(std::span<const char> bytes,
                                   const char* where = "ctx::snapshot_of_bytes");

// The files of Python's ctx.Memory and of fitted compressors are of the same format, with JSON of
// their own.
struct TensorFile {
  std::map<std::string, std::string> metadata;
  std::map<std::string, at::Tensor> tensors;
};

// The bytes of a safetensors file, with a checksum; and what is in one, whoever wrote it: where
// kChecksum is among the metadata, it has been found right. Throw ValueError.
CTX_API std::vector<char> tensor_file_bytes(const TensorFile& file,
                                            const char* where = "ctx::tensor_file_bytes");
CTX_API TensorFile tensor_file_of_bytes(std::span<const char> bytes,
                                        const char* where = "ctx::tensor_file_of_bytes");

}  // namespace ctx
