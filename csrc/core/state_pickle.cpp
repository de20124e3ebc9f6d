#include "core/state_pickle.h"

#include <ATen/ATen.h>
#include <ATen/core/Dict.h>
#include <ATen/core/ivalue.h>
#include <caffe2/serialize/inline_container.h>
#include <torch/csrc/jit/serialization/pickler.h>

#include <cstring>
#include <string_view>

#include "core/archive.h"

namespace ctx {
namespace {

using at::Tensor;

// The opcodes that torch.save writes (Python's pickle, protocol 2), with operands.
enum : unsigned char {
  kProto = 0x80,
  kGlobal = 'c',  // two lines
  kBinPut = 'q',
  kLongBinPut = 'r',
  kBinGet = 'h',
  kLongBinGet = 'j',
  kBinUnicode = 'X',
  kBinInt = 'J',
  kBinInt1 = 'K',
  kBinInt2 = 'M',
  kBinFloat = 'G',
  kLong1 = 0x8a,
  kEmptyTuple = ')',
  kReduce = 'R',
  kEmptyDict = '}',
  kBuild = 'b',
  kSetItem = 's',
};

// Python's state_dict() is an OrderedDict with an attribute, which torch's C++ reader takes for
// nothing. The same pickle with plain dicts, in which the attribute has the name "":
//
//   collections.OrderedDict ()      becomes  {}
//   x {"_metadata": ...} BUILD      becomes  x "" {"_metadata": ...} SETITEM
class PlainDicts {
 public:
  explicit PlainDicts(std::string_view pickle) : rest_(pickle) {}

  std::string rewritten() {
    while (!rest_.empty()) {
      const std::string_view op = next();
      const auto code = static_cast<unsigned char>(op[0]);
      if (code == kGlobal && op == "ccollections\nOrderedDict\n") {
        const std::string_view put = next();
        ordered_ = memo_number(put, kBinPut, kLongBinPut);
        TORCH_CHECK(ordered_ >= 0, "an OrderedDict that is not remembered");
      } else if (ordered_ >= 0 && memo_number(op, kBinGet, kLongBinGet) == ordered_) {
        // the class again
      } else if (code == kEmptyTuple && !rest_.empty() && rest_[0] == kReduce) {
        next();
        made_ += kEmptyDict;
      } else if (code == kEmptyDict && begins_metadata()) {
        made_.append("X\0\0\0\0", 5).append(op);
        ++attributes_;
      } else if (code == kBuild) {
        TORCH_CHECK(attributes_-- > 0, "an object that is no dict");
        made_ += kSetItem;
      } else {
        made_ += op;
      }
    }
    return std::move(made_);
  }

 private:
  // The next opcode with its operand.
  std::string_view next() {
    const size_t size = size_of(rest_);
    TORCH_CHECK(size > 0 && size <= rest_.size(), "a pickle that ends too early");
    const std::string_view op = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return op;
  }

  static size_t size_of(std::string_view rest) {
    if (rest.empty()) return 0;
    switch (static_cast<unsigned char>(rest[0])) {
      case kProto:
      case kBinPut:
      case kBinGet:
      case kBinInt1:
        return 2;
      case kBinInt2:
        return 3;
      case kLongBinPut:
      case kLongBinGet:
      case kBinInt:
        return 5;
      case kBinFloat:
        return 9;
      case kLong1:
        return rest.size() < 2 ? 0 : 2 + static_cast<unsigned char>(rest[1]);
      case kBinUnicode: {
        uint32_t length = 0;
        if (rest.size() < 5) return 0;
        std::memcpy(&length, rest.data() + 1, sizeof(length));
        return size_t{5} + length;
      }
      case kGlobal: {
        const size_t module = rest.find('\n');
        const size_t name = module == rest.npos ? rest.npos : rest.find('\n', module + 1);
        return name == rest.npos ? 0 : name + 1;
      }
      default:
        return 1;
    }
  }

  // The number that an opcode remembers or recalls something by; -1: it is another.
  static int64_t memo_number(std::string_view op, unsigned char small, unsigned char large) {
    const auto code = static_cast<unsigned char>(op[0]);
    if (code == small) return static_cast<unsigned char>(op[1]);
    if (code != large) return -1;
    uint32_t number = 0;
    std::memcpy(&number, op.data() + 1, sizeof(number));
    return number;
  }

  // Whether a dict that begins here has the key "_metadata" first.
  bool begins_metadata() const {
    std::string_view rest = rest_;
    const size_t put = size_of(rest);
    if (put == 0 || put > rest.size() || memo_number(rest, kBinPut, kLongBinPut) < 0) return false;
    rest.remove_prefix(put);
    return rest.substr(0, 1) == "X" && rest.substr(5, 9) == "_metadata";
  }

  std::string_view rest_;
  std::string made_;
  int64_t ordered_ = -1;    // the number by which the class is remembered
  int64_t attributes_ = 0;  // that have begun
};

// The tensors of a dict.
StateDict tensors_of(const Archived& archive, const c10::IValue& value) {
  TORCH_CHECK(value.isGenericDict(), "not a dict");
  StateDict made;
  for (const auto& item : value.toGenericDict()) {
    TORCH_CHECK(item.key().isString(), "not a name");
    if (item.key().toStringRef() == "weights" && item.value().isGenericDict())
      return tensors_of(archive, item.value());
  }
  for (const auto& item : value.toGenericDict()) {
    const std::string& name = item.key().toStringRef();
    if (!name.empty()) made[name] = archive.tensor(item.value());
  }
  return made;
}

std::string plain_dicts(std::string_view pickle) { return PlainDicts(pickle).rewritten(); }

}  // namespace

StateDict read_state_pickle(const std::vector<char>& bytes) {
  const Archived archive = read_archived(bytes, plain_dicts);
  return tensors_of(archive, archive.value);
}

// As torch::jit::pickle_save, but without the types of containers, which Python's torch.load with
// weights_only=True refuses.
std::vector<char> state_pickle(const StateDict& state) {
  c10::impl::GenericDict plain(c10::StringType::get(), c10::AnyType::get());
  for (const auto& [name, tensor] : state) plain.insert(name, tensor.detach());
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
  for (const Tensor& tensor : pickler.tensorData()) {
    const auto data = torch::jit::getWriteableTensorData(tensor);
    writer.writeRecord("data/" + std::to_string(number++), data.data(), data.sizeInBytes());
  }
  writer.writeRecord("data.pkl", pickle.data(), pickle.size());
  writer.writeEndOfFile();
  return archive;
}

}  // namespace ctx
