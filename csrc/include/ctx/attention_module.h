// CompressiveAttention: multi-head attention over a compressive memory, as a torch::nn::Module.
//
// It computes what Python's ctx.CompressiveAttention does, and its parameters have the same names in
// the same order, so that weights go from one to the other (weights.h):
//
//   compressed_bias [H]                with compressed_bias "learned"
//   q_proj.weight k_proj.weight v_proj.weight out_proj.weight, and .bias of each with bias
//   compressor.<name>                  compressor.h names them; those without elements are not made
//   relative.key_bias .position_bias .position_weight .compressed_position_bias
//     .compressed_position_weight      with position "relative"
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/modules/linear.h>

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ctx/compressor.h"
#include "ctx/export.h"
#include "ctx/model_memory.h"
#include "ctx/settings.h"

namespace ctx {

// The settings of a layer, by the names of Python's arguments.
struct CompressiveAttentionOptions {
  int64_t embed_dim = 0;                     // E, width of input and output
  int64_t num_heads = 0;                     // H; head_dim is E / H
  std::optional<int64_t> num_kv_heads = {};  // Hkv, a divisor of H; absent: H
  int64_t window = 0;                        // the sizes are those of Schedule (schedule.h)
  int64_t compressed = 0;
  int64_t ratio = 1;
  std::optional<int64_t> segment = {};  // absent: ratio
  int64_t sinks = 0;
  std::string compressor = "conv";                  // a name of compressor.h but "custom"
  std::optional<int64_t> compressor_kernel = {};    // of "conv"; absent: ratio
  std::string memory_content = "kv";                // "hidden" is Python's alone, and refused
  std::string position = "rotary";                  // or "relative", "alibi", "none"
  std::optional<int64_t> relative_dim = {};         // sines and cosines of "relative"; absent: E
  std::string distance = "slot";                    // or "token"
  std::string compressed_bias = "learned";          // per query head; or "log_ratio", "none"
  std::optional<double> compressed_bias_init = {};  // of a learned one; absent: log ratio
                                                    // (with slot_mass 0)
  std::string compressor_grad = "task";             // "aux": slots are constants to the task
  std::optional<std::string> aux_loss = {};         // any is Python's alone, and refused
  double dropout = 0.0;                             // of the output, in training
  bool bias = false;                                // of the four projections
  double rotary_base = 10000.0;
  std::optional<int64_t> rotary_dim = {};  // absent: head_dim
  bool rotary_interleaved = false;
  int64_t max_rewind = 64;
  // What Python takes as a ctx.AttentionSettings; settings.h says what they are.
  std::vector<double> inv_freq = {};
  double attention_factor = 1.0;
  double scale = 0.0;
  bool slot_mass = false;
  double logit_softcap = 0.0;

  // Throws ValueError naming the first setting that is out of range, or that is Python's alone.
  CTX_API void validate() const;
};

// What a call says besides its tokens.
struct CallOptions {
  // int64 [B], 0 <= length <= T: row b is its first lengths[b] tokens, the rest is padding.
  std::optional<at::Tensor> lengths = {};
  // bool [B, T]: true where a token is the first of a new stream.
  std::optional<at::Tensor> reset_at = {};
  // False reads the memory and does not write it: the output is the same, and the memory returned is
  // the one passed, bit for bit as it was.
  bool update = true;
};

struct ModuleOutput {
  at::Tensor output;
  ModelMemory memory;
};

// Parts that are the library's own.
class CompressorModuleImpl;
class RelativeImpl;
class ModuleCall;
struct LayerLaw;
struct LayerScores;

class CTX_API CompressiveAttentionImpl : public torch::nn::Cloneable<CompressiveAttentionImpl> {
 public:
  // First values are Python's, also bit for bit where torch's generator starts alike. Throws what
  // CompressiveAttentionOptions::validate throws.
  explicit CompressiveAttentionImpl(CompressiveAttentionOptions options);

  void reset() override;
  void reset_parameters();

  // Attends from T new tokens of every row to the memory and to themselves, and remembers them.
  //
  //   x        [B, T, E], dtype and device of the parameters
  //   memory   of init_memory() or of an earlier call; none: every row begins a new stream
  //   returns  the output [B, T, E], zero at padding, and the memory after these tokens
  //
  // Where grad is enabled the call is differentiable, compression included: the carried memory is a
  // constant and left as it is (and must not be written to before the call's backward), and a new one
  // is returned. Otherwise the memory passed in is streamed into in place and returned, one for a new
  // stream is made. Both give the same numbers, however a stream is cut into calls.
  //
  // Throws ValueError or TypeError before anything is written. A call without grad that is interrupted
  // leaves the memory as it was, or refused by name where the rings no longer hold that. Not safe to
  // call from two threads on one memory, nor while parameters are written.
  ModuleOutput forward(const at::Tensor& x,
                       const ModelMemory& memory = {},
                       const CallOptions& call = {});

  // An empty memory for so many streams. `dtype` of pairs: absent, that of the parameters;
  // `compressed_dtype` of slots, as in MemoryOptions: absent, that of pairs. On their device.
  ModelMemory init_memory(int64_t batch_size,
                          std::optional<at::ScalarType> dtype = std::nullopt,
                          std::optional<at::ScalarType> compressed_dtype = std::nullopt) const;

  void pretty_print(std::ostream& stream) const override;

  CompressiveAttentionOptions options;  // changes have no effect

  torch::nn::Linear q_proj{nullptr}, k_proj{nullptr}, v_proj{nullptr}, out_proj{nullptr};
  at::Tensor compressed_bias;  // [H] where it is learned, else undefined

 private:
  friend class CompressiveTransformerImpl;
  friend class BlockImpl;

  // A layer's part of a call that has been checked: x [B, T, E] to [B, T, E]. `held` are the rings of
  // a carried memory, `rings` becomes what they are after the call.
  at::Tensor run(const at::Tensor& x,
                 at::TensorList held,
                 ModuleCall& call,
                 std::vector<at::Tensor>& rings);

  void reset_bias();
  LayerScores scores(at::Device device) const;

  std::shared_ptr<const LayerLaw> law_;     // what follows from the options alone
  std::shared_ptr<const MemorySpec> spec_;  // of a memory of this layer alone
  std::shared_ptr<CompressorModuleImpl> compressor_;
  std::shared_ptr<RelativeImpl> relative_;
};

TORCH_MODULE(CompressiveAttention);

}  // namespace ctx
