// ModelMemory: the memory of a layer, or of all layers of a model, as modules take and return it.
//
// It is Python's ctx.Memory: the rings of every layer (rows.h) on one clock, and what they were made
// with. A module takes a memory of its own settings and sizes, and refuses another by name.
//
// A handle, as at::Tensor is: copies share the tensors, clone() does not. Without grad a module
// streams into the tensors of the memory that it is given; under grad it leaves them as they are, and
// returns another memory. A default-constructed one is no memory: every row begins a new stream.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "ctx/export.h"
#include "ctx/rows.h"

namespace ctx {

// What a memory was made with; modules make it.
struct MemorySpec;

class CTX_API ModelMemory {
 public:
  // No memory.
  ModelMemory() = default;

  // Made by modules: of init_memory(), and of a call.
  ModelMemory(std::shared_ptr<const MemorySpec> spec, rows::State state);

  // Whether it is one. The functions below are for those that are, and throw ValueError otherwise.
  bool defined() const { return spec_ != nullptr; }

  // Tokens that each row has seen, and how many of them can be taken back, int64 [B]. They alias the
  // memory's own.
  const at::Tensor& seen() const;
  const at::Tensor& rewindable() const;

  // The nine rings of every layer, in the order of KVMemory::tensors(), and last the clock. They alias
  // the memory; whoever writes to them breaks it.
  const rows::State& tensors() const;

  int64_t layers() const;
  int64_t batch_size() const { return seen().size(0); }

  // Bytes of all tensors. Constant.
  int64_t nbytes() const;

  // Every row begins a new stream, or those rows do: int64 [N], or bool [B]; in place. Throws
  // IndexError for a row that is not there.
  void reset();
  void reset(const at::Tensor& rows);

  // Takes back the last tokens of every row, as if they had not come: `tokens` of each, or int64 [B];
  // in place. Refused with a ValueError beyond rewindable(), and where the compressor chooses by usage.
  void rewind(int64_t tokens);
  void rewind(const at::Tensor& tokens);

  // A new memory of these rows in this order: int64 [N], repeats allowed, or bool [B].
  ModelMemory select(const at::Tensor& rows) const;

  // A new memory that holds the same.
  ModelMemory clone() const;

  // What it was made with; null where it is no memory. Opaque outside of the library.
  const std::shared_ptr<const MemorySpec>& spec() const { return spec_; }

 private:
  std::shared_ptr<const MemorySpec> spec_;
  rows::State state_;
};

}  // namespace ctx
