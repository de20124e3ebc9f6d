#include "core/safetensors.h"

#include <ATen/Functions.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <optional>
#include <stdexcept>

#include "core/checksum.h"
#include "core/json.h"

namespace ctx::safetensors {
namespace {

static_assert(std::endian::native == std::endian::little, "as the format has it");

constexpr const char* kMetadata = "__metadata__";
constexpr uint64_t kMostHeader = 100'000'000;  // as other readers have it
constexpr size_t kMostRank = 16;
constexpr size_t kSumDigits = 8;
constexpr std::string_view kNoSum = "00000000";

struct Name {
  const char* name;
  at::ScalarType type;
};
constexpr Name kTypes[] = {{"F64", at::kDouble},
                           {"F32", at::kFloat},
                           {"F16", at::kHalf},
                           {"BF16", at::kBFloat16},
                           {"F8_E4M3", at::kFloat8_e4m3fn},
                           {"F8_E5M2", at::kFloat8_e5m2},
                           {"I64", at::kLong},
                           {"I32", at::kInt},
                           {"I16", at::kShort},
                           {"I8", at::kChar},
                           {"U8", at::kByte},
                           {"BOOL", at::kBool}};

template <typename... Parts>
[[noreturn]] void refuse(const Parts&... parts) {
  throw std::invalid_argument(c10::str(parts...));
}

std::string digits_of(uint32_t sum) {
  constexpr const char* hex = "0123456789abcdef";
  std::string made;
  for (int shift = 28; shift >= 0; shift -= 4) made += hex[(sum >> shift) & 15];
  return made;
}

// Of a whole file in which the digits of the checksum, at `place`, are zeros.
uint32_t sum_of(std::span<const char> bytes, size_t place) {
  const uint32_t first = crc32(bytes.first(place)), zeros = crc32(kNoSum, first);
  return crc32(bytes.subspan(place + kSumDigits), zeros);
}

// --- writing

const char* type_name(const std::string& name, at::ScalarType type) {
  for (const auto& [said, known] : kTypes) {
    if (known == type) return said;
  }
  refuse(name, " must be of a type that safetensors knows, got ", type);
}

std::string text_of(const std::string& text) {
  if (!json::is_utf8(text)) refuse("names must be UTF-8, got another: ", text);
  return json::quoted(text);
}

// As the format keeps it: contiguous, in memory of the host.
at::Tensor plain(const std::string& name, const at::Tensor& tensor) {
  if (!tensor.defined() || tensor.layout() != at::kStrided || tensor.is_meta())
    refuse(name, " must be a dense tensor with values, got another");
  return tensor.detach().cpu().resolve_conj().resolve_neg().contiguous();
}

// --- reading

struct Entry {
  std::string name;
  at::ScalarType type;
  std::vector<int64_t> sizes;
  uint64_t begin, end;
};

Entry read_entry(json::Cursor& from, const std::string& name) {
  std::optional<std::string> type;
  std::optional<std::vector<int64_t>> sizes, offsets;
  const auto integers = [&] {
    std::vector<int64_t> made;
    from.array([&] {
      if (made.size() == kMostRank)
        refuse(name, " must have at most ", kMostRank, " dimensions, got more");
      made.push_back(from.integer());
    });
    return made;
  };
  from.object([&](const std::string& key) {
    if (key == "dtype") {
      type = from.string();
    } else if (key == "shape") {
      sizes = integers();
    } else if (key == "data_offsets") {
      offsets = integers();
    } else {
      refuse(name, " must have dtype, shape and data_offsets, got ", key);
    }
  });
  if (!type || !sizes || !offsets || offsets->size() != 2 || (*offsets)[0] > (*offsets)[1])
    refuse(name, " must have a dtype, a shape and two data_offsets that ascend, got others");
  const auto* const known = std::find_if(
      std::begin(kTypes), std::end(kTypes), [&](const Name& one) { return one.name == *type; });
  if (known == std::end(kTypes)) refuse(name, " must be of a known dtype, got ", *type);

  // The product of the sizes that are not zero is what strides are made of: it must not overflow.
  const auto width = static_cast<int64_t>(c10::elementSize(known->type));
  int64_t extent = width, bytes = width;
  for (const int64_t size : *sizes) {
    if (__builtin_mul_overflow(extent, std::max<int64_t>(size, 1), &extent))
      refuse(name, " must have sizes whose product fits into 63 bits, got more");
    bytes = size == 0 ? 0 : bytes * size;
  }
  const int64_t held = (*offsets)[1] - (*offsets)[0];
  if (bytes != held) refuse(name, " must have ", bytes, " bytes as its sizes say, got ", held);
  return {name,
          known->type,
          *sizes,
          static_cast<uint64_t>((*offsets)[0]),
          static_cast<uint64_t>((*offsets)[1])};
}

// They follow one another and fill the data.
void check_places(std::vector<Entry>& entries, uint64_t size) {
  std::sort(entries.begin(), entries.end(), [](const Entry& one, const Entry& other) {
    return std::pair(one.begin, one.end) < std::pair(other.begin, other.end);
  });
  uint64_t end = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != end)
      refuse(entry.name, " must begin at byte ", end, " of the data, got ", entry.begin);
    end = entry.end;
  }
  if (end != size) refuse("data must have ", end, " bytes as the header says, got ", size);
}

at::Tensor read_tensor(const Entry& entry, std::span<const char> data) {
  at::Tensor made = at::empty(entry.sizes, at::TensorOptions(entry.type).device(at::kCPU));
  const auto bytes = data.subspan(entry.begin, entry.end - entry.begin);
  const auto is_flag = [](char byte) { return byte == 0 || byte == 1; };
  if (entry.type == at::kBool && !std::all_of(bytes.begin(), bytes.end(), is_flag))
    refuse(entry.name, " must be of bytes that are 0 or 1, got others");
  if (!bytes.empty()) std::memcpy(made.mutable_data_ptr(), bytes.data(), bytes.size());
  return made;
}

}  // namespace

std::vector<char> encode(const TensorFile& file) {
  std::vector<std::pair<std::string, at::Tensor>> tensors;
  for (const auto& [name, tensor] : file.tensors) {
    if (name == kMetadata) refuse("names must be others than ", kMetadata, ", got it");
    tensors.emplace_back(name, plain(name, tensor));
  }
  // The widest first: every tensor is then aligned to its elements.
  std::stable_sort(tensors.begin(), tensors.end(), [](const auto& one, const auto& other) {
    return one.second.element_size() > other.second.element_size();
  });

  std::string header = c10::str("{\"", kMetadata, "\":{\"", kChecksum, "\":\"");
  const size_t place = sizeof(uint64_t) + header.size();
  header += c10::str(kNoSum, "\"");
  for (const auto& [name, said] : file.metadata) {
    if (name != kChecksum) header += c10::str(",", text_of(name), ":", text_of(said));
  }
  header += "}";
  uint64_t begin = 0;
  for (const auto& [name, tensor] : tensors) {
    const uint64_t end = begin + tensor.nbytes();
    header += c10::str(",",
                       text_of(name),
                       ":{\"dtype\":\"",
                       type_name(name, tensor.scalar_type()),
                       "\",\"shape\":[",
                       c10::Join(",", tensor.sizes()),
                       "],\"data_offsets\":[",
                       begin,
                       ",",
                       end,
                       "]}");
    begin = end;
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  const uint64_t length = header.size();
  if (length > kMostHeader)
    refuse("header must have at most ", kMostHeader, " bytes, got ", length);

  std::vector<char> bytes(sizeof(length));
  std::memcpy(bytes.data(), &length, sizeof(length));
  bytes.reserve(sizeof(length) + length + begin);
  bytes.insert(bytes.end(), header.begin(), header.end());
  for (const auto& [name, tensor] : tensors) {
    const auto* const from = static_cast<const char*>(tensor.const_data_ptr());
    bytes.insert(bytes.end(), from, from + tensor.nbytes());
  }
  const std::string sum = digits_of(sum_of(bytes, place));
  std::copy(sum.begin(), sum.end(), bytes.begin() + static_cast<ptrdiff_t>(place));
  return bytes;
}

TensorFile decode(std::span<const char> bytes) {
  uint64_t length = 0;
  if (bytes.size() < sizeof(length))
    refuse("file must have at least ", sizeof(length), " bytes, got ", bytes.size());
  std::memcpy(&length, bytes.data(), sizeof(length));
  const uint64_t most = std::min<uint64_t>(bytes.size() - sizeof(length), kMostHeader);
  if (length > most) refuse("header must have at most ", most, " bytes, got ", length);
  const std::string_view header(bytes.data() + sizeof(length), length);
  const auto data = bytes.subspan(sizeof(length) + length);
  if (header.empty() || header[0] != '{') refuse("header must begin with {, got another");

  TensorFile file;
  std::vector<Entry> entries;
  std::optional<size_t> place;  // of the checksum's digits
  json::Cursor from(header);
  from.object([&](const std::string& name) {
    if (name != kMetadata) return entries.push_back(read_entry(from, name));
    from.object([&](const std::string& key) {
      const std::string said = file.metadata[key] = from.string();
      if (key != kChecksum) return;
      if (said.size() != kSumDigits) refuse("checksum must have 8 digits, got ", said);
      place = sizeof(length) + from.place() - 1 - kSumDigits;  // before the quote
    });
  });
  from.end();
  check_places(entries, data.size());
  if (place) {
    const std::string want = digits_of(sum_of(bytes, *place)), got = file.metadata[kChecksum];
    if (got != want) refuse("checksum must be ", want, ", got ", got);
  }
  const c10::InferenceMode off(false);  // ordinary tensors, also where the caller is in it
  for (const Entry& entry : entries) file.tensors[entry.name] = read_tensor(entry, data);
  return file;
}

}  // namespace ctx::safetensors
