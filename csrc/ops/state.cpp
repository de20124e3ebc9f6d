#include "ops/state.h"

#include <sstream>

#include "ops/check.h"
#include "ops/settings.h"
#include "ops/shapes.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using c10::SymInt;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kNames[kStateTensors] = {"window_keys",
                                               "window_values",
                                               "compressed_keys",
                                               "compressed_values",
                                               "sink_keys",
                                               "sink_values",
                                               "attention_received",
                                               "slot_positions",
                                               "slot_mass",
                                               "seen",
                                               "rewindable"};

void check_like_memory(const Tensor& x, const Tensor& keys, const char* name, const char* where) {
  check_type(where, name, x, keys.scalar_type(), " as the memory");
  check_device(where, name, x, keys.device(), " as the memory");
  check_dense(where, name, x);
}

// What is added to scores, or multiplied with them.
void check_operand(const Tensor& x, const char* name, at::Device device, const char* where) {
  check_device(where, name, x, device);
  check_floating(where, name, x);
}

}  // namespace

const char* state_name(int index) { return kNames[index]; }

SymInt stored_width(const SymInt& width, at::ScalarType slots) {
  return slots == at::kChar ? width + kScaleBytes : width;
}

Tensor slots_as(const Tensor& rows, at::ScalarType type) {
  if (rows.scalar_type() != at::kChar) return rows.to(type);
  const SymInt width = rows.sym_size(-1) - kScaleBytes;
  // A copy: a part of a single row counts as contiguous, wherever it begins.
  const Tensor bytes =
      rows.narrow_symint(-1, width, kScaleBytes).clone(at::MemoryFormat::Contiguous);
  const Tensor scale = bytes.view(at::kFloat);
  return rows.narrow_symint(-1, 0, width).to(at::kFloat).mul(scale).to(type);
}

at::ScalarType state_type(int index, at::ScalarType pairs, at::ScalarType slots) {
  switch (index) {
    case kCompressedKeys:
    case kCompressedValues:
      return slots;
    case kAttentionReceived:
    case kSlotMass:
      return arithmetic_type(pairs);
    case kSlotPositions:
    case kSeen:
    case kRewindable:
      return at::kLong;
    default:
      return pairs;
  }
}

std::vector<at::ScalarType> slot_types(at::ScalarType pairs) {
  if (pairs == at::kDouble) return {at::kDouble};
  return {at::kFloat, at::kBFloat16, at::kHalf, at::kChar};
}

void check_layout(const Tensor& x,
                  int index,
                  c10::SymIntArrayRef sizes,
                  at::ScalarType type,
                  at::Device device,
                  const char* where) {
  const char* name = kNames[index];
  const auto named = [](at::ScalarType dtype) { return c10::getDtypeNames(dtype).first; };
  CTX_CHECK_VALUE(x.sym_sizes() == sizes, where, name, " must be ", sizes, ", got ", x.sym_sizes());
  CTX_CHECK_TYPE(x.scalar_type() == type,
                 where,
                 name,
                 " must be ",
                 named(type),
                 ", got ",
                 named(x.scalar_type()));
  check_device(where, name, x, device);
  if (x.is_contiguous()) return;
  std::ostringstream strides;  // as Python's tuple
  for (const SymInt& stride : x.sym_strides().slice(1)) strides << " " << stride << ",";
  std::string rest = strides.str();
  if (x.dim() > 1) rest.pop_back();
  CTX_CHECK_VALUE(
      false, where, name, " must be contiguous, got strides (", x.sym_stride(0), ",", rest, ")");
}

bool counts_attention(at::TensorList rings) { return rings[kAttentionReceived].sym_size(2) != 0; }
bool has_mass(at::TensorList rings) { return rings[kSlotMass].sym_size(2) != 0; }

std::array<std::vector<SymInt>, kStateTensors> StateShape::sizes() const {
  const SymInt window = schedule.window_capacity(max_rewind);
  const SymInt compressed = schedule.compressed_capacity(max_rewind);
  const SymInt none = 0;
  return {{
      {batch, kv_heads, window, head_dim},
      {batch, kv_heads, window, value_dim},
      {batch, kv_heads, compressed, stored_width(head_dim, slots)},
      {batch, kv_heads, compressed, stored_width(value_dim, slots)},
      {batch, kv_heads, schedule.sinks, head_dim},
      {batch, kv_heads, schedule.sinks, value_dim},
      {batch, kv_heads, counts ? window : none},
      {batch, kv_heads, counts ? compressed : none},
      {batch, kv_heads, mass ? compressed : none},
      {batch},
      {batch},
  }};
}

SymInt check_rings(at::TensorList rings, const Schedule& schedule, const char* where) {
  CTX_CHECK_VALUE(rings.size() == kRings,
                  where,
                  "memory must be ",
                  int{kRings},
                  " tensors, got ",
                  rings.size());
  const Tensor& keys = rings[kWindowKeys];
  const Tensor& values = rings[kWindowValues];
  check_shape(where, "window_keys", keys, {{"B"}, {"Hkv"}, {"capacity"}, {"D"}});
  check_shape(where, "window_values", values, {{"B"}, {"Hkv"}, {"capacity"}, {"Dv"}});
  const int64_t least = schedule.max_window() + schedule.overlap;
  const SymInt max_rewind = keys.sym_size(2) - least;
  CTX_CHECK_VALUE(max_rewind >= 1,
                  where,
                  "window_keys must hold more than ",
                  least,
                  " tokens for this schedule, got ",
                  keys.sym_size(2));
  const auto slots = rings[kCompressedKeys].scalar_type();
  slot_storage_of(slots, keys.scalar_type(), where, "compressed_keys");
  for (const int i : {kAttentionReceived, kSlotMass})
    check_shape(where, kNames[i], rings[i], {{"B"}, {"Hkv"}, {"capacity"}});
  const bool mass = has_mass(rings);
  const StateShape shape{schedule,
                         keys.sym_size(0),
                         keys.sym_size(1),
                         keys.sym_size(3),
                         values.sym_size(3),
                         max_rewind,
                         slots,
                         counts_attention(rings),
                         mass};
  const auto sizes = shape.sizes();
  for (int i = 0; i < kRings; ++i) {
    const auto type = state_type(i, keys.scalar_type(), slots);
    check_layout(rings[i], i, sizes[i], type, keys.device(), where);
  }
  return max_rewind;
}

void check_pairs(
    at::TensorList rings, const Tensor& k, const Tensor& v, const char* where, const SymInt& rows) {
  const Tensor& keys = rings[kWindowKeys];
  const SymInt batch = rows < 0 ? keys.sym_size(0) : rows, kv_heads = keys.sym_size(1);
  check_shape(where, "k", k, {{"B", batch}, {"Hkv", kv_heads}, {"T"}, {"D", keys.sym_size(3)}});
  check_like_memory(k, keys, "k", where);
  const SymInt width = rings[kWindowValues].sym_size(3);
  check_shape(where, "v", v, {{"B", batch}, {"Hkv", kv_heads}, {"T"}, {"Dv", width}});
  check_like_memory(v, keys, "v", where);
  CTX_CHECK_VALUE(v.sym_size(2) == k.sym_size(2),
                  where,
                  "v must have as many tokens as k = ",
                  k.sym_size(2),
                  ", got ",
                  v.sym_size(2));
}

void check_score_operands(const Tensor& q, const ScoreOperands& operands, const char* where) {
  const SymInt heads = q.sym_size(1);
  const auto per_head = [&](const OptionalTensor& x, const char* name) {
    if (!x) return;
    if (x->dim() != 1 || x->sym_size(0) != 1) check_shape(where, name, *x, {{"H", heads}});
    check_operand(*x, name, q.device(), where);
  };
  per_head(operands.bias, "compressed_bias");
  per_head(operands.slopes, "alibi_slopes");
  if (operands.relative.empty()) return;
  check_relative(operands.relative, heads, q.sym_size(3), q.device(), where);
}

void check_relative(at::TensorList relative,
                    const SymInt& heads,
                    const SymInt& head_dim,
                    at::Device device,
                    const char* where) {
  constexpr std::array<const char*, 5> names = {"relative key_bias",
                                                "relative position_bias",
                                                "relative position_weight",
                                                "relative compressed_position_bias",
                                                "relative compressed_position_weight"};
  CTX_CHECK_VALUE(relative.size() == names.size(),
                  where,
                  "relative must be 0 or 5 tensors, got ",
                  relative.size());
  for (size_t i = 0; i < names.size(); ++i) {
    CTX_CHECK_VALUE(relative[i].defined(), where, names[i], " must be a tensor, got none");
  }
  const Tensor& weight = relative[2];
  const SymInt width = weight.dim() == 3 ? weight.sym_size(2) : SymInt(0);
  CTX_CHECK_VALUE(width > 0 && width % 2 == 0,
                  where,
                  names[2],
                  " must be [H, D, P] with an even P, got ",
                  weight.sym_sizes());
  for (size_t i = 0; i < names.size(); ++i) {
    if (i == 2 || i == 4) {
      check_shape(where, names[i], relative[i], {{"H", heads}, {"D", head_dim}, {"P", width}});
    } else {
      check_shape(where, names[i], relative[i], {{"H", heads}, {"D", head_dim}});
    }
    check_operand(relative[i], names[i], device, where);
  }
}

void check_queries(at::TensorList rings,
                   const Tensor& q,
                   const SymInt& tokens,
                   const ScoreOperands& operands,
                   const char* where,
                   const SymInt& rows) {
  const Tensor& keys = rings[kWindowKeys];
  const SymInt batch = rows < 0 ? keys.sym_size(0) : rows, kv_heads = keys.sym_size(1);
  check_shape(where, "q", q, {{"B", batch}, {"H"}, {"T"}, {"D", keys.sym_size(3)}});
  CTX_CHECK_VALUE(q.sym_size(1) > 0 && q.sym_size(1) % kv_heads == 0,
                  where,
                  "q must have a multiple of Hkv = ",
                  kv_heads,
                  " heads, got ",
                  q.sym_size(1));
  CTX_CHECK_VALUE(tokens < 0 || q.sym_size(2) == tokens,
                  where,
                  "q must have as many tokens as k = ",
                  tokens,
                  ", got ",
                  q.sym_size(2));
  check_like_memory(q, keys, "q", where);
  check_score_operands(q, operands, where);
}

void check_rows(const Tensor& like,
                const SymInt& tokens,
                const OptionalTensor& lengths,
                const OptionalTensor& reset_at,
                const char* where) {
  const auto check = [&](const Tensor& x, const char* name, at::ScalarType type) {
    check_type(where, name, x, type);
    check_device(where, name, x, like.device());
    check_dense(where, name, x);
  };
  const SymInt batch = like.sym_size(0);
  if (lengths) {
    check(*lengths, "lengths", at::kLong);
    check_shape(where, "lengths", *lengths, {{"B", batch}});
  }
  if (reset_at) {
    check(*reset_at, "reset_at", at::kBool);
    check_shape(where, "reset_at", *reset_at, {{"B", batch}, {"T", tokens}});
  }
}

void check_readable(const Tensor& x, const char* name, const char* where) {
  check_dense(where, name, x);
  CTX_CHECK_VALUE(!x.is_meta(), where, name, " must hold numbers, got a tensor on meta");
}

void check_seen(const Tensor& seen, const char* where) {
  if (!seen.is_cpu()) return;
  // A session's clock has a thousand rows, however few a call works on.
  const int64_t* const counts = seen.const_data_ptr<int64_t>();
  for (int64_t b = 0, rows = seen.numel(), stride = seen.stride(0); b < rows; ++b) {
    const int64_t count = counts[b * stride];
    CTX_CHECK_VALUE(count >= 0 && count <= Schedule::kLastPosition,
                    where,
                    "seen must be between 0 and ",
                    Schedule::kLastPosition,
                    ", got ",
                    count,
                    " in row ",
                    b);
  }
}

void check_lengths(const OptionalTensor& lengths, int64_t tokens, const char* where) {
  if (!lengths || !lengths->is_cpu()) return;
  const Tensor values = lengths->contiguous();
  for (int64_t b = 0; b < values.numel(); ++b) {
    const int64_t length = values.const_data_ptr<int64_t>()[b];
    CTX_CHECK_VALUE(length >= 0 && length <= tokens,
                    where,
                    "lengths must be between 0 and T = ",
                    tokens,
                    ", got ",
                    length,
                    " in row ",
                    b);
  }
}

}  // namespace ctx::ops
