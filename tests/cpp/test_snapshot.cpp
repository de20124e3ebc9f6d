// Snapshots, written and read; and, with arguments, the other half of tests/test_cpp.py, which
// exchanges files with Python:
//
//   test_snapshot                                      the tests
//   test_snapshot write <snapshot> <outputs>           streams tokens 0 ... 36 and saves
//   test_snapshot continue <read> <snapshot> <outputs>  loads, streams tokens 37 ... 59 and saves
//   test_snapshot flips <count> <seed> [<file> ...]     that many changed bytes in a snapshot of
//                                                      each kind, and in these files
//   test_snapshot refused <file> ...                   none of these is a snapshot
#include <torch/csrc/jit/serialization/pickle.h>
#include <unistd.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <random>
#include <system_error>

#include "check.h"
#include "ctx/session.h"
#include "ctx/snapshot.h"
#include "streams.h"

namespace {

namespace fs = std::filesystem;
using ctx::KVMemory;
using ctx::Snapshot;
using ctx::test::options;
using ctx::test::same;
using ctx::test::step;
using ctx::test::Tokens;

// A folder of this process, gone at the end.
class Folder {
 public:
  Folder() : path_(fs::temp_directory_path() / ("ctx-" + std::to_string(::getpid()))) {
    fs::create_directory(path_);
  }
  ~Folder() { fs::remove_all(path_); }
  std::string operator/(const char* name) const { return path_ / name; }
  int64_t files() const { return std::distance(fs::directory_iterator(path_), {}); }

 private:
  fs::path path_;
};

void write_bytes(const std::string& path, const std::vector<char>& bytes) {
  std::ofstream(path, std::ios::binary)
      .write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

std::vector<char> read_bytes(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

void test_round_trip(const Folder& folder) {
  for (const char* compressor : {"mean", "max", "conv", "dilated", "gated"}) {
    for (at::ScalarType dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kHalf}) {
      KVMemory memory(options(compressor, dtype)), restored(options(compressor, dtype));
      step(memory, Tokens(0, 37, dtype));
      memory.save(folder / "memory.ctx");
      restored.load(folder / "memory.ctx");
      EXPECT(same(memory, restored) && folder.files() == 1);
      EXPECT(same(step(memory, Tokens(37, 23, dtype)), step(restored, Tokens(37, 23, dtype))));
      EXPECT(same(memory, restored));
    }
  }
}

void test_other_type() {
  KVMemory memory(options()), wide(options("conv", at::kDouble)), back(options());
  step(memory, Tokens(0, 37));
  wide.load_state_dict(memory.state_dict());
  back.load_state_dict(wide.state_dict());
  EXPECT(same(memory, back));
}

// Anything else than a whole snapshot is refused before anything is written.
void test_bad_files(const Folder& folder) {
  KVMemory memory(options());
  step(memory, Tokens(0, 37));
  const KVMemory before = memory.clone();
  const std::string path = folder / "memory.ctx", bad = folder / "bad.ctx";
  memory.save(path);
  const std::vector<char> bytes = read_bytes(path);
  for (size_t size = 0; size < bytes.size(); size += 1 + bytes.size() / 40) {
    write_bytes(bad, {bytes.begin(), bytes.begin() + static_cast<ptrdiff_t>(size)});
    EXPECT_THROWS(c10::ValueError, "ctx.KVMemory.load: path must be a snapshot", memory.load(bad));
  }
  write_bytes(bad, torch::jit::pickle_save(at::zeros({3})));
  EXPECT_THROWS(c10::ValueError, "ctx.KVMemory.load: path must be a snapshot", memory.load(bad));

  const auto refused = [&](const char* begin, const auto& change) {
    Snapshot state = before.state_dict();
    change(state);
    EXPECT_THROWS(c10::ValueError, begin, memory.load_state_dict(state));
    ctx::write_snapshot(state, bad);
    EXPECT_THROWS(c10::ValueError, begin, memory.load(bad));
  };
  refused("ctx.KVMemory.load_state_dict: version must be 2, got 3",
          [](Snapshot& s) { s["version"] = int64_t{3}; });
  refused("ctx.KVMemory.load_state_dict: sinks must be 1 as the memory's, got 5",
          [](Snapshot& s) { s["sinks"] = int64_t{5}; });
  refused("ctx.KVMemory.load_state_dict: rotary_base must be 10000",
          [](Snapshot& s) { s["rotary_base"] = 10000.000001; });
  refused("ctx.KVMemory.load_state_dict: sink_keys must be in the snapshot",
          [](Snapshot& s) { s.erase("sink_keys"); });
  EXPECT(same(memory, before));

  const auto system_error = [&](const std::string& target, auto call) {
    try {
      call(target);
      EXPECT(false && "a std::system_error");
    } catch (const std::system_error& error) {
      EXPECT(std::string(error.what()).find(target) != std::string::npos);
    }
  };
  system_error(folder / "missing", [&](const std::string& at) { memory.load(at); });
  system_error(folder / "missing/file", [&](const std::string& at) { memory.save(at); });
  EXPECT(read_bytes(path) == bytes && same(memory, before) && folder.files() == 2);
}

bool same_parts(const Snapshot& one, const Snapshot& other) {
  const auto same_part = [](const auto& a, const auto& b) {
    if (a.first != b.first || a.second.index() != b.second.index()) return false;
    return std::visit(
        [&](const auto& part) {
          const auto& twin = std::get<std::decay_t<decltype(part)>>(b.second);
          if constexpr (std::is_same_v<decltype(part), const at::Tensor&>) {
            return same(part, twin);
          } else {
            return part == twin;
          }
        },
        a.second);
  };
  return std::equal(one.begin(), one.end(), other.begin(), other.end(), same_part);
}

// A damaged file is refused: every byte counts for the checksum.
void test_damaged_files(const Folder& folder) {
  KVMemory memory(options());
  step(memory, Tokens(0, 37));
  const KVMemory before = memory.clone();
  memory.save(folder / "memory.ctx");
  const std::vector<char> bytes = read_bytes(folder / "memory.ctx");
  for (size_t place = 0; place < bytes.size(); place += 3) {
    std::vector<char> damaged = bytes;
    damaged[place] = static_cast<char>(damaged[place] ^ (1 + static_cast<int>(place) % 255));
    write_bytes(folder / "bad.ctx", damaged);
    EXPECT_THROWS(c10::ValueError,
                  "ctx.KVMemory.load: path must be a snapshot, got a damaged or foreign file: ",
                  memory.load(folder / "bad.ctx"));
    EXPECT(same(memory, before));
  }
}

void test_parts_of_every_type() {
  Snapshot whole = {{"a name", std::string("\"\\\n\xc3\xbc")},
                    {"none", std::string()},
                    {"least", std::numeric_limits<int64_t>::min()},
                    {"third", 1.0 / 3},
                    {"integral", 2.0},
                    {"huge", 1e300}};
  for (const at::ScalarType type : {at::kDouble,
                                    at::kFloat,
                                    at::kHalf,
                                    at::kBFloat16,
                                    at::kLong,
                                    at::kInt,
                                    at::kShort,
                                    at::kChar,
                                    at::kByte,
                                    at::kBool})
    whole[c10::toString(type)] = at::ones({2, 3}, type).t();
  whole["empty"] = at::zeros({3, 0});
  whole["scalar"] = at::scalar_tensor(2.5);
  const std::vector<char> bytes = ctx::snapshot_bytes(whole);
  EXPECT(same_parts(ctx::snapshot_of_bytes(bytes), whole));
  const auto refused = [](const char* begin, const Snapshot& bad) {
    EXPECT_THROWS(c10::ValueError, begin, ctx::snapshot_bytes(bad));
  };
  refused("ctx::snapshot_bytes: x must be finite, got inf",
          {{"x", std::numeric_limits<double>::infinity()}});
  refused("ctx::snapshot_bytes: x must be a dense tensor", {{"x", at::Tensor()}});
  refused("ctx::snapshot_bytes: names must be UTF-8", {{"\xff", at::zeros({1})}});
}

// --- changed bytes

using Bytes = std::vector<char>;

// CRC-32, a bit at a time.
uint32_t plain_sum(const Bytes& bytes) {
  uint32_t sum = ~0u;
  for (const char byte : bytes) {
    sum ^= static_cast<unsigned char>(byte);
    for (int bit = 0; bit < 8; ++bit) sum = (sum >> 1) ^ (sum & 1 ? 0xedb88320u : 0);
  }
  return ~sum;
}

// The same with the right checksum, if there is one.
Bytes sealed(Bytes bytes) {
  const std::string mark = std::string(ctx::kChecksum) + "\":\"";
  const auto found = std::search(bytes.begin(), bytes.end(), mark.begin(), mark.end());
  if (bytes.end() - found < static_cast<ptrdiff_t>(mark.size()) + 8) return bytes;
  const auto digits = found + static_cast<ptrdiff_t>(mark.size());
  std::fill_n(digits, 8, '0');
  char text[9];
  std::snprintf(text, sizeof(text), "%08x", static_cast<unsigned>(plain_sum(bytes)));
  std::copy_n(text, 8, digits);
  return bytes;
}

// Reads a changed snapshot `count` times: `same` says whether what is read is what was written.
// With the right checksum anything may be read, or is refused.
int64_t flip(const Bytes& whole,
             int64_t count,
             uint64_t seed,
             const std::function<bool(const Bytes&)>& same) {
  std::mt19937_64 chance(seed);
  int64_t refused = 0;
  const auto read = [&](const Bytes& bytes, bool any) {
    try {
      EXPECT(same(bytes) || any);
    } catch (const c10::ValueError&) {
      refused += !any;
    } catch (const c10::TypeError&) {
      EXPECT(any);
    }
  };
  EXPECT(same(whole) && same(sealed(whole)));
  for (int64_t i = 0; i < count; ++i) {
    Bytes changed = whole;
    char& byte = changed[chance() % whole.size()];
    byte = static_cast<char>(byte ^ (1 + chance() % 255));
    read(changed, false);
    read(sealed(changed), true);
  }
  return refused;
}

int flips(int64_t count, uint64_t seed, const std::vector<std::string>& files) {
  const auto said = [&](const std::string& what, int64_t refused) {
    std::printf("%s: %lld changed bytes, %lld refused\n",
                what.c_str(),
                static_cast<long long>(count),
                static_cast<long long>(refused));
  };
  for (const char* compressor : {"conv", "most_used"}) {
    KVMemory memory(options(compressor)), other(options(compressor));
    step(memory, Tokens(0, 37));
    const Bytes whole = ctx::snapshot_bytes(memory.state_dict());
    const int64_t refused = flip(whole, count, seed, [&](const Bytes& bytes) {
      other.load_state_dict(ctx::snapshot_of_bytes(bytes));
      return same(memory, other);
    });
    EXPECT(refused == count);
    said(std::string("memory, ") + compressor, refused);
  }
  ctx::Session session(std::vector<ctx::MemoryOptions>(2, options()), 2);
  const int64_t id = session.join();
  const Tokens x(0, 23, at::kFloat, 1);
  for (int64_t layer = 0; layer < 2; ++layer) session.step({id}, layer, x.q, x.k, x.v);
  const Bytes whole = session.snapshot(id);
  const int64_t refused = flip(whole, count, seed, [&](const Bytes& bytes) {
    const int64_t made = session.restore(bytes);
    const Bytes again = session.snapshot(made);
    session.leave(made);
    return again == whole;
  });
  EXPECT(refused == count && session.ids() == std::vector<int64_t>{id});
  said("session", refused);
  for (const std::string& file : files) {
    const Snapshot want = ctx::read_snapshot(file);
    said(file, flip(read_bytes(file), count, seed, [&](const Bytes& bytes) {
           return same_parts(ctx::snapshot_of_bytes(bytes), want);
         }));
  }
  return ctx::test::status();
}

int all_refused(const std::vector<std::string>& files) {
  for (const std::string& file : files)
    EXPECT_THROWS(c10::ValueError, "ctx.KVMemory.load: path must be", ctx::read_snapshot(file));
  return ctx::test::status();
}

int write(const std::string& snapshot, const std::string& outputs) {
  KVMemory memory(options());
  write_bytes(outputs, torch::jit::pickle_save(step(memory, Tokens(0, 37))));
  memory.save(snapshot);
  return 0;
}

int go_on(const std::string& read, const std::string& snapshot, const std::string& outputs) {
  KVMemory memory(options());
  memory.load(read);
  write_bytes(outputs, torch::jit::pickle_save(step(memory, Tokens(37, 23))));
  memory.save(snapshot);
  return 0;
}

}  // namespace

// torch's own reader of archives keeps what it has allocated when it finds no way to go on.
extern "C" CTX_API const char* __lsan_default_suppressions() { return "leak:mz_zip_"; }

int main(int count, char** arguments) {
  const std::vector<std::string> words(arguments + 1, arguments + count);
  if (words.size() == 3 && words[0] == "write") return write(words[1], words[2]);
  if (words.size() == 4 && words[0] == "continue") return go_on(words[1], words[2], words[3]);
  if (words.size() >= 3 && words[0] == "flips") {
    return flips(std::stoll(words[1]), std::stoull(words[2]), {words.begin() + 3, words.end()});
  }
  if (words.size() >= 2 && words[0] == "refused")
    return all_refused({words.begin() + 1, words.end()});
  const Folder folder;
  test_round_trip(folder);
  test_other_type();
  test_bad_files(folder);
  test_damaged_files(folder);
  test_parts_of_every_type();
  return flips(200, 1, {});
}
