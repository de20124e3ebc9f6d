#include "core/archive.h"

#include <ATen/ATen.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Dict.h>
#include <caffe2/serialize/inline_container.h>
#include <caffe2/serialize/read_adapter_interface.h>
#include <torch/csrc/jit/serialization/unpickler.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <optional>

#include "core/checksum.h"

// The format: PKWARE's APPNOTE.TXT, sections 4.3.7 (local header), 4.3.12 (central directory),
// 4.3.14 to 4.3.16 (its end, for large archives and for small ones), 4.5.3 (large sizes).
namespace ctx {
namespace {

constexpr uint32_t kLarge = 0xffffffff;  // "look in the large field"
constexpr uint32_t kRecord = 0x04034b50;

class Bytes {
 public:
  explicit Bytes(std::span<const char> bytes) : bytes_(bytes) {}

  uint64_t size() const { return bytes_.size(); }
  bool has(uint64_t at, uint64_t count) const { return at <= size() && count <= size() - at; }
  const char* from(uint64_t at) const { return bytes_.data() + at; }
  uint32_t checksum(uint64_t at, uint64_t count) const { return crc32(bytes_.subspan(at, count)); }

  // Little-endian; the caller knows that it is there.
  template <typename Int>
  Int read(uint64_t at) const {
    Int value = 0;
    for (size_t i = 0; i < sizeof(Int); ++i) {
      const auto byte = static_cast<unsigned char>(bytes_[at + i]);
      value = static_cast<Int>(value | (static_cast<Int>(byte) << (8 * i)));
    }
    return value;
  }

  // Whether a header of `count` bytes that begins with this mark is there.
  bool marked(uint64_t at, uint64_t count, uint32_t mark) const {
    return has(at, count) && read<uint32_t>(at) == mark;
  }

 private:
  std::span<const char> bytes_;
};

struct Directory {
  uint64_t entries, size, begin;
};

std::optional<Directory> find_directory(const Bytes& bytes) {
  constexpr uint64_t small = 22, locator = 20, large = 56;
  if (bytes.size() < small) return std::nullopt;
  const uint64_t end = bytes.size() - small;
  if (!bytes.marked(end, small, 0x06054b50)) return std::nullopt;
  if (end >= locator && bytes.marked(end - locator, locator, 0x07064b50)) {
    const uint64_t at = bytes.read<uint64_t>(end - locator + 8);
    if (!bytes.marked(at, large, 0x06064b50)) return std::nullopt;
    return Directory{bytes.read<uint64_t>(at + 32),
                     bytes.read<uint64_t>(at + 40),
                     bytes.read<uint64_t>(at + 48)};
  }
  return Directory{bytes.read<uint16_t>(end + 10),
                   bytes.read<uint32_t>(end + 12),
                   bytes.read<uint32_t>(end + 16)};
}

struct Record {
  uint64_t size, stored, begin;
};

// The sizes of a directory entry, from its large fields where they did not fit.
std::optional<Record> read_sizes(const Bytes& bytes, uint64_t entry, uint64_t extra, uint64_t end) {
  Record record{bytes.read<uint32_t>(entry + 24),
                bytes.read<uint32_t>(entry + 20),
                bytes.read<uint32_t>(entry + 42)};
  while (end - extra >= 4) {
    const uint64_t size = bytes.read<uint16_t>(extra + 2);
    uint64_t at = extra + 4;
    if (size > end - at) return std::nullopt;
    extra = at + size;
    if (bytes.read<uint16_t>(at - 4) != 1) continue;
    for (uint64_t* field : {&record.size, &record.stored, &record.begin}) {
      if (*field != kLarge) continue;
      if (extra - at < 8) return std::nullopt;
      *field = bytes.read<uint64_t>(at);
      at += 8;
    }
  }
  return record;
}

// The reader's own adapters copy all bytes, or read a file.
class ArchiveReader : public caffe2::serialize::ReadAdapterInterface {
 public:
  explicit ArchiveReader(std::span<const char> bytes) : bytes_(bytes) {}
  size_t size() const override { return bytes_.size(); }
  size_t read(uint64_t at, void* to, size_t count, const char* /*what*/) const override {
    if (at >= bytes_.size()) return 0;
    count = std::min<size_t>(count, bytes_.size() - at);
    std::memcpy(to, bytes_.data() + at, count);
    return count;
  }

 private:
  std::span<const char> bytes_;
};

// Whether all records are stored as they are, each with the right checksum. torch trusts the sizes
// that it finds.
bool is_whole(std::span<const char> given) {
  const Bytes bytes(given);
  const auto directory = find_directory(bytes);
  if (!directory || !bytes.has(directory->begin, directory->size)) return false;
  constexpr uint64_t head = 46, local_head = 30;
  uint64_t entry = directory->begin;
  const uint64_t end = directory->begin + directory->size;
  for (uint64_t i = 0; i < directory->entries; ++i) {
    if (!bytes.marked(entry, head, 0x02014b50)) return false;
    const uint64_t extra = entry + head + bytes.read<uint16_t>(entry + 28);
    const uint64_t after = extra + bytes.read<uint16_t>(entry + 30);
    const uint64_t next = after + bytes.read<uint16_t>(entry + 32);
    if (next > end) return false;
    const auto record = read_sizes(bytes, entry, extra, after);
    const bool as_it_is = bytes.read<uint16_t>(entry + 10) == 0;
    const bool folder = bytes.read<uint32_t>(entry + 38) & 0x10;  // a reader would fill in nothing
    if (!record || !as_it_is || folder || record->size != record->stored) return false;
    if (!bytes.marked(record->begin, local_head, kRecord)) return false;
    const uint64_t name = bytes.read<uint16_t>(record->begin + 26);
    const uint64_t data =
        record->begin + local_head + name + bytes.read<uint16_t>(record->begin + 28);
    if (!bytes.has(data, record->size)) return false;
    // Readers go by the directory's name or by the header's: they must be one.
    if (name != bytes.read<uint16_t>(entry + 28) ||
        std::memcmp(bytes.from(record->begin + local_head), bytes.from(entry + head), name) != 0) {
      return false;
    }
    if (bytes.checksum(data, record->size) != bytes.read<uint32_t>(entry + 16)) return false;
    entry = next;
  }
  return entry == end;
}

}  // namespace

bool is_archive(std::span<const char> bytes) { return Bytes(bytes).marked(0, 4, kRecord); }

Archived read_archived(std::span<const char> bytes, std::string (*rewritten)(std::string_view)) {
  TORCH_CHECK(is_whole(bytes), "not a whole archive");
  caffe2::serialize::PyTorchStreamReader reader(std::make_unique<ArchiveReader>(bytes));
  const auto [data, size] = reader.getRecord("data.pkl");
  std::string pickle(static_cast<const char*>(data.get()), size);
  if (rewritten != nullptr) pickle = rewritten(pickle);
  size_t at = 0;
  const auto read = [&](char* to, size_t count) {
    count = std::min(count, pickle.size() - at);
    std::memcpy(to, pickle.data() + at, count);
    at += count;
    return count;
  };
  Archived made;
  const auto record = [&](const std::string& name) {
    auto [held, length] = reader.getRecord("data/" + name);
    made.records[held.get()] = length;
    return std::move(held);
  };
  torch::jit::Unpickler unpickler(read, nullptr, nullptr, record, std::nullopt);
  unpickler.set_version(reader.version());
  made.value = unpickler.parse_ivalue();
  return made;
}

at::Tensor Archived::tensor(const c10::IValue& part) const {
  at::Tensor made = part.toTensor();
  if (made.numel() == 0) return made;
  const auto record = records.find(made.storage().data());
  const size_t needed = at::detail::computeStorageNbytes(
      made.sizes(), made.strides(), made.itemsize(), made.storage_offset());
  TORCH_CHECK(record != records.end() && needed <= record->second, "a tensor beyond its data");
  return made;
}

Snapshot read_archive(std::span<const char> bytes) {
  const Archived archive = read_archived(bytes);
  TORCH_CHECK(archive.value.isGenericDict(), "not a dict");
  Snapshot snapshot;
  for (const auto& item : archive.value.toGenericDict()) {
    TORCH_CHECK(item.key().isString(), "not a name");
    auto& part = snapshot[item.key().toStringRef()];
    const c10::IValue& held = item.value();
    if (held.isInt()) {
      part = held.toInt();
    } else if (held.isDouble()) {
      part = held.toDouble();
    } else if (held.isString()) {
      part = held.toStringRef();
    } else {
      part = archive.tensor(held);
    }
  }
  return snapshot;
}

}  // namespace ctx
