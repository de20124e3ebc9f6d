#include "core/archive.h"

#include <array>
#include <cstdint>
#include <cstring>
#include <optional>

// The format: PKWARE's APPNOTE.TXT, sections 4.3.7 (local header), 4.3.12 (central directory),
// 4.3.14 to 4.3.16 (its end, for large archives and for small ones), 4.5.3 (large sizes).
namespace ctx {
namespace {

constexpr uint32_t kLarge = 0xffffffff;  // "look in the large field"

// CRC-32 of zip, eight bytes at a time: table[k][b] is the checksum of b with k zeros behind it.
constexpr auto kTables = [] {
  std::array<std::array<uint32_t, 256>, 8> tables{};
  for (uint32_t byte = 0; byte < 256; ++byte) {
    uint32_t sum = byte;
    for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ (sum & 1 ? 0xedb88320u : 0);
    tables[0][byte] = sum;
  }
  for (size_t k = 1; k < tables.size(); ++k) {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      const uint32_t sum = tables[k - 1][byte];
      tables[k][byte] = (sum >> 8) ^ tables[0][sum & 255];
    }
  }
  return tables;
}();

uint32_t checksum(const unsigned char* at, uint64_t size) {
  uint32_t sum = ~0u;
  for (; size >= 8; size -= 8, at += 8) {
    uint32_t next = 0;
    for (int i = 0; i < 4; ++i) next ^= kTables[7 - i][(at[i] ^ (sum >> (8 * i))) & 255];
    for (int i = 4; i < 8; ++i) next ^= kTables[7 - i][at[i]];
    sum = next;
  }
  for (; size > 0; --size, ++at) sum = (sum >> 8) ^ kTables[0][(sum ^ *at) & 255];
  return ~sum;
}

class Bytes {
 public:
  explicit Bytes(const std::vector<char>& bytes)
      : begin_(reinterpret_cast<const unsigned char*>(bytes.data())), size_(bytes.size()) {}

  uint64_t size() const { return size_; }
  bool has(uint64_t at, uint64_t count) const { return at <= size_ && count <= size_ - at; }
  const unsigned char* from(uint64_t at) const { return begin_ + at; }

  // Little-endian; the caller knows that it is there.
  template <typename Int>
  Int read(uint64_t at) const {
    Int value = 0;
    for (size_t i = 0; i < sizeof(Int); ++i) {
      value = static_cast<Int>(value | (static_cast<Int>(begin_[at + i]) << (8 * i)));
    }
    return value;
  }

  // Whether a header of `count` bytes that begins with this mark is there.
  bool marked(uint64_t at, uint64_t count, uint32_t mark) const {
    return has(at, count) && read<uint32_t>(at) == mark;
  }

 private:
  const unsigned char* begin_;
  uint64_t size_;
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

}  // namespace

bool is_whole_archive(const std::vector<char>& given) {
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
    if (!bytes.marked(record->begin, local_head, 0x04034b50)) return false;
    const uint64_t name = bytes.read<uint16_t>(record->begin + 26);
    const uint64_t data =
        record->begin + local_head + name + bytes.read<uint16_t>(record->begin + 28);
    if (!bytes.has(data, record->size)) return false;
    // Readers go by the directory's name or by the header's: they must be one.
    if (name != bytes.read<uint16_t>(entry + 28) ||
        std::memcmp(bytes.from(record->begin + local_head), bytes.from(entry + head), name) != 0) {
      return false;
    }
    if (checksum(bytes.from(data), record->size) != bytes.read<uint32_t>(entry + 16)) return false;
    entry = next;
  }
  return entry == end;
}

}  // namespace ctx
