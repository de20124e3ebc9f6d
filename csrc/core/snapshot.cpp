#include "ctx/snapshot.h"

#include <array>
#include <charconv>
#include <cmath>
#include <stdexcept>

#include "core/archive.h"
#include "core/files.h"
#include "core/json.h"
#include "core/safetensors.h"
#include "ops/check.h"

namespace ctx {
namespace {

// Numbers with a point or an exponent are doubles, others are integers.
std::string number_text(const std::string& name, double number) {
  if (!std::isfinite(number))
    throw std::invalid_argument(name + " must be finite, got " + std::to_string(number));
  std::array<char, 32> digits;
  const auto end = std::to_chars(digits.data(), digits.data() + digits.size(), number).ptr;
  const std::string shortest(digits.data(), end);
  return shortest.find_first_of(".e") == std::string::npos ? shortest + ".0" : shortest;
}

TensorFile file_of(const Snapshot& snapshot) {
  TensorFile file;
  std::string about;
  for (const auto& [name, part] : snapshot) {
    if (const auto* tensor = std::get_if<at::Tensor>(&part)) {
      file.tensors.emplace(name, *tensor);
      continue;
    }
    about += (about.empty() ? "{" : ", ") + json::quoted(name) + ": ";
    if (const auto* text = std::get_if<std::string>(&part)) {
      about += json::quoted(*text);
    } else if (const auto* number = std::get_if<double>(&part)) {
      about += number_text(name, *number);
    } else {
      about += std::to_string(std::get<int64_t>(part));
    }
  }
  file.metadata[kAbout] = (about.empty() ? "{" : about) + "}";
  return file;
}

Snapshot::mapped_type part_of(const std::string& name, std::string_view text) {
  if (text[0] == '"') return json::Cursor(text).string();
  if (text[0] != '-' && (text[0] < '0' || text[0] > '9')) return std::string(text);
  const auto read = [&](auto value) -> Snapshot::mapped_type {
    const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
    if (error != std::errc() || end != text.data() + text.size())
      throw std::invalid_argument(name + " must fit into 64 bits, got " + std::string(text));
    return value;
  };
  return text.find_first_of(".eE") == std::string_view::npos ? read(int64_t{0}) : read(0.0);
}

Snapshot snapshot_of(const TensorFile& file) {
  for (const char* const name : {kAbout, kChecksum}) {
    if (file.metadata.count(name) == 0)
      throw std::invalid_argument(std::string("metadata must have ") + name + ", got none");
  }
  Snapshot snapshot;
  json::Cursor from(file.metadata.at(kAbout));
  from.object([&](const std::string& name) { snapshot[name] = part_of(name, from.value()); });
  from.end();
  for (const auto& [name, tensor] : file.tensors) {
    if (!snapshot.emplace(name, tensor).second)
      throw std::invalid_argument("names must differ, got twice: " + name);
  }
  return snapshot;
}

// In the grammar of messages.
template <typename Make>
auto checked(const char* where, const Make& make) {
  try {
    return make();
  } catch (const std::invalid_argument& error) {
    CTX_CHECK_VALUE(false, where, error.what());
  }
}

// The first line: torch's errors have many.
std::string reason(const std::exception& error) {
  const std::string said = error.what();
  return said.substr(0, said.find('\n'));
}

std::vector<char> encode_snapshot(const Snapshot& snapshot, const char* where) {
  return checked(where, [&] { return safetensors::encode(file_of(snapshot)); });
}

Snapshot decode_snapshot(std::span<const char> bytes) {
  return is_archive(bytes) ? read_archive(bytes) : snapshot_of(safetensors::decode(bytes));
}

}  // namespace

std::vector<char> snapshot_bytes(const Snapshot& snapshot, const char* where) {
  return encode_snapshot(snapshot, where);
}

Snapshot snapshot_of_bytes(std::span<const char> bytes, const char* where) {
  try {
    return decode_snapshot(bytes);
  } catch (const std::exception& error) {
    CTX_CHECK_VALUE(false,
                    where,
                    "bytes must be a snapshot, got ",
                    bytes.size(),
                    " that are damaged or of another kind (",
                    reason(error),
                    ")");
  }
}

void write_snapshot(const Snapshot& snapshot, const std::string& path, const char* where) {
  files::replace(path, encode_snapshot(snapshot, where), where);
}

Snapshot read_snapshot(const std::string& path, const char* where) {
  const std::vector<char> bytes = files::read(path, where);
  try {
    return decode_snapshot(bytes);
  } catch (const std::exception& error) {
    CTX_CHECK_VALUE(false,
                    where,
                    "path must be a snapshot, got a damaged or foreign file: ",
                    path,
                    " (",
                    reason(error),
                    ")");
  }
}

std::vector<char> tensor_file_bytes(const TensorFile& file, const char* where) {
  return checked(where, [&] { return safetensors::encode(file); });
}

TensorFile tensor_file_of_bytes(std::span<const char> bytes, const char* where) {
  return checked(where, [&] { return safetensors::decode(bytes); });
}

}  // namespace ctx
