#include "ops/settings.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <mutex>

#include "ops/check.h"
#include "ops/shapes.h"
#include "ops/state.h"

namespace ctx::ops {
namespace {

void check_parameter(const at::Tensor& tensor,
                     const char* name,
                     at::IntArrayRef sizes,
                     at::Device device,
                     const char* where) {
  CTX_CHECK_VALUE(tensor.defined() && tensor.sym_sizes() == c10::fromIntArrayRefSlow(sizes),
                  where,
                  name,
                  " must be ",
                  sizes,
                  ", got ",
                  tensor.defined() ? tensor.sym_sizes() : c10::SymIntArrayRef{});
  check_device(where, name, tensor, device);
  check_floating(where, name, tensor);
}

}  // namespace

Storage storage_of(at::ScalarType dtype, const char* where, const char* name) {
  switch (dtype) {
    case at::kFloat:
      return Storage::kFloat32;
    case at::kDouble:
      return Storage::kFloat64;
    case at::kBFloat16:
      return Storage::kBFloat16;
    case at::kHalf:
      return Storage::kFloat16;
    default:
      CTX_CHECK_TYPE(
          false, where, name, " must be float32, float64, bfloat16 or float16, got ", dtype);
  }
}

Storage slot_storage_of(at::ScalarType dtype,
                        at::ScalarType pairs,
                        const char* where,
                        const char* name) {
  const auto allowed = slot_types(pairs);
  CTX_CHECK_TYPE(
      std::find(allowed.begin(), allowed.end(), dtype) != allowed.end(),
      where,
      name,
      " must be ",
      pairs == at::kDouble ? "float64 as the memory" : "one of float32, bfloat16, float16 or int8",
      ", got ",
      dtype);
  return dtype == at::kChar ? Storage::kInt8 : storage_of(dtype, where, name);
}

PackedSettings pack(const Settings& x) {
  const Schedule& s = x.schedule();
  PackedSettings packed{{s.window,
                         s.compressed,
                         s.ratio,
                         s.segment,
                         s.sinks,
                         s.overlap,
                         x.clock.token_distance,
                         x.rotary.dim,
                         x.rotary.interleaved,
                         x.rotary.keys_rotated,
                         x.slot_mass,
                         static_cast<int64_t>(x.compressor)},
                        {x.scale, x.logit_softcap, x.rotary.attention_factor}};
  const double* const frequency = x.rotary.inv_freq;
  packed.numbers.insert(packed.numbers.end(), frequency, frequency + x.rotary.dim / 2);
  return packed;
}

Settings unpack(at::IntArrayRef i, at::ArrayRef<double> numbers, const char* where) {
  constexpr size_t kIntegers = 12, kNumbers = 3;
  CTX_CHECK_VALUE(i.size() == kIntegers, where, "settings must be 12 integers, got ", i);
  const int64_t dim = i[7];
  CTX_CHECK_VALUE(dim >= 0 && dim % 2 == 0 && dim <= 2 * Schedule::kLimit,
                  where,
                  "rotary_dim must be even and at least 0, got ",
                  dim);
  CTX_CHECK_VALUE(numbers.size() == kNumbers + static_cast<size_t>(dim / 2),
                  where,
                  "numbers must be ",
                  kNumbers + static_cast<size_t>(dim / 2),
                  ", got ",
                  numbers.size());
  CTX_CHECK_VALUE(i[11] >= 0 && i[11] <= static_cast<int64_t>(CompressorKind::kGiven),
                  where,
                  "compressor must be a number of one, got ",
                  i[11]);
  Settings x;
  x.clock.schedule = {i[0], i[1], i[2], i[3], i[4], i[5]};
  x.clock.schedule.validate();
  x.clock.token_distance = i[6] != 0;
  x.rotary = {dim, numbers.data() + kNumbers, numbers[2], i[8] != 0, i[9] != 0};
  x.slot_mass = i[10] != 0;
  x.compressor = static_cast<CompressorKind>(i[11]);
  x.scale = numbers[0];
  x.logit_softcap = numbers[1];
  return x;
}

void check_head_dim(const Settings& settings, const c10::SymInt& head_dim, const char* where) {
  CTX_CHECK_VALUE(settings.rotary.dim <= head_dim,
                  where,
                  "rotary_dim must be even and between 0 and head_dim = ",
                  head_dim,
                  ", got ",
                  settings.rotary.dim);
}

bool parse_token_distance(std::string_view distance, const char* where) {
  CTX_CHECK_VALUE(distance == "slot" || distance == "token",
                  where,
                  "distance must be \"slot\" or \"token\", got \"",
                  distance,
                  "\"");
  return distance == "token";
}

const double* inverse_frequencies(int64_t dim, double base) {
  static std::mutex mutex;
  static std::map<std::pair<int64_t, double>, std::vector<double>> known;
  const std::lock_guard<std::mutex> lock(mutex);
  std::vector<double>& made = known[{dim, base}];
  if (made.empty()) {
    for (int64_t i = 0; i < dim / 2; ++i)
      made.push_back(std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(dim)));
  }
  return made.data();
}

CompressorKind parse_compressor(std::string_view name, const char* where) {
  if (name == "mean") return CompressorKind::kMean;
  if (name == "max") return CompressorKind::kMax;
  if (name == "conv") return CompressorKind::kConv;
  if (name == "dilated") return CompressorKind::kDilated;
  if (name == "gated") return CompressorKind::kGated;
  if (name == "most_used") return CompressorKind::kMostUsed;
  if (name == "custom") return CompressorKind::kGiven;
  CTX_CHECK_VALUE(false,
                  where,
                  "compressor must be \"mean\", \"max\", \"conv\", \"dilated\", \"gated\", "
                  "\"most_used\" or \"custom\", got \"",
                  name,
                  "\"");
}

int64_t overlap_of(CompressorKind kind, at::TensorList parameters, int64_t ratio) {
  if (kind == CompressorKind::kDilated) return dilated_overlap(ratio);
  if (kind != CompressorKind::kConv || parameters.empty()) return 0;
  const at::Tensor& weight = parameters[0];
  if (!weight.defined() || weight.dim() != 4) return 0;
  return std::max<int64_t>(0, weight.sym_size(1).guard_int(__FILE__, __LINE__) - ratio);
}

void check_parameters(CompressorKind kind,
                      at::TensorList parameters,
                      int64_t kv_heads,
                      int64_t ratio,
                      int64_t overlap,
                      int64_t head_dim,
                      int64_t value_dim,
                      at::Device device,
                      const char* where) {
  const auto check = [&](size_t index, const char* name, std::initializer_list<int64_t> sizes) {
    check_parameter(
        parameters[index], name, at::IntArrayRef(sizes.begin(), sizes.size()), device, where);
  };
  const auto count = parameters.size();
  const int64_t fixed = kind == CompressorKind::kDilated ? dilated_overlap(ratio) : 0;
  CTX_CHECK_VALUE(
      overlap == fixed || kind == CompressorKind::kConv || kind == CompressorKind::kGiven,
      where,
      "schedule must have the compressor's overlap = ",
      fixed,
      ", got ",
      overlap);
  switch (kind) {
    case CompressorKind::kMean:
    case CompressorKind::kMax:
    case CompressorKind::kMostUsed:
    case CompressorKind::kGiven:
      CTX_CHECK_VALUE(count == 0, where, "compressor must have no parameters, got ", count);
      return;
    case CompressorKind::kConv:
      CTX_CHECK_VALUE(count == 2 || count == 4,
                      where,
                      "compressor \"conv\" must have 2 or 4 parameters, got ",
                      count);
      check(0, "key_weight", {kv_heads, ratio + overlap, head_dim, head_dim});
      check(1, "value_weight", {kv_heads, ratio + overlap, value_dim, value_dim});
      if (count == 4) {
        check(2, "key_bias", {kv_heads, head_dim});
        check(3, "value_bias", {kv_heads, value_dim});
      }
      return;
    case CompressorKind::kDilated: {
      CTX_CHECK_VALUE(
          count == 6, where, "compressor \"dilated\" must have 6 parameters, got ", count);
      const int64_t deeper = dilated_layers(ratio) - 1;
      const int64_t keys = 2 * head_dim, values = 2 * value_dim;
      check(0, "key_first", {kv_heads, 2, head_dim, keys});
      check(1, "key_hidden", {kv_heads, deeper, 2, keys, keys});
      check(2, "key_weight", {kv_heads, ratio, keys, head_dim});
      check(3, "value_first", {kv_heads, 2, value_dim, values});
      check(4, "value_hidden", {kv_heads, deeper, 2, values, values});
      check(5, "value_weight", {kv_heads, ratio, values, value_dim});
      return;
    }
    case CompressorKind::kGated:
      CTX_CHECK_VALUE(
          count == 4, where, "compressor \"gated\" must have 4 parameters, got ", count);
      check(0, "key_gate", {kv_heads, head_dim});
      check(1, "key_position", {kv_heads, ratio});
      check(2, "value_gate", {kv_heads, head_dim});
      check(3, "value_position", {kv_heads, ratio});
      return;
  }
}

}  // namespace ctx::ops
