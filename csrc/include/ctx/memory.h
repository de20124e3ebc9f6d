// KVMemory: a bounded key/value memory for streams that may run for ever.
//
// Recent pairs are kept exactly in a ring; what leaves it is compressed, c pairs into one, into a
// second ring. One integer per row, `seen`, is the whole bookkeeping (schedule.h): nothing is ever
// moved or concatenated, and however a stream is cut into calls, it gives the same numbers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "ctx/attention.h"
#include "ctx/compressor.h"
#include "ctx/export.h"
#include "ctx/rows.h"
#include "ctx/schedule.h"
#include "ctx/snapshot.h"

namespace ctx {

struct MemoryOptions {
  AttentionSettings attention;
  int64_t batch_size = 1;
  int64_t kv_heads = 1;
  int64_t head_dim = 64;
  int64_t value_dim = 0;  // 0: head_dim
  Compressor compressor;
  std::optional<at::Tensor> compressed_bias;  // [H] or [1], added to the scores of compressed slots
  // Tokens that can be written before the first of them attends: longer calls are walked in blocks
  // of this many.
  int64_t max_rewind = 64;
  at::ScalarType dtype = at::kFloat;  // float32, float64, bfloat16 or float16; arithmetic is
                                      // float32 (float64 for float64)
  at::Device device = at::kCPU;
  // What compressed slots are stored as; absent: dtype. float32, bfloat16, float16, or int8: a row
  // is multiples of a 127th of its largest number, with that scale (float32, 4 bytes) behind it. A
  // float64 memory has float64 slots.
  std::optional<at::ScalarType> compressed_dtype = std::nullopt;

  at::ScalarType slot_dtype() const { return compressed_dtype.value_or(dtype); }

  // Throws ValueError or TypeError naming the first setting that is out of range.
  CTX_API void validate() const;
};

class CTX_API KVMemory {
 public:
  using Tensors = rows::State;

  // Allocates everything it will ever hold, zeroed. Throws what MemoryOptions::validate throws.
  explicit KVMemory(MemoryOptions options);

  // Not copyable: copies would alias the rings; clone() makes one that does not.
  KVMemory(const KVMemory&) = delete;
  KVMemory& operator=(const KVMemory&) = delete;
  KVMemory(KVMemory&&) = default;
  KVMemory& operator=(KVMemory&&) = default;

  // Appends T tokens to every row and returns what each query attends to. One operator call.
  //
  //   q [B, H, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], un-rotated; dtype and device of the
  //     memory, any strides
  //   lengths   int64 [B], 0 <= length <= T: row b brings its first lengths[b] tokens only, the
  //             rest
  //     is padding that nothing sees or counts; absent: all T
  //   reset_at  bool [B, T]: true where a token is the first of a new stream, which sees nothing of
  //     what its row held before; absent: nowhere
  //   returns [B, H, T, Dv], a fresh tensor; zero at padding
  //
  // Records no gradient. Throws ValueError or TypeError before anything is written. Not safe to
  // call from two threads on one object; different objects are independent.
  at::Tensor step(const at::Tensor& q,
                  const at::Tensor& k,
                  const at::Tensor& v,
                  const std::optional<at::Tensor>& lengths = std::nullopt,
                  const std::optional<at::Tensor>& reset_at = std::nullopt);

  // As step, and the weight that each query gives to sinks, compressed slots and window,
  // [B, H, T, 3] in float32 (float64 for float64), which add up to one; zero at padding.
  std::tuple<at::Tensor, at::Tensor> step_with_region_weights(
      const at::Tensor& q,
      const at::Tensor& k,
      const at::Tensor& v,
      const std::optional<at::Tensor>& lengths = std::nullopt,
      const std::optional<at::Tensor>& reset_at = std::nullopt);

  // The first half of step: appends, evicts and compresses. Refused with a ValueError where the
  // compressor chooses by usage, which needs the queries.
  void append(const at::Tensor& k,
              const at::Tensor& v,
              const std::optional<at::Tensor>& lengths = std::nullopt,
              const std::optional<at::Tensor>& reset_at = std::nullopt);

  // The second half: q [B, H, T, D] are the queries of the last T tokens of every row, T at most
  // rewindable() of each. Returns [B, H, T, Dv]. Writes nothing, and does not count as usage.
  at::Tensor attend(const at::Tensor& q) const;

  // As attend, and the weights of the regions as step_with_region_weights gives them.
  std::tuple<at::Tensor, at::Tensor> attend_with_region_weights(const at::Tensor& q) const;

  // Every row begins a new stream, or those rows do: int64 [N] in 0 ... B - 1, or bool [B]. Throws
  // IndexError for a row that is not there.
  void reset();
  void reset(const at::Tensor& rows);

  // Takes back the last tokens of every row, as if they had not come: `tokens` of each, or int64
  // [B]. Exact, and refused with a ValueError beyond rewindable(), which is the max_rewind once a
  // stream is that long, and where the compressor chooses by usage, which cannot be taken back.
  void rewind(int64_t tokens);
  void rewind(const at::Tensor& tokens);

  // A new memory of these rows of this one, in this order: int64 [N], repeats allowed, or bool [B].
  KVMemory select(const at::Tensor& rows) const;

  // A new memory of the rows of several, one after the other. Throws ValueError naming the first
  // setting in which two of them differ.
  static KVMemory merge(const std::vector<const KVMemory*>& memories);

  // A new memory that holds the same, in the same or another dtype and on the same or another
  // device; slots whose dtype was chosen keep it, but in a float64 memory. The compressor's
  // parameters and what scores are made of are shared as long as they need not move.
  KVMemory clone() const;
  KVMemory to(at::ScalarType dtype, at::Device device) const;

  // What the memory holds (snapshot.h). The tensors of state_dict alias the memory. load_state_dict
  // and load copy from any floating dtype and any device; they throw ValueError or TypeError before
  // anything is written, naming the setting, where the snapshot is of another geometry, format or
  // version.
  Snapshot state_dict() const;
  void load_state_dict(const Snapshot& snapshot);
  void save(const std::string& path) const { write_snapshot(state_dict(), path); }
  void load(const std::string& path) { load_state_dict(read_snapshot(path)); }

  // Tokens that each row has seen, int64 [B]: the whole bookkeeping. Aliases the memory's own
  // tensor.
  const at::Tensor& seen() const { return tensors_[9]; }

  // How many of them can be taken back, int64 [B]. Aliases the memory's own tensor.
  const at::Tensor& rewindable() const { return tensors_[10]; }

  // window keys [B, Hkv, Wcap, D] and values [.., Dv], compressed keys [B, Hkv, Ccap, D] (int8: D
  // + 4) and values, sink keys [B, Hkv, A, D] and values; empty unless the compressor chooses by
  // attention received, that of each token [B, Hkv, Wcap] and the token that each slot is [B, Hkv,
  // Ccap]; empty unless slots have a mass, that [B, Hkv, Ccap]; and seen [B], rewindable [B]. They
  // alias the memory: operators of `torch.ops.ctx` work on the first nine, the rings, directly.
  const Tensors& tensors() const { return tensors_; }

  // Bytes of all tensors. Constant.
  int64_t nbytes() const;

  const MemoryOptions& options() const { return options_; }

  // Other parameters for the slots made from now on; the same compressor and overlap. Throws what
  // MemoryOptions::validate throws.
  void set_parameters(std::vector<at::Tensor> parameters);

  // Other tensors for the relative positions of a memory that has them. Throws what
  // MemoryOptions::validate throws.
  void set_relative(std::vector<at::Tensor> relative);

  // Another compressed_bias from now on; none: no bias. Throws what MemoryOptions::validate throws.
  void set_compressed_bias(std::optional<at::Tensor> bias);

 private:
  friend class Session;  // whose layers are memories on one clock

  KVMemory(MemoryOptions options, Tensors tensors);
  void take_state(const Snapshot& snapshot, const char* where);
  at::TensorList rings() const { return at::TensorList(tensors_.data(), 9); }
  at::Tensor plan(const at::Tensor& k,
                  const std::optional<at::Tensor>& lengths,
                  const std::optional<at::Tensor>& reset_at) const;
  std::tuple<at::Tensor, at::Tensor> stepped(const at::Tensor& q,
                                             const at::Tensor& k,
                                             const at::Tensor& v,
                                             const std::optional<at::Tensor>& lengths,
                                             const std::optional<at::Tensor>& reset_at,
                                             bool with_region_weights);
  std::tuple<at::Tensor, at::Tensor> attended(const at::Tensor& q, bool with_region_weights) const;
  std::vector<at::Tensor> operands(const at::Tensor& k,
                                   const at::Tensor& v,
                                   const at::Tensor& plan) const;

  MemoryOptions options_;
  Tensors tensors_;
};

}  // namespace ctx
