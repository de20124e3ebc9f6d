// One call of a layer or of a model: its plans, which all layers share, and the clock that it moves.
// Python's is ctx/engine.py.
#pragma once

#include <ATen/ATen.h>

#include <map>
#include <optional>
#include <utility>
#include <vector>

#include "ctx/model_memory.h"
#include "ops/settings.h"

namespace ctx {

class ModuleCall {
 public:
  // What the call brings: T tokens in B rows, on a device, right-padded.
  struct Tokens {
    int64_t rows;
    int64_t tokens;
    at::Device device;
    std::optional<at::Tensor> lengths;   // int64 [B]
    std::optional<at::Tensor> reset_at;  // bool [B, T]
  };

  // Arguments have been checked. `counts_attention`: whether some layer chooses slots by it.
  ModuleCall(const ModelMemory& memory,
             Tokens tokens,
             int64_t max_rewind,
             bool counts_attention,
             bool update);

  const Tokens& tokens() const { return tokens_; }
  // Whether there is a memory.
  bool carried() const { return carried_; }
  // Whether the tokens are remembered, and whether that is in the memory that was given.
  bool update() const { return update_; }
  bool in_place() const { return in_place_; }

  // The plan of a layer of these settings.
  const at::Tensor& plan(const ops::PackedSettings& settings);

  // Before a ring of the given memory is written, of whichever layer: says in the clock what an
  // interrupted call would leave. Entries that could be rewound to are going to be overwritten, so
  // `rewindable` is lowered; rows in which visible entries are going to be, become open.
  void begin();

  // What the call leaves when every layer has written `rings`: the memory that was given with its
  // clock advanced, or a new one.
  ModelMemory finish(const std::shared_ptr<const MemorySpec>& spec,
                     std::vector<at::Tensor> rings,
                     const ops::PackedSettings& settings);

 private:
  std::pair<at::Tensor, at::Tensor> ends(const at::Tensor& plan) const;

  ModelMemory memory_;
  Tokens tokens_;
  at::Tensor seen_, rewindable_;
  int64_t max_rewind_;
  bool counts_attention_;
  bool update_;
  bool carried_;
  bool in_place_;
  bool begun_ = false;
  std::map<std::vector<int64_t>, at::Tensor> plans_;  // most models have one law
  // seen and rewindable after the call where begin() had to work them out.
  std::optional<std::pair<at::Tensor, at::Tensor>> after_;
};

}  // namespace ctx
