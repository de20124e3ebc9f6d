// What KVMemory does with whole rows (ctx/rows.h), and snapshots.
#include <ATen/ATen.h>

#include <array>
#include <charconv>
#include <sstream>

#include "ctx/memory.h"
#include "ops/check.h"
#include "ops/registry.h"
#include "ops/state.h"

namespace ctx {
namespace {

using at::Tensor;

constexpr const char* kFormat = "ctx.KVMemory";
constexpr int64_t kVersion = 2;

// The settings that what is stored depends on, by name.
Snapshot geometry(const MemoryOptions& options) {
  const AttentionSettings& a = options.attention;
  const Schedule& s = a.schedule;
  return {{"batch_size", options.batch_size},
          {"kv_heads", options.kv_heads},
          {"head_dim", options.head_dim},
          {"value_dim", options.value_dim},
          {"window", s.window},
          {"compressed", s.compressed},
          {"ratio", s.ratio},
          {"segment", s.segment},
          {"sinks", s.sinks},
          {"overlap", s.overlap},
          {"max_rewind", options.max_rewind},
          {"position", a.position()},
          {"rotary_dim", a.rotary_dim},
          {"rotary_base", a.rotary_base},
          {"rotary_interleaved", int64_t{a.rotary_interleaved}},
          {"inv_freq", at::tensor(a.inv_freq, at::kDouble)},
          {"attention_factor", a.attention_factor},
          {"keys", std::string(a.keys_rotated ? "rotated" : "plain")},
          {"mass", std::string(a.slot_mass ? "slots" : "none")},
          {"distance", a.distance},
          {"compressor", options.compressor.name}};
}

// Tells 2 from 2.0 and 10000.0 from 10000.000001: a message says what differs.
std::string describe(const Snapshot::mapped_type& part) {
  std::ostringstream text;
  if (const auto* number = std::get_if<double>(&part)) {
    std::array<char, 32> digits;
    const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), *number).ptr;
    const std::string shortest(digits.data(), end);
    text << shortest
         << (shortest.find_first_not_of("-0123456789") == std::string::npos ? ".0" : "");
  } else if (const auto* tensor = std::get_if<Tensor>(&part)) {
    text << "a tensor";
    if (tensor->defined()) text << " " << tensor->sizes();
  } else if (const auto* name = std::get_if<std::string>(&part)) {
    text << '"' << *name << '"';
  } else {
    text << std::get<int64_t>(part);
  }
  return text.str();
}

bool equal(const Snapshot::mapped_type& one, const Snapshot::mapped_type& other) {
  return std::visit(
      [&](const auto& value) {
        using Value = std::decay_t<decltype(value)>;
        if constexpr (std::is_same_v<Value, Tensor>) {
          const auto* same = std::get_if<Tensor>(&other);
          return same != nullptr && same->defined() && !same->is_meta() &&
                 same->scalar_type() == value.scalar_type() && same->is_cpu() &&
                 at::equal(*same, value);
        } else {
          const auto* same = std::get_if<Value>(&other);
          return same != nullptr && *same == value;
        }
      },
      one);
}

// Numbers and names first: a message about one of them says more than one about frequencies that
// follow from it.
template <typename F>
void for_each_part(const Snapshot& snapshot, const F& run) {
  for (const bool tensors : {false, true}) {
    for (const auto& [name, part] : snapshot)
      if (std::holds_alternative<Tensor>(part) == tensors) run(name, part);
  }
}

const Snapshot::mapped_type& find(const Snapshot& snapshot,
                                  const std::string& name,
                                  const char* where) {
  const auto found = snapshot.find(name);
  CTX_CHECK_VALUE(found != snapshot.end(), where, name, " must be in the snapshot, got none");
  return found->second;
}

const Tensor& find_tensor(const Snapshot& snapshot,
                          int index,
                          at::IntArrayRef sizes,
                          at::ScalarType slots,
                          const char* where) {
  const char* name = ops::state_name(index);
  const auto& part = find(snapshot, name, where);
  const Tensor* tensor = std::get_if<Tensor>(&part);
  CTX_CHECK_TYPE(tensor != nullptr && tensor->defined(),
                 where,
                 name,
                 " must be a tensor, got ",
                 describe(part));
  CTX_CHECK_VALUE(
      tensor->sizes() == sizes, where, name, " must be ", sizes, ", got ", tensor->sizes());
  ops::check_readable(*tensor, name, where);
  const at::ScalarType type = ops::state_type(index, at::kFloat, slots);
  const bool exact = !at::isFloatingType(type);
  const bool fits =
      exact ? tensor->scalar_type() == type : at::isFloatingType(tensor->scalar_type());
  CTX_CHECK_TYPE(fits,
                 where,
                 name,
                 " must be ",
                 !exact              ? "floating point"
                 : type == at::kLong ? "int64"
                                     : "int8",
                 ", got ",
                 tensor->scalar_type());
  return *tensor;
}

}  // namespace

void KVMemory::reset() { rows::reset(seen(), rewindable(), std::nullopt, "ctx.KVMemory.reset"); }

void KVMemory::reset(const Tensor& rows) {
  rows::reset(seen(), rewindable(), rows, "ctx.KVMemory.reset");
}

void KVMemory::rewind(int64_t tokens) { rewind(at::full_like(seen(), tokens)); }

void KVMemory::rewind(const Tensor& tokens) {
  rows::rewind(tensors_, tokens, "ctx.KVMemory.rewind");
}

KVMemory KVMemory::select(const Tensor& rows) const {
  rows::State state = rows::select(tensors_, rows, "ctx.KVMemory.select");
  MemoryOptions options = options_;
  options.batch_size = state.back().size(0);
  return {std::move(options), std::move(state)};
}

KVMemory KVMemory::merge(const std::vector<const KVMemory*>& memories) {
  constexpr const char* where = "ctx.KVMemory.merge";
  CTX_CHECK_VALUE(!memories.empty(), where, "memories must be at least one, got none");
  MemoryOptions options = memories[0]->options_;
  const Snapshot wanted = geometry(options);
  for (size_t i = 1; i < memories.size(); ++i) {
    const MemoryOptions& other = memories[i]->options_;
    for_each_part(geometry(other), [&](const std::string& name, const auto& part) {
      CTX_CHECK_VALUE(name == "batch_size" || equal(part, wanted.at(name)),
                      where,
                      "memories must have one ",
                      name,
                      " = ",
                      describe(wanted.at(name)),
                      ", got ",
                      describe(part));
    });
    const auto same = [&](const char* name, at::ScalarType mine, at::ScalarType theirs) {
      CTX_CHECK_TYPE(
          mine == theirs, where, "memories must have one ", name, " = ", mine, ", got ", theirs);
    };
    same("dtype", options.dtype, other.dtype);
    same("compressed_dtype", options.slot_dtype(), other.slot_dtype());
    options.batch_size += other.batch_size;
  }
  rows::State states;
  for (const KVMemory* memory : memories)
    states.insert(states.end(), memory->tensors_.begin(), memory->tensors_.end());
  const auto count = static_cast<int64_t>(memories.size());
  return {std::move(options), rows::merge(states, count, where)};
}

KVMemory KVMemory::clone() const { return to(options_.dtype, options_.device); }

KVMemory KVMemory::to(at::ScalarType dtype, at::Device device) const {
  ops::kernels_for(device.type());
  MemoryOptions options = options_;
  options.dtype = dtype;
  options.device = device;
  if (dtype == at::kDouble) options.compressed_dtype = std::nullopt;
  for (Tensor& parameter : options.compressor.parameters) parameter = parameter.to(device);
  if (options.compressed_bias) options.compressed_bias = options.compressed_bias->to(device);
  AttentionSettings& attention = options.attention;
  if (attention.alibi_slopes) attention.alibi_slopes = attention.alibi_slopes->to(device);
  for (Tensor& operand : attention.relative) operand = operand.to(device);
  options.validate();
  return {options, rows::to(tensors_, dtype, options.slot_dtype(), device, "ctx.KVMemory.to")};
}

Snapshot KVMemory::state_dict() const {
  Snapshot snapshot = geometry(options_);
  snapshot["format"] = std::string(kFormat);
  snapshot["version"] = kVersion;
  for (int i = 0; i < ops::kStateTensors; ++i) snapshot[ops::state_name(i)] = tensors_[i];
  return snapshot;
}

void KVMemory::load_state_dict(const Snapshot& snapshot) {
  take_state(snapshot, "ctx.KVMemory.load_state_dict");
}

void KVMemory::take_state(const Snapshot& snapshot, const char* where) {
  const auto found = snapshot.find("format");
  CTX_CHECK_VALUE(found != snapshot.end() && equal(found->second, std::string(kFormat)),
                  where,
                  "format must be ",
                  kFormat,
                  ", got ",
                  found == snapshot.end() ? "none" : describe(found->second));
  const auto& version = find(snapshot, "version", where);
  CTX_CHECK_VALUE(
      equal(version, kVersion), where, "version must be ", kVersion, ", got ", describe(version));
  Snapshot known = state_dict();
  for (const auto& [name, part] : snapshot) {
    CTX_CHECK_VALUE(known.count(name) == 1,
                    where,
                    "snapshot must hold what version ",
                    kVersion,
                    " holds, got another part: ",
                    name);
  }
  for_each_part(geometry(options_), [&](const std::string& name, const auto& part) {
    const auto& theirs = find(snapshot, name, where);
    CTX_CHECK_VALUE(equal(theirs, part),
                    where,
                    name,
                    " must be ",
                    describe(part),
                    " as the memory's, got ",
                    describe(theirs));
  });
  Tensors tensors(ops::kStateTensors);
  for (int i = 0; i < ops::kStateTensors; ++i)
    tensors[i] = find_tensor(snapshot, i, tensors_[i].sizes(), options_.slot_dtype(), where);
  rows::check_clock(tensors[ops::kSeen], tensors[ops::kRewindable], options_.max_rewind, where);
  at::NoGradGuard no_grad;
  for (int i = 0; i < ops::kStateTensors; ++i) tensors_[i].copy_(tensors[i]);
}

}  // namespace ctx
