// The tensors that are a memory, and what is checked before one of them is touched.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>

#include "ctx/schedule.h"

namespace ctx::ops {

// In this order everywhere. `seen` is the whole bookkeeping; `rewindable` says how much of it the
// rings can still take back. The last two have entries only where a compressor chooses by usage:
// what each token of the window was attended to, and which token each slot is.
enum StateIndex : int {
  kWindowKeys,
  kWindowValues,
  kCompressedKeys,
  kCompressedValues,
  kSinkKeys,
  kSinkValues,
  kSeen,
  kRewindable,
  kAttentionReceived,
  kSlotPositions,
  kStateTensors
};

using State = std::array<at::Tensor, kStateTensors>;

const char* state_name(int index);

// The dtype of a tensor of a memory whose pairs have dtype `pairs` and whose slots `slots`.
at::ScalarType state_type(int index, at::ScalarType pairs, at::ScalarType slots);
inline bool is_slots(int index) { return index == kCompressedKeys || index == kCompressedValues; }

// int8 slots are rows of `width` multiples of a scale, which stands behind them as a float32.
c10::SymInt stored_width(const c10::SymInt& width, at::ScalarType slots);
at::Tensor slots_as(const at::Tensor& rows, at::ScalarType type);  // [..., stored] -> [..., width]

// Sizes of the tensors for a schedule and a max_rewind; `used`: a compressor chooses by usage.
std::array<std::vector<c10::SymInt>, kStateTensors> state_sizes(const Schedule& schedule,
                                                                const c10::SymInt& batch,
                                                                const c10::SymInt& kv_heads,
                                                                const c10::SymInt& head_dim,
                                                                const c10::SymInt& value_dim,
                                                                const c10::SymInt& max_rewind,
                                                                at::ScalarType slots,
                                                                bool used);

// Whether the memory is one whose compressor chooses by usage.
bool counts_usage(at::TensorList state);

// Checks the tensors against each other and a schedule, and returns their max_rewind. Like the two
// below, it reads sizes as symbols, so that it holds while a graph is traced.
c10::SymInt check_state(at::TensorList state, const Schedule& schedule, const char* where);

// Checks pairs against a memory: k [B, Hkv, T, D], v [B, Hkv, T, Dv].
void check_pairs(at::TensorList state, const at::Tensor& k, const at::Tensor& v, const char* where);

// What scores are made of besides queries and keys (AttentionOptions says what they are): bias and
// slopes [H] or [1], relative none or five.
struct ScoreOperands {
  const std::optional<at::Tensor>& bias;
  const std::optional<at::Tensor>& slopes;
  at::TensorList relative;
};
void check_score_operands(const at::Tensor& q, const ScoreOperands& operands, const char* where);

// The five tensors of relative positions for queries of H heads of width D.
void check_relative(at::TensorList relative,
                    const c10::SymInt& heads,
                    const c10::SymInt& head_dim,
                    at::Device device,
                    const char* where);

// Checks queries against a memory: q [B, H, T, D], H a multiple of Hkv, T as given (-1: any).
void check_queries(at::TensorList state,
                   const at::Tensor& q,
                   const c10::SymInt& tokens,
                   const ScoreOperands& operands,
                   const char* where);

// What a call says about its rows, k being its keys: lengths int64 [B], reset_at bool [B, T].
void check_rows(const at::Tensor& k,
                const std::optional<at::Tensor>& lengths,
                const std::optional<at::Tensor>& reset_at,
                const char* where);

// A tensor of the caller whose numbers can be read: neither sparse nor on the meta device.
void check_readable(const at::Tensor& x, const char* name, const char* where);

// Whoever holds the tensors of a memory can write to them, and rings are indexed with what `seen`
// says: 0 <= seen <= kLastPosition. Reads values, so only of tensors on the CPU.
void check_seen(const at::Tensor& seen, const char* where);

// 0 <= lengths <= T. Reads values, so only of tensors on the CPU: a device is never waited for.
void check_lengths(const std::optional<at::Tensor>& lengths, int64_t tokens, const char* where);

}  // namespace ctx::ops
