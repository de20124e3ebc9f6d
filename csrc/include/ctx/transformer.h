// CompressiveTransformer: a decoder language model over compressive attention, as a
// torch::nn::Module.
//
// It computes what Python's ctx.CompressiveTransformer does, and its parameters have the same names
// in the same order, so that weights go from one to the other (weights.h):
//
//   embedding.weight
//   blocks.<n>.attention_norm.weight   (.bias with norm "layer" and bias)
//   blocks.<n>.attention.<name>        attention_module.h
//   blocks.<n>.mlp_norm.weight  blocks.<n>.mlp.up.weight  blocks.<n>.mlp.down.weight  (and .bias)
//   norm.weight
//   head.weight                        unless tied
//
// What Python's has besides is not here: generation, region weights, padding by a mask, twins of other
// sizes, auxiliary losses and memories of layer inputs. The last two are refused by name.
#pragma once

#include <ATen/core/Tensor.h>
#include <torch/nn/modules/embedding.h>
#include <torch/nn/modules/linear.h>

#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "ctx/attention_module.h"
#include "ctx/export.h"
#include "ctx/model_memory.h"

namespace torch::nn {
class ModuleListImpl;
}

namespace ctx {

// A size of every layer, or one for each, first layer first.
class Sizes {
 public:
  Sizes(int64_t all) : sizes_{all} {}                            // NOLINT: as Python takes it
  Sizes(std::initializer_list<int64_t> each) : sizes_(each) {}   // NOLINT
  Sizes(std::vector<int64_t> each) : sizes_(std::move(each)) {}  // NOLINT

  const std::vector<int64_t>& numbers() const { return sizes_; }

 private:
  std::vector<int64_t> sizes_;
};

// Everything that is needed to build a model, by the names of Python's configuration.
struct CompressiveTransformerConfig {
  int64_t vocab_size = 0;
  int64_t embed_dim = 0;
  int64_t num_layers = 0;
  int64_t num_heads = 0;
  std::optional<int64_t> num_kv_heads = {};
  // The memory: each is one number, or one for each layer.
  Sizes window = 0;
  Sizes compressed = 0;
  Sizes ratio = 1;
  std::optional<Sizes> segment = {};
  Sizes sinks = 0;
  // As in CompressiveAttentionOptions.
  std::string compressor = "conv";
  std::optional<int64_t> compressor_kernel = {};
  std::string memory_content = "kv";
  std::string position = "rotary";
  std::optional<int64_t> relative_dim = {};
  std::string distance = "slot";
  std::string compressed_bias = "learned";
  std::optional<double> compressed_bias_init = {};
  std::string compressor_grad = "task";
  std::optional<std::string> aux_loss = {};
  double rotary_base = 10000.0;
  std::optional<int64_t> rotary_dim = {};
  bool rotary_interleaved = false;
  int64_t max_rewind = 64;
  std::string mlp = "swiglu";           // or "gelu"
  std::optional<int64_t> mlp_dim = {};  // absent: 4 embed_dim, and 2/3 of that for "swiglu"
  std::string norm = "rms";             // or "layer", before each branch
  bool tied = true;                     // the output layer shares the embedding's weights
  double dropout = 0.0;                 // of embeddings and of both branches' outputs, in training
  bool bias = false;                    // of every linear layer

  // Throws ValueError naming the first setting that is out of range, or that is Python's alone.
  CTX_API void validate() const;

  // The options of a layer, 0 ... num_layers - 1.
  CTX_API CompressiveAttentionOptions attention(int64_t layer) const;
};

class BlockImpl;
class NormImpl;

class CTX_API CompressiveTransformerImpl : public torch::nn::Cloneable<CompressiveTransformerImpl> {
 public:
  // First values are Python's, also bit for bit where torch's generator starts alike. Throws what
  // CompressiveTransformerConfig::validate throws.
  explicit CompressiveTransformerImpl(CompressiveTransformerConfig config);

  void reset() override;

  // Normal weights; branches that write to the residual stream start smaller (GPT-2).
  void reset_parameters();

  // Continues every row's stream by T tokens.
  //
  //   tokens     int64 [B, T], each in [0, vocab_size)
  //   memory     of init_memory() or of an earlier call; none: every row begins a new stream
  //   last_only  logits of every row's last token alone, [B, vocab_size], zero for a row without
  //              tokens; what generation needs of a long prompt
  //   returns    logits [B, T, vocab_size] for the token after each, zero at padding, and the memory
  //              after the last
  //
  // Under grad the call is differentiable and returns a new memory, which is constant to the next
  // call; without grad the memory passed in is streamed into in place and returned. Errors, and what
  // an interrupted call leaves, are those of CompressiveAttentionImpl::forward; IndexError: a token is
  // out of range (looked at on the CPU only).
  ModuleOutput forward(const at::Tensor& tokens,
                       const ModelMemory& memory = {},
                       const CallOptions& call = {},
                       bool last_only = false);

  // An empty memory for so many streams, of all layers, in the parameters' dtype and on their device;
  // `compressed_dtype` of slots, as in MemoryOptions.
  ModelMemory init_memory(int64_t batch_size,
                          std::optional<at::ScalarType> compressed_dtype = std::nullopt) const;

  // The attention of a block, 0 ... num_layers - 1.
  CompressiveAttention attention(int64_t layer) const;

  void pretty_print(std::ostream& stream) const override;

  CompressiveTransformerConfig config;  // changes have no effect

  torch::nn::Embedding embedding{nullptr};
  torch::nn::Linear head{nullptr};  // of a model that is not tied

 private:
  BlockImpl& block(int64_t layer) const;

  std::shared_ptr<torch::nn::ModuleListImpl> blocks_;
  std::shared_ptr<NormImpl> norm_;
  std::shared_ptr<const MemorySpec> spec_;
};

TORCH_MODULE(CompressiveTransformer);

}  // namespace ctx
