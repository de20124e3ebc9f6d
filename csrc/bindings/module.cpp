// The Python module ctx._C: names and defaults, nothing else.
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/utils/pybind.h>

#include "bindings/session.h"
#include "ctx/ctx.h"

namespace py = pybind11;
using torch::wrap_pybind_function;
using torch::wrap_pybind_function_no_gil;

namespace {

ctx::Schedule make_schedule(
    int64_t window, int64_t compressed, int64_t ratio, int64_t segment, int64_t sinks) {
  const ctx::Schedule schedule{window, compressed, ratio, segment, sinks};
  schedule.validate();
  return schedule;
}

ctx::AttentionSettings make_settings(const ctx::Schedule& schedule,
                                     const std::string& distance,
                                     int64_t rotary_dim,
                                     double rotary_base,
                                     bool rotary_interleaved,
                                     const std::vector<double>& inv_freq,
                                     double attention_factor,
                                     bool keys_rotated,
                                     double scale,
                                     bool slot_mass,
                                     double logit_softcap,
                                     const std::optional<at::Tensor>& alibi_slopes,
                                     const std::vector<at::Tensor>& relative) {
  return {schedule,
          distance,
          rotary_dim,
          rotary_base,
          rotary_interleaved,
          inv_freq,
          attention_factor,
          keys_rotated,
          scale,
          slot_mass,
          logit_softcap,
          alibi_slopes,
          relative};
}

ctx::Compressor make_compressor(const std::string& name,
                                const std::vector<at::Tensor>& parameters,
                                ctx::Compressor::Function function,
                                int64_t overlap) {
  return {name, parameters, std::move(function), overlap};
}

// What operators take of settings: `int[] settings` and `float[] numbers`.
std::pair<std::vector<int64_t>, std::vector<double>> pack(const ctx::AttentionSettings& settings,
                                                          const std::string& compressor,
                                                          int64_t head_dim,
                                                          int64_t overlap) {
  auto packed = ctx::packed(settings.resolved(head_dim, overlap), compressor);
  return {std::move(packed.settings), std::move(packed.numbers)};
}

std::shared_ptr<ctx::KVMemory> make_memory(const ctx::AttentionSettings& settings,
                                           int64_t batch_size,
                                           int64_t kv_heads,
                                           int64_t head_dim,
                                           int64_t value_dim,
                                           const ctx::Compressor& compressor,
                                           const std::optional<at::Tensor>& compressed_bias,
                                           int64_t max_rewind,
                                           at::ScalarType dtype,
                                           const std::optional<at::ScalarType>& compressed_dtype,
                                           const at::Device& device) {
  return std::make_shared<ctx::KVMemory>(ctx::MemoryOptions{settings,
                                                            batch_size,
                                                            kv_heads,
                                                            head_dim,
                                                            value_dim,
                                                            compressor,
                                                            compressed_bias,
                                                            max_rewind,
                                                            dtype,
                                                            device,
                                                            compressed_dtype});
}

using ctx::bindings::with_os_errors;
using Memory = std::shared_ptr<ctx::KVMemory>;

Memory share(ctx::KVMemory memory) { return std::make_shared<ctx::KVMemory>(std::move(memory)); }

void reset(ctx::KVMemory& memory, const std::optional<at::Tensor>& rows) {
  rows ? memory.reset(*rows) : memory.reset();
}

void rewind_rows(ctx::KVMemory& memory, const at::Tensor& tokens) { memory.rewind(tokens); }

Memory select_rows(const ctx::KVMemory& memory, const at::Tensor& rows) {
  return share(memory.select(rows));
}

Memory merge(const std::vector<Memory>& memories) {
  std::vector<const ctx::KVMemory*> parts;
  for (const Memory& memory : memories) parts.push_back(memory.get());
  return share(ctx::KVMemory::merge(parts));
}

Memory to(const ctx::KVMemory& memory, at::ScalarType dtype, const at::Device& device) {
  return share(memory.to(dtype, device));
}

ctx::LayerShape make_layer_shape(const ctx::Schedule& schedule,
                                 int64_t overlap,
                                 int64_t kv_heads,
                                 int64_t head_dim,
                                 int64_t value_dim,
                                 int64_t max_rewind,
                                 bool counts_attention,
                                 bool slot_mass) {
  ctx::LayerShape shape{
      schedule, kv_heads, head_dim, value_dim, max_rewind, counts_attention, slot_mass};
  shape.schedule.overlap = overlap;
  return shape;
}

std::vector<at::Tensor> merge_state(const std::vector<at::Tensor>& states,
                                    int64_t memories,
                                    const std::string& where) {
  return ctx::rows::merge(states, memories, where);
}

std::vector<at::Tensor> to_state(const std::vector<at::Tensor>& state,
                                 std::optional<at::ScalarType> pairs,
                                 std::optional<at::ScalarType> slots,
                                 std::optional<at::Device> device,
                                 const std::string& where) {
  return ctx::rows::to(state, pairs, slots, device, where);
}

void check_clock(const at::Tensor& seen, const at::Tensor& rewindable, const std::string& where) {
  ctx::rows::check_clock(seen, rewindable, ctx::Schedule::kLastPosition, where);
}

// Parameters of a compressor in the engine's order, float64; on the meta device their shapes alone.
std::vector<at::Tensor> first_values(const std::string& name,
                                     int64_t kv_heads,
                                     int64_t ratio,
                                     int64_t head_dim,
                                     int64_t value_dim,
                                     int64_t kernel,
                                     const at::Device& device) {
  const auto options = at::TensorOptions().dtype(at::kDouble).device(device);
  return ctx::Compressor::make(name, kv_heads, ratio, head_dim, value_dim, options, kernel)
      .parameters;
}

void save(const ctx::KVMemory& memory, const std::string& path) {
  with_os_errors(path, [&] { memory.save(path); });
}

void load(ctx::KVMemory& memory, const std::string& path) {
  with_os_errors(path, [&] { memory.load(path); });
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace pybind11::literals;
  using ctx::KVMemory;
  using ctx::Schedule;

  py::class_<Schedule>(m, "Schedule")
      .def(py::init(wrap_pybind_function(make_schedule)),
           "window"_a,
           "compressed"_a,
           "ratio"_a,
           "segment"_a,
           "sinks"_a)
      .def("groups", &Schedule::groups, "t"_a)
      .def("window_begin", &Schedule::window_begin, "t"_a)
      .def("slots", &Schedule::slots, "t"_a)
      .def("visible_sinks", &Schedule::visible_sinks, "t"_a)
      .def("max_new_groups", &Schedule::max_new_groups<int64_t>, "tokens"_a)
      .def("window_capacity", &Schedule::window_capacity<int64_t>, "max_rewind"_a)
      .def("compressed_capacity", &Schedule::compressed_capacity<int64_t>, "max_rewind"_a)
      .def_property_readonly("max_window", &Schedule::max_window)
      .def_property_readonly("max_slots", &Schedule::max_slots)
      .def_property_readonly("reach", &Schedule::reach);

  py::class_<ctx::AttentionSettings>(m, "AttentionSettings")
      .def(py::init(wrap_pybind_function(make_settings)),
           "schedule"_a,
           "distance"_a,
           "rotary_dim"_a,
           "rotary_base"_a,
           "rotary_interleaved"_a,
           "inv_freq"_a,
           "attention_factor"_a,
           "keys_rotated"_a,
           "scale"_a,
           "slot_mass"_a,
           "logit_softcap"_a,
           "alibi_slopes"_a = py::none(),
           "relative"_a = std::vector<at::Tensor>());

  py::class_<ctx::Compressor>(m, "Compressor")
      .def(py::init(wrap_pybind_function(make_compressor)),
           "name"_a,
           "parameters"_a,
           "function"_a,
           "overlap"_a);

  m.def(
      "pack", wrap_pybind_function(pack), "settings"_a, "compressor"_a, "head_dim"_a, "overlap"_a);

  py::class_<KVMemory, std::shared_ptr<KVMemory>>(m, "KVMemory")
      .def(py::init(wrap_pybind_function_no_gil(make_memory)),
           "settings"_a,
           "batch_size"_a,
           "kv_heads"_a,
           "head_dim"_a,
           "value_dim"_a,
           "compressor"_a,
           "compressed_bias"_a,
           "max_rewind"_a,
           "dtype"_a,
           "compressed_dtype"_a,
           "device"_a)
      .def("step",
           wrap_pybind_function_no_gil(&KVMemory::step),
           "q"_a,
           "k"_a,
           "v"_a,
           "lengths"_a = py::none(),
           "reset_at"_a = py::none())
      .def("step_with_region_weights",
           wrap_pybind_function_no_gil(&KVMemory::step_with_region_weights),
           "q"_a,
           "k"_a,
           "v"_a,
           "lengths"_a = py::none(),
           "reset_at"_a = py::none())
      .def("append",
           wrap_pybind_function_no_gil(&KVMemory::append),
           "k"_a,
           "v"_a,
           "lengths"_a = py::none(),
           "reset_at"_a = py::none())
      .def("attend", wrap_pybind_function_no_gil(&KVMemory::attend), "q"_a)
      .def("attend_with_region_weights",
           wrap_pybind_function_no_gil(&KVMemory::attend_with_region_weights),
           "q"_a)
      .def("reset", wrap_pybind_function_no_gil(reset), "rows"_a = py::none())
      .def("rewind", wrap_pybind_function_no_gil(rewind_rows), "tokens"_a)
      .def("select", wrap_pybind_function_no_gil(select_rows), "rows"_a)
      .def_static("merge", wrap_pybind_function_no_gil(merge), "memories"_a)
      .def("to", wrap_pybind_function_no_gil(to), "dtype"_a, "device"_a)
      .def("state_dict", wrap_pybind_function(&KVMemory::state_dict))
      .def("load_state_dict", wrap_pybind_function_no_gil(&KVMemory::load_state_dict), "snapshot"_a)
      .def("save", wrap_pybind_function(save), "path"_a)
      .def("load", wrap_pybind_function(load), "path"_a)
      .def("set_parameters", wrap_pybind_function_no_gil(&KVMemory::set_parameters), "parameters"_a)
      .def("set_relative", wrap_pybind_function_no_gil(&KVMemory::set_relative), "relative"_a)
      .def("set_compressed_bias",
           wrap_pybind_function_no_gil(&KVMemory::set_compressed_bias),
           "bias"_a)
      .def_property_readonly("seen", [](const KVMemory& memory) { return memory.seen(); })
      .def_property_readonly("rewindable",
                             [](const KVMemory& memory) { return memory.rewindable(); })
      .def_property_readonly("tensors", [](const KVMemory& memory) { return memory.tensors(); })
      .def_property_readonly("nbytes", &KVMemory::nbytes);

  ctx::bindings::bind_session(m);
  ctx::bindings::bind_files(m);

  using ctx::LayerShape;
  namespace rows = ctx::rows;
  py::class_<LayerShape>(m, "LayerShape")
      .def(py::init(wrap_pybind_function(make_layer_shape)),
           "schedule"_a,
           "overlap"_a,
           "kv_heads"_a,
           "head_dim"_a,
           "value_dim"_a,
           "max_rewind"_a,
           "counts_attention"_a,
           "slot_mass"_a)
      .def("sizes", wrap_pybind_function(&LayerShape::sizes), "batch"_a, "slots"_a);
  m.def("state_names", wrap_pybind_function(rows::names));
  m.def("state_types", wrap_pybind_function(rows::types));
  m.def("slot_types", wrap_pybind_function(rows::slot_types));
  m.def("check_state", wrap_pybind_function_no_gil(rows::check));
  m.def("check_clock", wrap_pybind_function_no_gil(check_clock));
  m.def("copy_state", wrap_pybind_function_no_gil(rows::copy));
  m.def("reset_state", wrap_pybind_function_no_gil(rows::reset));
  m.def("rewind_state", wrap_pybind_function_no_gil(rows::rewind));
  m.def("select_state", wrap_pybind_function_no_gil(rows::select));
  m.def("merge_state", wrap_pybind_function_no_gil(merge_state));
  m.def("to_state", wrap_pybind_function_no_gil(to_state));
  m.def("resized_state", wrap_pybind_function_no_gil(rows::resized));
  m.attr("OPEN") = rows::kOpen;

  m.def("first_values",
        wrap_pybind_function(first_values),
        "name"_a,
        "kv_heads"_a,
        "ratio"_a,
        "head_dim"_a,
        "value_dim"_a,
        "kernel"_a,
        "device"_a);
  m.def("cpu_capabilities", &ctx::cpu_capabilities);
  m.def("cpu_capability", wrap_pybind_function(ctx::cpu_capability));
}
