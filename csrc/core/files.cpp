#include "core/files.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cstdio>
#include <filesystem>
#include <system_error>

#include "ops/check.h"

namespace ctx::files {
namespace {

namespace fs = std::filesystem;

[[noreturn]] void fail(const char* what, const fs::path& path) {
  throw std::system_error(errno, std::generic_category(), std::string(what) + path.string());
}

// A file descriptor that is closed at the end.
class File {
 public:
  File(const fs::path& path, int flags)
      : path_(path), descriptor_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
    if (descriptor_ < 0) fail("ctx: cannot open ", path_);
  }
  ~File() {
    if (descriptor_ >= 0) ::close(descriptor_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  void write(std::span<const char> bytes) {
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

// A name beside `path` that no other thread or process is writing to. A process may have died with
// the same number, or live on another machine that shares the folder: hence the count, and O_EXCL.
fs::path create_part(const std::string& path) {
  static std::atomic<uint64_t> count{0};
  for (;;) {
    const fs::path part(path + "." + std::to_string(::getpid()) + "." + std::to_string(count++) +
                        ".part");
    const int descriptor = ::open(part.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    if (descriptor >= 0) {
      ::close(descriptor);
      return part;
    }
    if (errno != EEXIST) fail("ctx: cannot open ", part);
  }
}

// The rename itself should reach the disk, too. By now the file is whole and in its place, and not
// every file system lets a folder be opened or synchronized: no reason to fail.
void sync_folder(const fs::path& folder) {
  const int descriptor = ::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (descriptor < 0) return;
  ::fsync(descriptor);
  ::close(descriptor);
}

// The system would read the name up to there, and use another file.
void check_path(const std::string& path, const char* where) {
  CTX_CHECK_VALUE(path.find('\0') == std::string::npos,
                  where,
                  "path must not hold a null character, got one after ",
                  path.c_str());
}

}  // namespace

std::vector<char> read(const std::string& path, const char* where) {
  check_path(path, where);
  return File(path, O_RDONLY).read();
}

void replace(const std::string& path, std::span<const char> bytes, const char* where) {
  check_path(path, where);
  const fs::path target(path);
  const fs::path part = create_part(path);
  try {
    {
      File file(part, O_WRONLY);
      file.write(bytes);
      file.sync();
    }
    if (std::rename(part.c_str(), target.c_str()) != 0) fail("ctx: cannot write ", target);
  } catch (...) {
    std::error_code ignored;
    fs::remove(part, ignored);
    throw;
  }
  sync_folder(target.has_parent_path() ? target.parent_path() : fs::path("."));
}

}  // namespace ctx::files
