#include "ctx/snapshot.h"

#include <ATen/core/Dict.h>
#include <ATen/core/ivalue.h>
#include <fcntl.h>
#include <torch/csrc/jit/serialization/pickle.h>
#include <unistd.h>

#include <cerrno>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "core/check.h"

namespace ctx {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const char* what, const fs::path& path) {
  throw std::system_error(errno, std::generic_category(), std::string(what) + path.string());
}

// A file descriptor that is closed at the end.
class File {
 public:
  File(const fs::path& path, int flags)
      : path_(path), descriptor_(::open(path.c_str(), flags, 0666)) {
    if (descriptor_ < 0) fail("ctx: cannot open ", path_);
  }
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  void write(const std::vector<char>& bytes) {
    for (size_t done = 0; done < bytes.size();) {
      const ssize_t count = ::write(descriptor_, bytes.data() + done, bytes.size() - done);
      if (count < 0 && errno != EINTR) fail("ctx: cannot write ", path_);
      if (count > 0) done += static_cast<size_t>(count);
    }
  }

  std::vector<char> read() {
    std::vector<char> bytes;
    char buffer[1 << 16];
    for (;;) {
      const ssize_t count = ::read(descriptor_, buffer, sizeof(buffer));
      if (count < 0 && errno != EINTR) fail("ctx: cannot read ", path_);
      if (count == 0) return bytes;
      if (count > 0) bytes.insert(bytes.end(), buffer, buffer + count);
    }
  }

  void sync() {
    if (::fsync(descriptor_) != 0) fail("ctx: cannot sync ", path_);
  }

 private:
  fs::path path_;
  int descriptor_;
};

std::vector<char> encode(const Snapshot& snapshot) {
  c10::impl::GenericDict plain(c10::StringType::get(), c10::AnyType::get());
  for (const auto& [name, part] : snapshot) {
    plain.insert(name, std::visit([](const auto& value) { return c10::IValue(value); }, part));
  }
  return torch::jit::pickle_save(plain);
}

Snapshot decode(const std::vector<char>& bytes) {
  const c10::IValue value = torch::jit::pickle_load(bytes);
  TORCH_CHECK(value.isGenericDict(), "not a dict");
  Snapshot snapshot;
  for (const auto& item : value.toGenericDict()) {
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
      part = held.toTensor();
    }
  }
  return snapshot;
}

}  // namespace

void write_snapshot(const Snapshot& snapshot, const std::string& path) {
  const std::vector<char> bytes = encode(snapshot);
  const fs::path target(path);
  const fs::path part(path + "." + std::to_string(::getpid()) + ".part");
  try {
    {
      File file(part, O_WRONLY | O_CREAT | O_TRUNC);
      file.write(bytes);
      file.sync();
    }
    if (std::rename(part.c_str(), target.c_str()) != 0) fail("ctx: cannot write ", target);
  } catch (...) {
    std::error_code ignored;
    fs::remove(part, ignored);
    throw;
  }
  // The rename itself must reach the disk, too.
  File(target.has_parent_path() ? target.parent_path() : fs::path("."), O_RDONLY).sync();
}

Snapshot read_snapshot(const std::string& path) {
  const std::vector<char> bytes = File(path, O_RDONLY).read();
  try {
    return decode(bytes);
  } catch (const std::exception&) {  // torch has many words for what is wrong with a file
    CTX_CHECK_VALUE(false,
                    "ctx.KVMemory.load",
                    "path must be a snapshot, got a damaged or foreign file: ",
                    path);
  }
}

}  // namespace ctx
