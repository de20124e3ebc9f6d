// Does what tests/test_cpp_modules.py did in Python: a module is built from the settings of a case,
// takes the weights that Python saved, streams, calls differentiably and trains. What comes out is
// compared there.
//
//   cpp_modules <folder> <number of cases>
//   cpp_modules read <state dict>             prints its names, shapes and sums, or the error
//
//   <n>.case     settings by the names of the options, and tensors `x`, `cuts`, `lengths`, `reset_at`,
//                `seed`, `step_size`
//   <n>.weights  torch.save of a state_dict()
//   <n>.first    written: the module's first values of that seed
//   <n>.trained  written: the module's weights after ten steps
//   <n>.names    written: the names of the parameters, one a line
//   <n>.out      written: everything else
#include <ATen/ATen.h>
#include <ctx/ctx.h>
#include <ctx/modules.h>
#include <torch/nn/functional/loss.h>
#include <torch/optim/sgd.h>
#include <torch/utils.h>

#include <cstdio>
#include <fstream>
#include <sstream>
#include <string>
#include <type_traits>

namespace {

using at::Tensor;
using ctx::Snapshot;

// A setting is left as it is where the case does not name it.
struct Case {
  Snapshot parts;

  template <typename T>
  const T* find(const std::string& name) const {
    const auto found = parts.find(name);
    return found == parts.end() ? nullptr : &std::get<T>(found->second);
  }
  const Tensor& tensor(const std::string& name) const { return *find<Tensor>(name); }

  void set(const char* name, int64_t& field) const { take<int64_t>(name, field); }
  void set(const char* name, std::optional<int64_t>& field) const { take<int64_t>(name, field); }
  void set(const char* name, double& field) const { take<double>(name, field); }
  void set(const char* name, std::optional<double>& field) const { take<double>(name, field); }
  void set(const char* name, std::string& field) const { take<std::string>(name, field); }
  void set(const char* name, bool& field) const {
    if (const auto* held = find<int64_t>(name)) field = *held != 0;
  }
  void set(const char* name, ctx::Sizes& field) const {
    if (find_sizes(name)) field = *find_sizes(name);
  }
  void set(const char* name, std::optional<ctx::Sizes>& field) const {
    if (find_sizes(name)) field = *find_sizes(name);
  }
  void set(const char* name, std::vector<double>& field) const {
    if (const auto* held = find<Tensor>(name))
      field.assign(held->data_ptr<double>(), held->data_ptr<double>() + held->numel());
  }

 private:
  template <typename T, typename Field>
  void take(const char* name, Field& field) const {
    if (const auto* held = find<T>(name)) field = *held;
  }
  std::optional<ctx::Sizes> find_sizes(const char* name) const {
    if (!parts.contains(name)) return std::nullopt;
    if (const auto* one = std::get_if<int64_t>(&parts.at(name))) return ctx::Sizes(*one);
    const Tensor& each = tensor(name);
    return std::vector<int64_t>(each.data_ptr<int64_t>(), each.data_ptr<int64_t>() + each.numel());
  }
};

// What a layer and a model have in common.
template <typename Options>
void set_shared(const Case& c, Options& o) {
  c.set("embed_dim", o.embed_dim), c.set("num_heads", o.num_heads);
  c.set("num_kv_heads", o.num_kv_heads);
  c.set("window", o.window), c.set("compressed", o.compressed), c.set("ratio", o.ratio);
  c.set("segment", o.segment), c.set("sinks", o.sinks);
  c.set("compressor", o.compressor), c.set("compressor_kernel", o.compressor_kernel);
  c.set("position", o.position), c.set("relative_dim", o.relative_dim);
  c.set("distance", o.distance), c.set("compressed_bias", o.compressed_bias);
  c.set("compressed_bias_init", o.compressed_bias_init);
  c.set("compressor_grad", o.compressor_grad), c.set("dropout", o.dropout), c.set("bias", o.bias);
  c.set("rotary_base", o.rotary_base), c.set("rotary_dim", o.rotary_dim);
  c.set("rotary_interleaved", o.rotary_interleaved), c.set("max_rewind", o.max_rewind);
}

ctx::CompressiveAttention make_layer(const Case& c) {
  ctx::CompressiveAttentionOptions o;
  set_shared(c, o);
  c.set("inv_freq", o.inv_freq), c.set("attention_factor", o.attention_factor);
  c.set("scale", o.scale), c.set("slot_mass", o.slot_mass);
  c.set("logit_softcap", o.logit_softcap);
  return ctx::CompressiveAttention(o);
}

ctx::CompressiveTransformer make_model(const Case& c) {
  ctx::CompressiveTransformerConfig o;
  set_shared(c, o);
  c.set("vocab_size", o.vocab_size), c.set("num_layers", o.num_layers);
  c.set("mlp", o.mlp), c.set("mlp_dim", o.mlp_dim), c.set("norm", o.norm), c.set("tied", o.tied);
  return ctx::CompressiveTransformer(o);
}

// Of the outputs of a piece of x.
Tensor loss_of(const Tensor& output, const Tensor& piece) {
  if (piece.scalar_type() != at::kLong) return (output - piece.roll(1, 1)).square().mean();
  return torch::nn::functional::cross_entropy(output.flatten(0, 1), piece.roll(-1, 1).flatten());
}

template <typename Module>
Tensor run_in_pieces(Module& module,
                     const Tensor& x,
                     const Tensor& cuts,
                     ctx::ModelMemory& memory) {
  std::vector<Tensor> made;
  const std::vector<int64_t> sizes(cuts.data_ptr<int64_t>(),
                                   cuts.data_ptr<int64_t>() + cuts.numel());
  for (const Tensor& piece : x.split_with_sizes(sizes, 1)) {
    auto [y, after] = module->forward(piece, memory);
    made.push_back(y.detach());
    memory = after;
  }
  return at::cat(made, 1);
}

void keep(ctx::StateDict& out, const std::string& name, const ctx::ModelMemory& memory) {
  for (size_t i = 0; i < memory.tensors().size(); ++i)
    out[name + "." + std::to_string(i)] = memory.tensors()[i].clone();
}

// Ten steps of descent over consecutive pieces of the stream, the memory carried.
template <typename Module>
Tensor train(Module& module, const Case& c, ctx::ModelMemory& memory) {
  module->train();
  const Tensor& x = c.tensor("x");
  const auto options = torch::optim::SGDOptions(*c.find<double>("step_size")).momentum(0.9);
  torch::optim::SGD optimizer(module->parameters(), options);
  std::vector<Tensor> losses;
  for (const Tensor& piece : x.chunk(10, 1)) {
    auto [y, after] = module->forward(piece, memory);
    const Tensor loss = loss_of(y, piece);
    optimizer.zero_grad();
    loss.backward();
    optimizer.step();
    memory = after;
    losses.push_back(loss.detach());
  }
  return at::stack(losses);
}

template <typename Module>
void run(Module module, const Case& c, const std::string& path) {
  ctx::StateDict out;
  ctx::save_state_dict(*module, path + ".first");
  ctx::load_state_dict(*module, path + ".weights");
  std::ofstream names(path + ".names");
  for (const auto& parameter : module->named_parameters()) names << parameter.key() << "\n";
  module->eval();
  const Tensor& x = c.tensor("x");
  {
    const at::NoGradGuard no_grad;
    ctx::ModelMemory memory = module->init_memory(x.size(0));
    out["streamed"] = run_in_pieces(module, x, c.tensor("cuts"), memory);
    keep(out, "streamed", memory);
    ctx::CallOptions call{c.tensor("lengths"), c.tensor("reset_at")};
    out["packed"] = module->forward(x, memory, call).output;
    keep(out, "packed", memory);
    call.update = false;
    out["read"] = module->forward(x, memory, call).output;
  }
  ctx::ModelMemory memory;
  const Tensor halves = at::full({2}, x.size(1) / 2, at::kLong);
  out["differentiable"] = run_in_pieces(module, x, halves, memory);
  keep(out, "differentiable", memory);
  torch::manual_seed(*c.find<int64_t>("seed"));  // of dropout
  ctx::ModelMemory trained;
  out["losses"] = train(module, c, trained);
  keep(out, "trained", trained);
  ctx::save_state_dict(*module, path + ".trained");
  ctx::write_state_dict(out, path + ".out");
}

int read(const std::string& path) {
  try {
    for (const auto& [name, tensor] : ctx::read_state_dict(path)) {
      std::ostringstream shape;
      shape << name << " " << tensor.sizes() << " " << tensor.sum().item<double>();
      std::printf("%s\n", shape.str().c_str());
    }
  } catch (const c10::Error& error) {
    std::printf("%s\n", error.what_without_backtrace());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return 2;
  if (std::string(argv[1]) == "read") return read(argv[2]);
  at::set_num_threads(1);
  for (int i = 0; i < std::stoi(argv[2]); ++i) {
    const std::string path = std::string(argv[1]) + "/" + std::to_string(i);
    const Case c{ctx::read_snapshot(path + ".case", "cpp_modules")};
    torch::manual_seed(*c.find<int64_t>("seed"));
    if (c.parts.contains("num_layers")) {
      run(make_model(c), c, path);
    } else {
      run(make_layer(c), c, path);
    }
  }
  std::printf("%s cases\n", argv[2]);
  return 0;
}
