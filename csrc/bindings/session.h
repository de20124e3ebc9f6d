// What the files of the Python module share.
#pragma once

#include <pybind11/pybind11.h>
#include <torch/csrc/Exceptions.h>

#include <cerrno>
#include <string>
#include <system_error>

namespace ctx::bindings {

namespace py = pybind11;

// What the system refuses becomes the OSError that Python's own open() would raise.
template <typename F>
inline void with_os_errors(const std::string& path, const F& run) {
  int code = 0;
  try {
    py::gil_scoped_release released;
    run();
  } catch (const std::system_error& error) {
    code = error.code().value();
  }
  if (code == 0) return;
  errno = code;
  PyErr_SetFromErrnoWithFilename(PyExc_OSError, path.c_str());
  throw python_error();
}

// Adds ctx._C.Session.
void bind_session(py::module_& m);

// Adds the functions of files of tensors.
void bind_files(py::module_& m);

}  // namespace ctx::bindings
