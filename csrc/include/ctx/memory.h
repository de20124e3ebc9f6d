// KVMemory: a bounded key/value memory for streams that may run for ever.
//
// Recent pairs are kept exactly in a ring; what leaves it is compressed, c pairs into one, into a
// second ring. One integer per row, `seen`, is the whole bookkeeping (schedule.h): nothing is ever
// moved or concatenated, and however a stream is cut into calls, it gives the same numbers.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <array>
#include <optional>

#include "ctx/attention.h"
#include "ctx/compressor.h"
#include "ctx/export.h"
#include "ctx/schedule.h"

namespace ctx {

struct MemoryOptions {
  AttentionOptions attention;
  int64_t batch_size = 1;
  int64_t kv_heads = 1;
  int64_t head_dim = 64;
  int64_t value_dim = 0;  // 0: head_dim
  Compressor compressor;
  std::optional<at::Tensor> compressed_bias;  // [H] or [1], added to the scores of compressed slots
  // Tokens that can be written before the first of them attends: longer calls are walked in blocks
  // of this many.
  int64_t headroom = 64;
  at::ScalarType dtype = at::kFloat;  // float32, float64, bfloat16 or float16; arithmetic is
                                      // float32 (float64 for float64)
  at::Device device = at::kCPU;

  // Throws ValueError or TypeError naming the first setting that is out of range.
  CTX_API void validate() const;
};

class CTX_API KVMemory {
 public:
  // Allocates everything it will ever hold, zeroed. Throws what MemoryOptions::validate throws.
  explicit KVMemory(MemoryOptions options);

  // Appends T tokens to every row and returns what each query attends to. One operator call.
  //
  //   q [B, H, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv], un-rotated; dtype and device of the
  //   memory, any strides lengths  int64 [B], 0 <= length <= T: row b brings its first lengths[b]
  //   tokens only; absent: all T returns [B, H, T, Dv], a fresh tensor; zero at tokens past a row's
  //   length
  //
  // Records no gradient. Throws ValueError or TypeError before anything is written. Not safe to
  // call from two threads on one object; different objects are independent.
  at::Tensor step(const at::Tensor& q,
                  const at::Tensor& k,
                  const at::Tensor& v,
                  const std::optional<at::Tensor>& lengths = std::nullopt);

  // The first half of step: appends, evicts and compresses.
  void append(const at::Tensor& k,
              const at::Tensor& v,
              const std::optional<at::Tensor>& lengths = std::nullopt);

  // The second half: q [B, H, T, D] are the queries of the last T tokens of every row, T <=
  // headroom and T <= seen. Returns [B, H, T, Dv]. Writes nothing.
  at::Tensor attend(const at::Tensor& q) const;

  // Every row begins a new stream.
  void reset();

  // Tokens that each row has seen, int64 [B]; aliases the memory's own tensor.
  const at::Tensor& seen() const { return tensors_[6]; }

  // window keys [B, Hkv, Wcap, D] and values [.., Dv], compressed keys [B, Hkv, Ccap, D] and
  // values, sink keys [B, Hkv, A, D] and values, seen [B]. They alias the memory: operators of
  // `torch.ops.ctx` work on them directly.
  const std::array<at::Tensor, 7>& tensors() const { return tensors_; }

  // Bytes of all tensors. Constant.
  int64_t nbytes() const;

  const MemoryOptions& options() const { return options_; }

 private:
  MemoryOptions options_;
  std::array<at::Tensor, 7> tensors_;
};

}  // namespace ctx
