// The modules: one function under grad and without, memories as they should be left, errors by name,
// weights. tests/test_cpp_modules.py compares them with Python's.
#include <ATen/ATen.h>
#include <c10/core/InferenceMode.h>
#include <torch/utils.h>

#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "ctx/modules.h"
#include "streams.h"

namespace {

using at::Tensor;
using ctx::CallOptions;
using ctx::CompressiveAttention;
using ctx::CompressiveAttentionOptions;
using ctx::CompressiveTransformer;
using ctx::CompressiveTransformerConfig;
using ctx::ModelMemory;
using ctx::test::same;

constexpr const char* kCompressors[] = {"mean", "max", "conv", "dilated", "gated", "most_used"};

CompressiveAttentionOptions layer_options(const std::string& compressor = "conv") {
  CompressiveAttentionOptions made;
  made.embed_dim = 16, made.num_heads = 4, made.num_kv_heads = 2;
  made.window = 5, made.compressed = 3, made.ratio = 2, made.segment = 4, made.sinks = 1;
  made.compressor = compressor, made.max_rewind = 7;
  return made;
}

CompressiveTransformerConfig model_config(const std::string& compressor = "conv") {
  CompressiveTransformerConfig made;
  made.vocab_size = 11, made.embed_dim = 16, made.num_layers = 2, made.num_heads = 4;
  made.num_kv_heads = 2;
  made.window = {5, 3}, made.compressed = 3, made.ratio = 2, made.segment = 4, made.sinks = 1;
  made.compressor = compressor, made.max_rewind = 7;
  return made;
}

// Random everywhere, also what starts as zeros.
template <typename Module>
Module shaken(Module module) {
  const at::NoGradGuard no_grad;
  for (Tensor& parameter : module->parameters()) {
    parameter.add_(0.2 * at::randn_like(parameter));
  }
  module->to(at::kDouble);
  return module;
}

bool same(const ModelMemory& one, const ModelMemory& other) {
  for (size_t i = 0; i < one.tensors().size(); ++i)
    if (!same(one.tensors()[i], other.tensors()[i])) return false;
  return one.tensors().size() == other.tensors().size();
}

bool shared(const ModelMemory& one, const ModelMemory& other) {
  for (size_t i = 0; i < one.tensors().size(); ++i)
    if (!one.tensors()[i].is_same(other.tensors()[i])) return false;
  return true;
}

bool close(const Tensor& one, const Tensor& other) {
  return at::allclose(one, other, 1e-11, 1e-11);
}

template <typename Module>
Tensor in_pieces(Module& module, const Tensor& x, at::IntArrayRef sizes, ModelMemory& memory) {
  std::vector<Tensor> made;
  for (const Tensor& piece : x.split_with_sizes(sizes, 1)) {
    auto [y, after] = module->forward(piece, memory);
    made.push_back(y);
    memory = after;
  }
  return at::cat(made, 1);
}

void test_one_function() {
  for (const char* position : {"rotary", "relative", "alibi", "none"}) {
    for (const char* compressor : kCompressors) {
      auto options = layer_options(compressor);
      options.position = position;
      CompressiveAttention layer = shaken(CompressiveAttention(options));
      const Tensor x = at::randn({2, 40, 16}, at::kDouble);
      ModelMemory whole, halves, stream = layer->init_memory(2);
      const ModelMemory given = stream;
      const Tensor want = in_pieces(layer, x, {40}, whole);
      EXPECT(close(in_pieces(layer, x, {19, 21}, halves), want));
      {
        const at::NoGradGuard no_grad;
        EXPECT(close(in_pieces(layer, x, {1, 1, 9, 0, 23, 6}, stream), want));
        ModelMemory fresh;
        EXPECT(close(in_pieces(layer, x, {17, 23}, fresh), want));
      }
      EXPECT(shared(given, stream));
      for (const ModelMemory* memory : {&whole, &halves, &stream}) {
        EXPECT(same(memory->seen(), at::full({2}, 40, at::kLong)));
        EXPECT(memory->rewindable().max().item<int64_t>() == 7);
        EXPECT(memory->nbytes() == given.nbytes());
      }
    }
  }
}

void test_models() {
  for (const char* compressor : kCompressors) {
    CompressiveTransformer model = shaken(CompressiveTransformer(model_config(compressor)));
    const Tensor tokens = at::randint(11, {3, 37}, at::kLong);
    ModelMemory whole, stream = model->init_memory(3);
    const Tensor want = in_pieces(model, tokens, {37}, whole);
    EXPECT(want.sizes() == at::IntArrayRef({3, 37, 11}) && whole.layers() == 2);
    const c10::InferenceMode inference;
    EXPECT(close(in_pieces(model, tokens, {5, 1, 20, 11}, stream), want));
    EXPECT(!stream.seen().is_inference());
    ModelMemory last;
    EXPECT(close(model->forward(tokens, last, {}, /*last_only=*/true).output, want.select(1, 36)));
    const CallOptions padded{at::tensor({37, 9, 0}, at::kLong)};
    const Tensor ends = model->forward(tokens, last, padded, /*last_only=*/true).output;
    EXPECT(close(ends[1], want[1][8]) && ends[2].eq(0).all().item<bool>());
    EXPECT(model->forward(tokens.narrow(1, 0, 0), {}, {}, true).output.eq(0).all().item<bool>());
  }
}

void test_gradients() {
  for (const char* compressor : kCompressors) {
    auto options = layer_options(compressor);
    options.bias = true;
    CompressiveAttention layer = shaken(CompressiveAttention(options));
    const Tensor x = at::randn({2, 30, 16}, at::kDouble).requires_grad_();
    const Tensor way = at::randn({2, 30, 16}, at::kDouble);
    const auto [y, memory] = layer->forward(x);
    EXPECT(y.requires_grad() && !memory.tensors()[0].requires_grad());
    (y * way).sum().backward();
    EXPECT(x.grad().abs().sum().item<double>() > 0);
    for (const auto& parameter : layer->named_parameters()) {
      const Tensor grad = parameter.value().grad();
      EXPECT(grad.defined() && std::isfinite(grad.sum().item<double>()));
      if (parameter.key() != "k_proj.bias") EXPECT(grad.abs().sum().item<double>() > 0);
    }
    // Slots that are constants to the task leave the compressor without a gradient.
    options.compressor_grad = "aux";
    CompressiveAttention constant = shaken(CompressiveAttention(options));
    constant->forward(x).output.sum().backward();
    for (const auto& parameter : constant->named_parameters()) {
      const bool part = parameter.key().rfind("compressor.", 0) == 0;
      EXPECT(part != parameter.value().grad().defined());
    }
  }
}

// A slope of the loss along a direction in all parameters, by the graph and by a difference.
void test_gradients_are_differences() {
  CompressiveTransformer model = shaken(CompressiveTransformer(model_config("dilated")));
  const Tensor tokens = at::randint(11, {2, 30}, at::kLong);
  ModelMemory carried = model->forward(tokens).memory;
  const Tensor way = at::randn({2, 30, 11}, at::kDouble);
  CallOptions reads;
  reads.update = false;
  const auto loss = [&] { return (model->forward(tokens, carried, reads).output * way).sum(); };
  loss().backward();
  std::vector<Tensor> ways;
  double slope = 0;
  for (const Tensor& parameter : model->parameters()) {
    ways.push_back(at::randn_like(parameter));
    slope += (ways.back() * parameter.grad()).sum().item<double>();
  }
  constexpr double small = 1e-6;
  const auto moved = [&](double by) {
    const at::NoGradGuard no_grad;
    const auto parameters = model->parameters();
    for (size_t i = 0; i < parameters.size(); ++i) parameters[i].add_(by * ways[i]);
    return loss().item<double>();
  };
  const double above = moved(small), below = moved(-2 * small);
  const double difference = (above - below) / (2 * small);
  EXPECT(std::abs(difference - slope) < 1e-5 * (1 + std::abs(slope)));
}

void test_what_a_call_leaves() {
  CompressiveAttention layer = shaken(CompressiveAttention(layer_options()));
  const Tensor x = at::randn({2, 20, 16}, at::kDouble);
  const ModelMemory carried = layer->forward(x).memory;
  const ModelMemory before = carried.clone();
  const auto [y, after] = layer->forward(x, carried);
  EXPECT(same(carried, before) && !shared(carried, after));
  y.sum().backward();

  CallOptions reads;
  reads.update = false;
  const auto read = layer->forward(x, carried, reads);
  EXPECT(same(carried, before) && shared(read.memory, carried) && close(read.output, y));
  EXPECT(!layer->forward(x, {}, reads).memory.defined());
  const at::NoGradGuard no_grad;
  EXPECT(close(layer->forward(x, carried, reads).output, y) && same(carried, before));

  // Taken back, and again; a row that is reset is a fresh one.
  ModelMemory stream = carried.clone();
  const Tensor piece = x.narrow(1, 0, 6);
  const Tensor once = layer->forward(piece, stream).output;
  stream.rewind(6);
  EXPECT(same(stream.seen(), carried.seen()));
  EXPECT(close(layer->forward(piece, stream).output, once));
  stream.reset(at::tensor({1}, at::kLong));
  EXPECT(close(layer->forward(x, stream).output[1], layer->forward(x).output[1]));
  const ModelMemory forks = stream.select(at::tensor({1, 1, 0}, at::kLong));
  const Tensor twice = layer->forward(x.select(0, 0).expand({3, 20, 16}), forks).output;
  EXPECT(close(twice[0], twice[1]) && !close(twice[0], twice[2]));
}

void test_rows_of_a_call() {
  CompressiveAttention layer = shaken(CompressiveAttention(layer_options("gated")));
  const Tensor x = at::randn({3, 25, 16}, at::kDouble);
  Tensor dirty = x.clone();
  dirty[1].narrow(0, 10, 15).fill_(NAN);
  dirty[2].fill_(NAN);
  const CallOptions padded{at::tensor({25, 10, 0}, at::kLong)};
  for (const bool grad : {true, false}) {
    const c10::AutoGradMode mode(grad);
    ModelMemory memory = grad ? ModelMemory() : layer->init_memory(3);
    const auto [y, after] = layer->forward(dirty, memory, padded);
    EXPECT(same(after.seen(), at::tensor({25, 10, 0}, at::kLong)));
    EXPECT(y[1].narrow(0, 10, 15).eq(0).all().item<bool>() && y[2].eq(0).all().item<bool>());
    const Tensor alone = layer->forward(x.narrow(0, 1, 1).narrow(1, 0, 10)).output;
    EXPECT(close(y[1].narrow(0, 0, 10), alone[0]));
    if (grad) {
      y.square().sum().backward();
      for (const Tensor& parameter : layer->parameters())
        EXPECT(std::isfinite(parameter.grad().sum().item<double>()));
    }
    Tensor begins = at::zeros({3, 25}, at::kBool);
    begins[0][7] = true;
    CallOptions packed;
    packed.reset_at = begins;
    const auto two = layer->forward(x, {}, packed);
    EXPECT(close(two.output[0].narrow(0, 7, 18),
                 layer->forward(x.narrow(0, 0, 1).narrow(1, 7, 18)).output[0]));
    EXPECT(same(two.memory.seen(), at::tensor({18, 25, 25}, at::kLong)));
  }
}

// A later token that is not finite has no influence on gradients of what cannot see it.
void test_not_finite() {
  CompressiveAttention layer = shaken(CompressiveAttention(layer_options()));
  Tensor x = at::randn({1, 20, 16}, at::kDouble);
  x[0][19].fill_(INFINITY);
  layer->forward(x).output.narrow(1, 0, 19).square().sum().backward();
  for (const Tensor& parameter : layer->parameters())
    EXPECT(std::isfinite(parameter.grad().sum().item<double>()));
}

void test_open_memory() {
  CompressiveAttention layer{layer_options()};
  const at::NoGradGuard no_grad;
  ModelMemory memory = layer->init_memory(1);
  layer->forward(at::randn({1, 9, 16}), memory);
  memory.rewindable().fill_(ctx::rows::kOpen);  // what a call leaves that was interrupted
  const Tensor x = at::randn({1, 1, 16});
  EXPECT_THROWS(c10::ValueError,
                "ctx.CompressiveAttention: memory must be what a call left that ended",
                layer->forward(x, memory));
  memory.reset();
  EXPECT(close(layer->forward(x, memory).output, layer->forward(x).output));
}

// An error in the second layer: the call has not happened, and the memory goes on.
void test_interrupted() {
  CompressiveTransformer model = shaken(CompressiveTransformer(model_config()));
  const at::NoGradGuard no_grad;
  const Tensor tokens = at::randint(11, {2, 20}, at::kLong);
  const Tensor next = tokens.narrow(1, 0, 5), many = tokens.narrow(1, 0, 9);
  ModelMemory memory = model->forward(tokens).memory;
  const Tensor want = model->forward(next, memory.clone()).output;
  const Tensor weight = model->attention(1)->q_proj->weight, right = weight.clone();
  const auto fail = [&](const Tensor& piece) {
    bool thrown = false;
    weight.set_data(at::zeros({16, 3}, at::kDouble));
    try {
      model->forward(piece, memory);
    } catch (const c10::Error&) {
      thrown = true;
    }
    weight.set_data(right);
    EXPECT(thrown && same(memory.seen(), at::full({2}, 20, at::kLong)));
  };
  fail(next);
  EXPECT(same(memory.rewindable(), at::full({2}, 2, at::kLong)));  // 5 of 7 spare entries are used
  EXPECT(close(model->forward(next, memory.clone()).output, want));
  fail(many);  // more tokens than spare entries: what the rings held is lost
  EXPECT_THROWS(c10::ValueError,
                "ctx.CompressiveTransformer.forward: memory must be what a call left that ended",
                model->forward(next, memory));
}

void test_copies() {
  CompressiveTransformer model = shaken(CompressiveTransformer(model_config("gated")));
  auto copy = std::dynamic_pointer_cast<ctx::CompressiveTransformerImpl>(model->clone());
  const Tensor tokens = at::randint(11, {1, 30}, at::kLong);
  const Tensor want = model->forward(tokens).output.detach();
  EXPECT(close(copy->forward(tokens).output, want));
  {
    const at::NoGradGuard no_grad;
    for (const Tensor& parameter : copy->parameters()) parameter.zero_();
  }
  EXPECT(close(model->forward(tokens).output, want));
  EXPECT(copy->forward(tokens).output.eq(0).all().item<bool>());  // no part is left behind
  copy->attention(1)->q_proj->weight.detach().fill_(3);
  EXPECT(copy->named_parameters()["blocks.1.attention.q_proj.weight"].eq(3).all().item<bool>());
  EXPECT(model->forward(tokens, copy->init_memory(1)).memory.layers() == 2);  // of one spec
}

void test_memories_of_others() {
  CompressiveAttention layer{layer_options()};
  auto options = layer_options();
  options.window = 6, options.distance = "token";
  const Tensor x = at::randn({2, 4, 16});
  const char* said =
      "ctx.CompressiveAttention: memory must be made for window=5 distance=slot, got one made for "
      "window=6 distance=token";
  EXPECT_THROWS(
      c10::ValueError, said, layer->forward(x, CompressiveAttention(options)->init_memory(2)));
  const CompressiveTransformer model(model_config());
  EXPECT_THROWS(c10::ValueError,
                "ctx.CompressiveAttention: memory must have 1 layers, got 2",
                layer->forward(x, model->init_memory(2)));
  EXPECT_THROWS(c10::ValueError,
                "ctx.CompressiveAttention: x must have as many rows as memory = 3, got 2",
                layer->forward(x, layer->init_memory(3)));
  EXPECT_THROWS(c10::ValueError, "ctx.ModelMemory: memory must be one", ModelMemory().seen());
  EXPECT_THROWS(c10::ValueError,
                "ctx.CompressiveAttention.init_memory: batch_size must be",
                layer->init_memory(0));
  const ModelMemory small = layer->init_memory(2, at::kBFloat16, at::kChar);
  EXPECT(small.nbytes() < layer->init_memory(2).nbytes());
  const at::NoGradGuard no_grad;
  const auto [y, after] = layer->forward(x, small);
  EXPECT(y.scalar_type() == at::kFloat && at::allclose(y, layer->forward(x).output, 0.1, 0.02));
}

void test_bad_input() {
  CompressiveAttention layer{layer_options()};
  ModelMemory memory = layer->init_memory(2);
  const ModelMemory before = memory.clone();
  const at::NoGradGuard no_grad;
  const auto refuse = [&](const Tensor& x, const CallOptions& call, const char* said) {
    EXPECT_THROWS(c10::ValueError, said, layer->forward(x, memory, call));
    EXPECT(same(memory, before));
  };
  const Tensor x = at::randn({2, 4, 16});
  refuse(x.select(0, 0), {}, "ctx.CompressiveAttention: x must be [B, T, E]");
  refuse(at::randn({2, 4, 15}), {}, "ctx.CompressiveAttention: x must be [B, T, E]");
  refuse(x.narrow(0, 0, 0), {}, "ctx.CompressiveAttention: x must have at least one row");
  CallOptions call{at::tensor({5, 1}, at::kLong)};
  refuse(x, call, "ctx.CompressiveAttention: lengths must be");
  call = {at::tensor({1}, at::kLong)};
  refuse(x, call, "ctx.CompressiveAttention: lengths must be");
  call = {};
  call.reset_at = at::zeros({2, 3}, at::kBool);
  refuse(x, call, "ctx.CompressiveAttention: reset_at must be");
  EXPECT_THROWS(c10::TypeError,
                "ctx.CompressiveAttention: x must be Float",
                layer->forward(x.to(at::kDouble), memory));
  CompressiveTransformer model(model_config());
  const Tensor tokens = at::full({1, 3}, 11, at::kLong);
  EXPECT_THROWS(c10::IndexError,
                "ctx.CompressiveTransformer.forward: tokens must be in [0, 11), got 11",
                model->forward(tokens));
  EXPECT_THROWS(c10::TypeError,
                "ctx.CompressiveTransformer.forward: tokens must be",
                model->forward(tokens.to(at::kInt)));
  EXPECT_THROWS(
      c10::IndexError, "ctx.CompressiveTransformer.attention: layer must be", model->attention(2));
}

// Every setting that is out of range or Python's alone, by name.
void test_settings() {
  const auto refuse = [](auto change, const std::string& said) {
    auto options = layer_options();
    change(options);
    EXPECT_THROWS(c10::ValueError, said, CompressiveAttention{options});
    if constexpr (requires { change(*(CompressiveTransformerConfig*)nullptr); }) {
      auto config = model_config();
      change(config);
      const size_t end = said.find(':');
      EXPECT_THROWS(c10::ValueError,
                    "ctx.CompressiveTransformerConfig" + said.substr(end),
                    CompressiveTransformer{config});
    }
  };
  const std::string at = "ctx.CompressiveAttention: ";
  refuse([](auto& o) { o.memory_content = "hidden"; }, at + "memory_content must be kv in C++");
  refuse([](auto& o) { o.aux_loss = "reconstruction"; }, at + "aux_loss must be absent in C++");
  refuse([](auto& o) { o.compressor = "custom"; }, at + "compressor must be one of mean, max");
  refuse([](auto& o) { o.position = "absolute"; }, at + "position must be one of rotary, relative");
  refuse([](auto& o) { o.distance = "far"; }, at + "distance must be one of slot, token, got far");
  refuse([](auto& o) { o.compressed_bias = "high"; }, at + "compressed_bias must be one of");
  refuse([](auto& o) { o.compressor_grad = "both"; }, at + "compressor_grad must be one of");
  refuse([](auto& o) { o.embed_dim = 0; }, at + "embed_dim must be between 1 and");
  refuse([](auto& o) { o.embed_dim = 18; }, at + "embed_dim must be a multiple of num_heads = 4");
  refuse([](auto& o) { o.num_heads = -1; }, at + "num_heads must be between 1 and");
  refuse([](auto& o) { o.num_kv_heads = 3; }, at + "num_kv_heads must divide num_heads = 4, got 3");
  refuse([](auto& o) { o.num_kv_heads = 0; }, at + "num_kv_heads must be between 1 and");
  refuse([](auto& o) { o.max_rewind = 0; }, at + "max_rewind must be between 1 and");
  refuse([](auto& o) { o.dropout = 1.0; }, at + "dropout must be at least 0 and below 1");
  refuse([](auto& o) { o.compressed_bias_init = NAN; }, at + "compressed_bias_init must be finite");
  refuse([](auto& o) { o.compressed_bias = "none", o.compressed_bias_init = 1.0; },
         at + "compressed_bias_init must be absent for compressed_bias none, got 1");
  refuse([](auto& o) { o.position = "relative", o.relative_dim = 3; },
         at + "relative_dim must be even and positive, got 3");
  refuse([](auto& o) { o.compressor_kernel = 1; },
         at + "compressor_kernel must be at least ratio = 2, got 1");
  refuse([](auto& o) { o.compressor = "mean", o.compressor_kernel = 3; },
         at + "compressor_kernel must be absent unless conv compresses, got 3");
  const auto only = [](auto change) {
    return [change](CompressiveAttentionOptions& o) { change(o); };
  };
  refuse(only([](auto& o) { o.slot_mass = true, o.compressed_bias = "log_ratio"; }),
         at + "compressed_bias must be none or learned with slot_mass");
  refuse(only([](auto& o) { o.ratio = 0; }), "ctx.Schedule: ratio must be between 1 and");
  refuse(only([](auto& o) { o.window = -1; }), "ctx.Schedule: window must be between 0 and");
  refuse(only([](auto& o) { o.rotary_dim = 5; }), "ctx.AttentionSettings: rotary_dim must be even");
  refuse(only([](auto& o) { o.rotary_base = 0; }), "ctx.AttentionSettings: rotary_base must be");
  refuse(only([](auto& o) { o.inv_freq = {1.0}; }), "ctx.AttentionSettings: inv_freq must be");
  refuse(only([](auto& o) { o.logit_softcap = -1; }), "ctx.AttentionSettings: logit_softcap must");

  const auto refuse_model = [](auto change, const char* said) {
    auto config = model_config();
    change(config);
    EXPECT_THROWS(c10::ValueError,
                  std::string("ctx.CompressiveTransformerConfig: ") + said,
                  CompressiveTransformer{config});
  };
  refuse_model([](auto& c) { c.vocab_size = 0; }, "vocab_size must be between 1 and");
  refuse_model([](auto& c) { c.num_layers = 0; }, "num_layers must be between 1 and");
  refuse_model([](auto& c) { c.mlp_dim = 0; }, "mlp_dim must be between 1 and");
  refuse_model([](auto& c) { c.mlp = "relu"; }, "mlp must be one of swiglu, gelu, got relu");
  refuse_model([](auto& c) { c.norm = "batch"; }, "norm must be one of rms, layer, got batch");
  refuse_model([](auto& c) { c.window = {1, 2, 3}; },
               "window must be one number or num_layers = 2");
  refuse_model([](auto& c) { c.sinks = ctx::Sizes({}); }, "sinks must be one number or num_layers");
}

}  // namespace

int main() {
  torch::manual_seed(0);
  test_one_function();
  test_models();
  test_gradients();
  test_gradients_are_differences();
  test_what_a_call_leaves();
  test_rows_of_a_call();
  test_not_finite();
  test_open_memory();
  test_interrupted();
  test_copies();
  test_memories_of_others();
  test_bad_input();
  test_settings();
  return ctx::test::status();
}
