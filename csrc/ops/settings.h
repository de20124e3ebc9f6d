// What attention is, as operators take it: `int[] settings` and `float[] numbers`. Packed and
// unpacked here and nowhere else.
#pragma once

#include <ATen/ATen.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ctx/schedule.h"
#include "ops/kernels.h"

namespace ctx::ops {

// Arithmetic is float32, float64 for float64.
inline at::ScalarType arithmetic_type(at::ScalarType storage) {
  return storage == at::kDouble ? at::kDouble : at::kFloat;
}

// Autocast ends where one of our operators begins: what it computes is its dtypes' business. Lives as
// long as the operator runs.
using OwnPrecision = c10::impl::ExcludeDispatchKeyGuard;
inline OwnPrecision own_precision() { return OwnPrecision(c10::autocast_dispatch_keyset); }

// A list of tensors as operators take it: None is the empty one. AOTInductor's proxy passes None for
// a list that is empty, so no schema may ask for more.
using OptionalList = std::optional<at::TensorList>;
inline at::TensorList or_empty(const OptionalList& list) { return list.value_or(at::TensorList()); }

struct Settings {
  Clock clock;
  Rotary rotary;  // frequencies are those of the list that was unpacked
  CompressorKind compressor = CompressorKind::kMean;
  bool slot_mass = false;
  double scale = 1.0;
  double logit_softcap = 0.0;  // 0: none

  const Schedule& schedule() const { return clock.schedule; }
};

// The two lists; the order of their entries is known to pack() and unpack() alone.
struct PackedSettings {
  std::vector<int64_t> settings;
  std::vector<double> numbers;
};
PackedSettings pack(const Settings& settings);

// Throws ValueError for lists that pack() did not make.
Settings unpack(at::IntArrayRef settings, at::ArrayRef<double> numbers, const char* where);

// Raises unless heads of this width have the channels that are rotated.
void check_head_dim(const Settings& settings, const c10::SymInt& head_dim, const char* where);

// base^(-2i / dim), i = 0 ... dim / 2 - 1; kept for as long as the program runs.
const double* inverse_frequencies(int64_t dim, double base);

// The storage of compressed slots in a memory of such pairs: one with the same arithmetic, or int8.
Storage slot_storage_of(at::ScalarType dtype,
                        at::ScalarType pairs,
                        const char* where,
                        const char* name);

// The storage of a dtype; throws TypeError for one that a memory cannot have.
Storage storage_of(at::ScalarType dtype, const char* where, const char* name);

// "slot" or "token".
bool parse_token_distance(std::string_view distance, const char* where);

CompressorKind parse_compressor(std::string_view name, const char* where);

// Tokens left of a group that a compressor of the engine reads, as its parameters say; 0 where they
// are not what they must be.
int64_t overlap_of(CompressorKind kind, at::TensorList parameters, int64_t ratio);

// Number, shapes and devices of a compressor's parameters (compressor.h), and that it reads
// `overlap` tokens left of a group.
void check_parameters(CompressorKind kind,
                      at::TensorList parameters,
                      int64_t kv_heads,
                      int64_t ratio,
                      int64_t overlap,
                      int64_t head_dim,
                      int64_t value_dim,
                      at::Device device,
                      const char* where);

}  // namespace ctx::ops
