#include "ctx/snapshot.h"

#include <ATen/core/Dict.h>
#include <ATen/core/ivalue.h>
#include <caffe2/serialize/inline_container.h>
#include <caffe2/serialize/read_adapter_interface.h>
#include <fcntl.h>
#include <torch/csrc/jit/serialization/import_read.h>
#include <torch/csrc/jit/serialization/pickler.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <system_error>

#include "core/archive.h"
#include "ops/check.h"

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
      : path_(path), descriptor_(::open(path.c_str(), flags | O_CLOEXEC, 0666)) {
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

// As torch::jit::pickle_save, but without the types of containers, which Python's torch.load with
// weights_only=True refuses.
std::vector<char> encode(const Snapshot& snapshot) {
  c10::impl::GenericDict plain(c10::StringType::get(), c10::AnyType::get());
  for (const auto& [name, part] : snapshot) {
    plain.insert(name, std::visit([](const auto& value) { return c10::IValue(value); }, part));
  }
  std::vector<char> pickle;
  torch::jit::Pickler pickler(
      [&](const char* bytes, size_t size) { pickle.insert(pickle.end(), bytes, bytes + size); },
      /*tensor_table=*/nullptr,
      /*type_renamer=*/nullptr,
      /*memoized_class_types=*/nullptr,
      /*get_tensor_id=*/nullptr,
      /*tag_aggregates=*/false);
  pickler.protocol();
  pickler.pushIValue(plain);
  pickler.stop();

  std::vector<char> archive;
  caffe2::serialize::PyTorchStreamWriter writer([&](const void* bytes, size_t size) {
    const char* begin = static_cast<const char*>(bytes);
    archive.insert(archive.end(), begin, begin + size);
    return size;
  });
  size_t number = 0;
  for (const at::Tensor& tensor : pickler.tensorData()) {
    const auto data = torch::jit::getWriteableTensorData(tensor);
    writer.writeRecord("data/" + std::to_string(number++), data.data(), data.sizeInBytes());
  }
  writer.writeRecord("data.pkl", pickle.data(), pickle.size());
  writer.writeEndOfFile();
  return archive;
}

// torch::jit::pickle_load would read behind the end of a damaged archive.
class Reader : public caffe2::serialize::ReadAdapterInterface {
 public:
  explicit Reader(const std::vector<char>& bytes) : bytes_(bytes) {}
  size_t size() const override { return bytes_.size(); }
  size_t read(uint64_t at, void* to, size_t count, const char* /*what*/) const override {
    if (at >= bytes_.size()) return 0;
    count = std::min<size_t>(count, bytes_.size() - at);
    std::memcpy(to, bytes_.data() + at, count);
    return count;
  }

 private:
  const std::vector<char>& bytes_;
};

Snapshot decode(const std::vector<char>& bytes) {
  TORCH_CHECK(is_whole_archive(bytes), "not a whole archive");
  caffe2::serialize::PyTorchStreamReader reader(std::make_unique<Reader>(bytes));
  const c10::IValue value = torch::jit::readArchiveAndTensors(
      "data", "", "", std::nullopt, std::nullopt, std::nullopt, reader);
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

std::vector<char> snapshot_bytes(const Snapshot& snapshot) { return encode(snapshot); }

Snapshot snapshot_of_bytes(const std::vector<char>& bytes, const char* where) {
  try {
    return decode(bytes);
  } catch (const std::exception&) {  // torch has many words for what is wrong with them
    CTX_CHECK_VALUE(false,
                    where,
                    "bytes must be a snapshot, got ",
                    bytes.size(),
                    " that are damaged or of another kind");
  }
}

void write_snapshot(const Snapshot& snapshot, const std::string& path, const char* where) {
  check_path(path, where);
  const std::vector<char> bytes = encode(snapshot);
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

Snapshot read_snapshot(const std::string& path, const char* where) {
  check_path(path, where);
  const std::vector<char> bytes = File(path, O_RDONLY).read();
  try {
    return decode(bytes);
  } catch (const std::exception&) {  // torch has many words for what is wrong with a file
    CTX_CHECK_VALUE(false, where, "path must be a snapshot, got a damaged or foreign file: ", path);
  }
}

}  // namespace ctx
