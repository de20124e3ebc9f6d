// Snapshots, written and read; and, with arguments, the other half of tests/test_cpp.py, which
// exchanges files with Python:
//
//   test_snapshot                                      the tests
//   test_snapshot write <snapshot> <outputs>           streams tokens 0 ... 36 and saves
//   test_snapshot continue <read> <snapshot> <outputs>  loads, streams tokens 37 ... 59 and saves
#include <torch/csrc/jit/serialization/pickle.h>
#include <unistd.h>

#include <filesystem>
#include <fstream>
#include <system_error>

#include "check.h"
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

// A damaged file is refused, or the damage stood where nothing reads; it never ends the process.
void test_damaged_files(const Folder& folder) {
  KVMemory memory(options());
  step(memory, Tokens(0, 37));
  const KVMemory before = memory.clone();
  memory.save(folder / "memory.ctx");
  const std::vector<char> bytes = read_bytes(folder / "memory.ctx");
  int64_t refused = 0, places = 0;
  for (size_t place = 0; place < bytes.size(); place += 3, ++places) {
    std::vector<char> damaged = bytes;
    damaged[place] = static_cast<char>(damaged[place] ^ (1 + static_cast<int>(place) % 255));
    write_bytes(folder / "bad.ctx", damaged);
    try {
      memory.load(folder / "bad.ctx");
    } catch (const c10::ValueError&) {
      ++refused;
    }
    EXPECT(same(memory, before));
  }
  EXPECT(refused > places / 2);
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
  const Folder folder;
  test_round_trip(folder);
  test_other_type();
  test_bad_files(folder);
  test_damaged_files(folder);
  return ctx::test::status();
}
