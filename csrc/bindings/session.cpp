// ctx._C.Session: names and defaults, nothing else.
#include "bindings/session.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>
#include <torch/csrc/utils/pybind.h>

#include "ctx/session.h"

namespace ctx::bindings {

using torch::wrap_pybind_function;
using torch::wrap_pybind_function_no_gil;

namespace {

ctx::Session make_session(const std::vector<std::shared_ptr<ctx::KVMemory>>& layers, int64_t rows) {
  std::vector<ctx::MemoryOptions> options;
  for (const auto& layer : layers) options.push_back(layer->options());
  return {std::move(options), rows};
}

std::vector<at::Tensor> tick(ctx::Session& session,
                             const std::vector<int64_t>& ids,
                             const std::vector<at::Tensor>& x,
                             const py::function& layer) {
  const auto call = [&](int64_t number, const at::Tensor& hidden, const auto& attend) {
    const py::gil_scoped_acquire held;
    const auto running = std::make_shared<bool>(true);  // whoever keeps the function cannot use it
    const py::cpp_function attends(wrap_pybind_function_no_gil(
        [&attend, running](const at::Tensor& q, const at::Tensor& k, const at::Tensor& v) {
          TORCH_CHECK_VALUE(*running, "ctx.Session.tick: attend must be called inside of layer");
          return attend(q, k, v);
        }));
    const py::object made = layer(number, hidden, attends);
    *running = false;
    return py::cast<at::Tensor>(made);
  };
  const py::gil_scoped_release released;
  return session.tick(ids, x, call);
}

py::bytes session_snapshot(const ctx::Session& session, int64_t id) {
  const std::vector<char> bytes = session.snapshot(id);
  return {bytes.data(), bytes.size()};
}

int64_t session_restore(ctx::Session& session, const py::bytes& bytes) {
  const std::string_view view = bytes;
  const py::gil_scoped_release released;
  return session.restore({view.begin(), view.end()});
}

void session_save(const ctx::Session& session, int64_t id, const std::string& path) {
  with_os_errors(path, [&] { session.save(id, path); });
}

int64_t session_load(ctx::Session& session, const std::string& path) {
  int64_t id = -1;
  with_os_errors(path, [&] { id = session.load(path); });
  return id;
}

}  // namespace

void bind_session(py::module_& m) {
  using namespace pybind11::literals;
  using ctx::Session;
  py::class_<Session>(m, "Session")
      .def(py::init(wrap_pybind_function_no_gil(make_session)), "layers"_a, "rows"_a)
      .def("join", wrap_pybind_function(&Session::join))
      .def("leave", wrap_pybind_function_no_gil(&Session::leave), "id"_a)
      .def("step", wrap_pybind_function_no_gil(&Session::step))
      .def("tick", wrap_pybind_function(tick), "ids"_a, "x"_a, "layer"_a)
      .def("fork", wrap_pybind_function_no_gil(&Session::fork), "id"_a)
      .def("rewind", wrap_pybind_function_no_gil(&Session::rewind), "id"_a, "tokens"_a)
      .def("snapshot", wrap_pybind_function(session_snapshot), "id"_a)
      .def("restore", wrap_pybind_function(session_restore), "snapshot"_a)
      .def("save", wrap_pybind_function(session_save), "id"_a, "path"_a)
      .def("load", wrap_pybind_function(session_load), "path"_a)
      .def("seen", wrap_pybind_function(&Session::seen), "id"_a)
      .def("rewindable", wrap_pybind_function(&Session::rewindable), "id"_a)
      .def_property_readonly("ids", &Session::ids)
      .def_property_readonly("rows", &Session::rows)
      .def_property_readonly("layers", &Session::layers)
      .def_property_readonly("nbytes", &Session::bytes);
}

}  // namespace ctx::bindings
