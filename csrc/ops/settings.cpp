#include "ops/settings.h"

#include <cmath>
#include <map>
#include <mutex>

#include "core/check.h"

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
  CTX_CHECK_VALUE(
      tensor.device() == device, where, name, " must be on ", device, ", got ", tensor.device());
  CTX_CHECK_TYPE(at::isFloatingType(tensor.scalar_type()),
                 where,
                 name,
                 " must be floating point, got ",
                 tensor.scalar_type());
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
  if (dtype == at::kChar && pairs != at::kDouble) return Storage::kInt8;
  CTX_CHECK_TYPE(
      dtype == pairs || (pairs != at::kDouble && dtype != at::kDouble),
      where,
      name,
      " must be ",
      pairs == at::kDouble ? "float64 as the memory" : "float32, bfloat16, float16 or int8",
      ", got ",
      dtype);
  return storage_of(dtype, where, name);
}

Schedule parse_schedule(at::IntArrayRef values, const char* where) {
  CTX_CHECK_VALUE(
      values.size() == 5 || values.size() == 6,
      where,
      "schedule must be [window, compressed, ratio, segment, sinks] and perhaps overlap, "
      "got ",
      values);
  const int64_t overlap = values.size() == 6 ? values[5] : 0;
  const Schedule schedule{values[0], values[1], values[2], values[3], values[4], overlap};
  schedule.validate();
  return schedule;
}

bool parse_token_distance(std::string_view distance, const char* where) {
  CTX_CHECK_VALUE(distance == "slot" || distance == "token",
                  where,
                  "distance must be \"slot\" or \"token\", got \"",
                  distance,
                  "\"");
  return distance == "token";
}

// Kept for as long as the program runs: there are few.
static const double* inverse_frequencies(int64_t dim, double base) {
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

BasedRotary parse_rotary(
    int64_t dim, double base, bool interleaved, int64_t head_dim, const char* where) {
  CTX_CHECK_VALUE(dim >= 0 && dim <= head_dim && dim % 2 == 0,
                  where,
                  "rotary_dim must be even and between 0 and head_dim = ",
                  head_dim,
                  ", got ",
                  dim);
  CTX_CHECK_VALUE(std::isfinite(base) && base > 0,
                  where,
                  "rotary_base must be positive and finite, got ",
                  base);
  BasedRotary made;
  made.dim = dim, made.interleaved = interleaved, made.base = base;
  made.inv_freq = inverse_frequencies(dim, base);
  return made;
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

c10::SymInt slot_count(const Schedule& schedule, const c10::SymInt& tokens) {
  return schedule.compressed == 0 ? c10::SymInt(0) : schedule.max_new_groups(tokens);
}

c10::SymInt slot_count(const Schedule& schedule, const c10::SymInt& tokens, int64_t behind) {
  if (schedule.compressed == 0) return 0;
  const int64_t c = schedule.ratio;
  return (tokens + (c - 1)) / c + ((behind + c - 1) / c + 1);
}

at::Tensor groups_of(const Schedule& s, const at::Tensor& t) {
  const at::Tensor boundary = t.clamp_min(0).div(s.segment, "floor").mul(s.segment);
  return boundary.sub(s.sinks + s.window).clamp_min(0).div(s.ratio, "floor");
}

at::Tensor window_begin_of(const Schedule& s, const at::Tensor& groups) {
  return groups.mul(s.ratio).add(s.sinks);
}

}  // namespace ctx::ops
