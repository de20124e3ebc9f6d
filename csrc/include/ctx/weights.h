// Weights of a module, to and from files that Python reads and writes.
#pragma once

#include <ATen/core/Tensor.h>

#include <map>
#include <string>

#include "ctx/export.h"

namespace torch::nn {
class Module;
}

namespace ctx {

// Tensors by their names.
using StateDict = std::map<std::string, at::Tensor>;

// A module's parameters and buffers by the names of Python's state_dict(); they alias the module.
CTX_API StateDict state_dict(const torch::nn::Module& module);

// Copies tensors of any floating dtype and device into a module's parameters and buffers.
//
// Throws ValueError before anything is written where a name of the module is missing, one is unknown,
// or a tensor has another shape; TypeError where one is not floating point and the module's is. Messages
// begin with `where`.
CTX_API void load_state_dict(torch::nn::Module& module,
                             const StateDict& state,
                             const char* where = "ctx.load_state_dict");

// The same from a file: a safetensors file; or what Python's torch.save wrote of a state_dict(), or
// save_state_dict did; of a dict with the entry "weights", as a checkpoint of `python -m ctx train` is,
// that entry.
//
// Throws std::system_error where the file cannot be read, ValueError where it is damaged or of another
// kind.
CTX_API void load_state_dict(torch::nn::Module& module, const std::string& path);
CTX_API StateDict read_state_dict(const std::string& path,
                                  const char* where = "ctx.read_state_dict");

// Writes what Python reads by torch.load(path, weights_only=True), whole or not at all: a dict of
// tensors for load_state_dict. Throws std::system_error where the file cannot be written.
CTX_API void save_state_dict(const torch::nn::Module& module, const std::string& path);
CTX_API void write_state_dict(const StateDict& state,
                              const std::string& path,
                              const char* where = "ctx.write_state_dict");

}  // namespace ctx
