#include "ops/state.h"

#include "core/check.h"
#include "ops/settings.h"

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
                                               "seen",
                                               "rewindable",
                                               "attention_received",
                                               "slot_positions"};

void check_like_memory(const Tensor& x, const Tensor& keys, const char* name, const char* where) {
  CTX_CHECK_TYPE(x.scalar_type() == keys.scalar_type(),
                 where,
                 name,
                 " must be ",
                 keys.scalar_type(),
                 " as the memory, got ",
                 x.scalar_type());
  CTX_CHECK_VALUE(x.device() == keys.device(),
                  where,
                  name,
                  " must be on ",
                  keys.device(),
                  " as the memory, got ",
                  x.device());
  CTX_CHECK_VALUE(
      x.layout() == at::kStrided, where, name, " must be a dense tensor, got ", x.layout());
}

// What is added to scores, or multiplied with them.
void check_operand(const Tensor& x, const char* name, at::Device device, const char* where) {
  CTX_CHECK_VALUE(x.device() == device, where, name, " must be on ", device, ", got ", x.device());
  CTX_CHECK_TYPE(at::isFloatingType(x.scalar_type()),
                 where,
                 name,
                 " must be floating point, got ",
                 x.scalar_type());
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
  if (is_slots(index)) return slots;
  if (index < kSeen) return pairs;
  return index == kAttentionReceived ? arithmetic_type(pairs) : at::kLong;
}

bool counts_usage(at::TensorList state) { return state[kAttentionReceived].sym_size(2) != 0; }

std::array<std::vector<SymInt>, kStateTensors> state_sizes(const Schedule& schedule,
                                                           const SymInt& batch,
                                                           const SymInt& kv_heads,
                                                           const SymInt& head_dim,
                                                           const SymInt& value_dim,
                                                           const SymInt& max_rewind,
                                                           at::ScalarType slots,
                                                           bool used) {
  const SymInt window = schedule.window_capacity(max_rewind);
  const SymInt compressed = schedule.compressed_capacity(max_rewind);
  return {{
      {batch, kv_heads, window, head_dim},
      {batch, kv_heads, window, value_dim},
      {batch, kv_heads, compressed, stored_width(head_dim, slots)},
      {batch, kv_heads, compressed, stored_width(value_dim, slots)},
      {batch, kv_heads, schedule.sinks, head_dim},
      {batch, kv_heads, schedule.sinks, value_dim},
      {batch},
      {batch},
      {batch, kv_heads, used ? window : SymInt(0)},
      {batch, kv_heads, used ? compressed : SymInt(0)},
  }};
}

SymInt check_state(at::TensorList state, const Schedule& schedule, const char* where) {
  CTX_CHECK_VALUE(state.size() == kStateTensors,
                  where,
                  "memory must be ",
                  int{kStateTensors},
                  " tensors, got ",
                  state.size());
  const Tensor& keys = state[kWindowKeys];
  const Tensor& values = state[kWindowValues];
  CTX_CHECK_VALUE(
      keys.dim() == 4, where, "window_keys must be [B, Hkv, capacity, D], got ", keys.sym_sizes());
  CTX_CHECK_VALUE(values.dim() == 4,
                  where,
                  "window_values must be [B, Hkv, capacity, Dv], got ",
                  values.sym_sizes());
  const int64_t least = schedule.max_window() + schedule.overlap;
  const SymInt max_rewind = keys.sym_size(2) - least;
  CTX_CHECK_VALUE(max_rewind >= 1,
                  where,
                  "window_keys must hold more than ",
                  least,
                  " tokens for this schedule, got ",
                  keys.sym_size(2));
  const auto slots = state[kCompressedKeys].scalar_type();
  slot_storage_of(slots, keys.scalar_type(), where, "compressed_keys");
  CTX_CHECK_VALUE(state[kAttentionReceived].dim() == 3,
                  where,
                  "usage must be [B, Hkv, capacity], got ",
                  state[kAttentionReceived].sym_sizes());
  const auto sizes = state_sizes(schedule,
                                 keys.sym_size(0),
                                 keys.sym_size(1),
                                 keys.sym_size(3),
                                 values.sym_size(3),
                                 max_rewind,
                                 slots,
                                 counts_usage(state));
  for (int i = 0; i < kStateTensors; ++i) {
    const auto type = state_type(i, keys.scalar_type(), slots);
    CTX_CHECK_VALUE(state[i].sym_sizes() == c10::SymIntArrayRef(sizes[i]),
                    where,
                    kNames[i],
                    " must be ",
                    c10::SymIntArrayRef(sizes[i]),
                    ", got ",
                    state[i].sym_sizes());
    CTX_CHECK_TYPE(state[i].scalar_type() == type,
                   where,
                   kNames[i],
                   " must be ",
                   type,
                   ", got ",
                   state[i].scalar_type());
    CTX_CHECK_VALUE(state[i].device() == keys.device(),
                    where,
                    kNames[i],
                    " must be on ",
                    keys.device(),
                    ", got ",
                    state[i].device());
    CTX_CHECK_VALUE(state[i].is_contiguous(),
                    where,
                    kNames[i],
                    " must be contiguous, got strides ",
                    state[i].sym_strides());
  }
  return max_rewind;
}

void check_pairs(at::TensorList state, const Tensor& k, const Tensor& v, const char* where) {
  const Tensor& keys = state[kWindowKeys];
  const SymInt batch = keys.sym_size(0);
  const SymInt kv_heads = keys.sym_size(1);
  const auto check =
      [&](const Tensor& x, const char* name, const char* width_name, const SymInt& width) {
        CTX_CHECK_VALUE(x.dim() == 4 && x.sym_size(0) == batch && x.sym_size(1) == kv_heads &&
                            x.sym_size(3) == width,
                        where,
                        name,
                        " must be [B, Hkv, T, ",
                        width_name,
                        "] = [",
                        batch,
                        ", ",
                        kv_heads,
                        ", T, ",
                        width,
                        "], got ",
                        x.sym_sizes());
        check_like_memory(x, keys, name, where);
      };
  check(k, "k", "D", keys.sym_size(3));
  check(v, "v", "Dv", state[kWindowValues].sym_size(3));
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
    CTX_CHECK_VALUE(x->dim() == 1 && (x->sym_size(0) == heads || x->sym_size(0) == 1),
                    where,
                    name,
                    " must be [H] = [",
                    heads,
                    "], got ",
                    x->sym_sizes());
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
    std::vector<SymInt> sizes = {heads, head_dim};
    if (i == 2 || i == 4) sizes.push_back(width);
    CTX_CHECK_VALUE(relative[i].sym_sizes() == c10::SymIntArrayRef(sizes),
                    where,
                    names[i],
                    " must be ",
                    c10::SymIntArrayRef(sizes),
                    ", got ",
                    relative[i].sym_sizes());
    check_operand(relative[i], names[i], device, where);
  }
}

void check_queries(at::TensorList state,
                   const Tensor& q,
                   const SymInt& tokens,
                   const ScoreOperands& operands,
                   const char* where) {
  const Tensor& keys = state[kWindowKeys];
  const SymInt kv_heads = keys.sym_size(1);
  CTX_CHECK_VALUE(
      q.dim() == 4 && q.sym_size(0) == keys.sym_size(0) && q.sym_size(3) == keys.sym_size(3),
      where,
      "q must be [B, H, T, D] = [",
      keys.sym_size(0),
      ", H, T, ",
      keys.sym_size(3),
      "], got ",
      q.sym_sizes());
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

void check_rows(const Tensor& k,
                const OptionalTensor& lengths,
                const OptionalTensor& reset_at,
                const char* where) {
  const auto check = [&](const Tensor& x, const char* name, at::ScalarType type) {
    CTX_CHECK_TYPE(
        x.scalar_type() == type, where, name, " must be ", type, ", got ", x.scalar_type());
    CTX_CHECK_VALUE(x.device() == k.device(),
                    where,
                    name,
                    " must be on ",
                    k.device(),
                    " as k, got ",
                    x.device());
    CTX_CHECK_VALUE(
        x.layout() == at::kStrided, where, name, " must be a dense tensor, got ", x.layout());
  };
  if (lengths) {
    check(*lengths, "lengths", at::kLong);
    CTX_CHECK_VALUE(lengths->dim() == 1 && lengths->sym_size(0) == k.sym_size(0),
                    where,
                    "lengths must be [B] = [",
                    k.sym_size(0),
                    "], got ",
                    lengths->sym_sizes());
  }
  if (reset_at) {
    check(*reset_at, "reset_at", at::kBool);
    CTX_CHECK_VALUE(reset_at->dim() == 2 && reset_at->sym_size(0) == k.sym_size(0) &&
                        reset_at->sym_size(1) == k.sym_size(2),
                    where,
                    "reset_at must be [B, T] = [",
                    k.sym_size(0),
                    ", ",
                    k.sym_size(2),
                    "], got ",
                    reset_at->sym_sizes());
  }
}

void check_readable(const Tensor& x, const char* name, const char* where) {
  CTX_CHECK_VALUE(
      x.layout() == at::kStrided, where, name, " must be a dense tensor, got ", x.layout());
  CTX_CHECK_VALUE(!x.is_meta(), where, name, " must hold numbers, got a tensor on meta");
}

void check_seen(const Tensor& seen, const char* where) {
  if (!seen.is_cpu()) return;
  for (int64_t b = 0; b < seen.numel(); ++b) {
    const int64_t count = seen.const_data_ptr<int64_t>()[b];
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
