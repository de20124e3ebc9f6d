#include "ctx/weights.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <torch/nn/module.h>

#include "core/archive.h"
#include "core/files.h"
#include "core/state_pickle.h"
#include "ctx/snapshot.h"
#include "ops/check.h"

namespace ctx {
namespace {

using at::Tensor;

// "a, b", or "none"; the first few.
std::string listed(const std::vector<std::string>& names) {
  std::string made;
  for (size_t i = 0; i < names.size() && i < 5; ++i) made += (i > 0 ? ", " : "") + names[i];
  if (names.size() > 5) made += " and " + std::to_string(names.size() - 5) + " more";
  return made.empty() ? "none" : made;
}

}  // namespace

StateDict state_dict(const torch::nn::Module& module) {
  StateDict made;
  for (const auto& item : module.named_parameters()) made[item.key()] = item.value();
  for (const auto& item : module.named_buffers()) made[item.key()] = item.value();
  return made;
}

void load_state_dict(torch::nn::Module& module, const StateDict& state, const char* where) {
  const StateDict own = state_dict(module);
  std::vector<std::string> missing, unknown;
  for (const auto& [name, tensor] : own)
    if (!state.contains(name)) missing.push_back(name);
  for (const auto& [name, tensor] : state)
    if (!own.contains(name)) unknown.push_back(name);
  CTX_CHECK_VALUE(missing.empty() && unknown.empty(),
                  where,
                  "state must have the names of the module, got missing: ",
                  listed(missing),
                  "; unknown: ",
                  listed(unknown));
  for (const auto& [name, tensor] : own) {
    const Tensor& given = state.at(name);
    CTX_CHECK_VALUE(given.defined() && given.sizes() == tensor.sizes(),
                    where,
                    name,
                    " must be ",
                    tensor.sizes(),
                    ", got ",
                    given.defined() ? given.sizes() : at::IntArrayRef{});
    CTX_CHECK_TYPE(given.is_floating_point() == tensor.is_floating_point(),
                   where,
                   name,
                   " must be ",
                   tensor.scalar_type(),
                   " or alike, got ",
                   given.scalar_type());
  }
  const at::NoGradGuard no_grad;
  for (const auto& [name, tensor] : own) tensor.copy_(state.at(name));
}

StateDict read_state_dict(const std::string& path, const char* where) {
  const std::vector<char> bytes = files::read(path, where);
  try {
    return is_archive(bytes) ? read_state_pickle(bytes) : tensor_file_of_bytes(bytes).tensors;
  } catch (const std::exception&) {  // there are many words for what is wrong with a file
    CTX_CHECK_VALUE(
        false, where, "path must be a state dict, got a damaged or foreign file: ", path);
  }
}

void load_state_dict(torch::nn::Module& module, const std::string& path) {
  constexpr const char* where = "ctx.load_state_dict";
  load_state_dict(module, read_state_dict(path, where), where);
}

void write_state_dict(const StateDict& state, const std::string& path, const char* where) {
  for (const auto& [name, tensor] : state)
    CTX_CHECK_VALUE(tensor.defined(), where, name, " must be a tensor, got none");
  files::replace(path, state_pickle(state), where);
}

void save_state_dict(const torch::nn::Module& module, const std::string& path) {
  write_state_dict(state_dict(module), path, "ctx.save_state_dict");
}

}  // namespace ctx
