// The tensors that are a memory, and what is checked before one of them is touched.
#pragma once

#include <ATen/ATen.h>

#include <array>
#include <optional>

#include "ctx/schedule.h"

namespace ctx::ops {

// In this order everywhere: the rings of a layer, as operators take them, and the clock that all
// layers share, of which `seen` is the whole bookkeeping and `rewindable` says how much of it the
// rings can still take back. The last three rings have entries only where they are needed:
// attention that each token of the window received and the token that each slot is, where a
// compressor chooses by it; and the log-mass of each slot, where it counts.
enum StateIndex : int {
  kWindowKeys,
  kWindowValues,
  kCompressedKeys,
  kCompressedValues,
  kSinkKeys,
  kSinkValues,
  kAttentionReceived,
  kSlotPositions,
  kSlotMass,
  kRings,
  kSeen = kRings,
  kRewindable,
  kStateTensors
};

const char* state_name(int index);

// The dtype of a tensor of a memory whose pairs have dtype `pairs` and whose slots `slots`.
at::ScalarType state_type(int index, at::ScalarType pairs, at::ScalarType slots);
inline bool is_slots(int index) { return index == kCompressedKeys || index == kCompressedValues; }

// int8 slots are rows of `width` multiples of a scale, which stands behind them as a float32.
c10::SymInt stored_width(const c10::SymInt& width, at::ScalarType slots);
at::Tensor slots_as(const at::Tensor& rows, at::ScalarType type);  // [..., stored] -> [..., width]

// What the shapes of a memory's tensors follow from.
struct StateShape {
  Schedule schedule;
  c10::SymInt batch;
  c10::SymInt kv_heads;
  c10::SymInt head_dim;
  c10::SymInt value_dim;
  c10::SymInt max_rewind;
  at::ScalarType slots;  // dtype of compressed slots
  bool counts = false;   // whether the compressor chooses by attention received
  bool mass = false;     // whether slots have a mass

  std::array<std::vector<c10::SymInt>, kStateTensors> sizes() const;
};

// What slots may be stored as beside such pairs.
std::vector<at::ScalarType> slot_types(at::ScalarType pairs);

// Checks one tensor of a memory; the message names it.
void check_layout(const at::Tensor& x,
                  int index,
                  c10::SymIntArrayRef sizes,
                  at::ScalarType type,
                  at::Device device,
                  const char* where);

// Whether the memory is one whose compressor chooses by the attention that tokens received.
bool counts_attention(at::TensorList rings);
bool has_mass(at::TensorList rings);

// Checks the rings against each other and a schedule, and returns their max_rewind. Like the two
// below, it reads sizes as symbols, so that it holds while a graph is traced.
c10::SymInt check_rings(at::TensorList rings, const Schedule& schedule, const char* where);

// Checks pairs against a memory: k [B, Hkv, T, D], v [B, Hkv, T, Dv]; B as given (-1: the memory's).
void check_pairs(at::TensorList rings,
                 const at::Tensor& k,
                 const at::Tensor& v,
                 const char* where,
                 const c10::SymInt& batch = -1);

// What scores are made of besides queries and keys (AttentionSettings says what they are): bias and
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

// Checks queries against a memory: q [B, H, T, D], H a multiple of Hkv, T as given (-1: any), B as
// given (-1: the memory's).
void check_queries(at::TensorList rings,
                   const at::Tensor& q,
                   const c10::SymInt& tokens,
                   const ScoreOperands& operands,
                   const char* where,
                   const c10::SymInt& batch = -1);

// What a call of T tokens says about its rows: lengths int64 [B], reset_at bool [B, T]; `like` has B
// rows and the device.
void check_rows(const at::Tensor& like,
                const c10::SymInt& tokens,
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
