// Files of tensors as bytes: names and defaults, nothing else.
#include "ctx/snapshot.h"

#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include <string_view>

#include "bindings/session.h"

namespace ctx::bindings {

using torch::wrap_pybind_function;

namespace {

using Metadata = std::map<std::string, std::string>;
using Tensors = std::map<std::string, at::Tensor>;

py::bytes tensor_file_bytes(const Metadata& metadata,
                            const Tensors& tensors,
                            const std::string& where) {
  std::vector<char> bytes;
  {
    const py::gil_scoped_release released;
    bytes = ctx::tensor_file_bytes({metadata, tensors}, where.c_str());
  }
  return {bytes.data(), bytes.size()};
}

std::pair<Metadata, Tensors> tensor_file_of_bytes(const py::bytes& bytes,
                                                  const std::string& where) {
  const std::string_view view = bytes;
  const py::gil_scoped_release released;
  TensorFile file = ctx::tensor_file_of_bytes(view, where.c_str());
  return {std::move(file.metadata), std::move(file.tensors)};
}

}  // namespace

void bind_files(py::module_& m) {
  m.def("tensor_file_bytes", wrap_pybind_function(tensor_file_bytes));
  m.def("tensor_file_of_bytes", wrap_pybind_function(tensor_file_of_bytes));
  m.attr("ABOUT") = kAbout;
  m.attr("CHECKSUM") = kChecksum;
}

}  // namespace ctx::bindings
