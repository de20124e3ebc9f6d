// What is done with whole rows of a memory, of one layer or of all layers of a model: free functions
// over its tensors. KVMemory (memory.h) and Python's ctx.Memory are made of them.
//
// A state is the tensors of a memory in one list: the nine rings of every layer in the order of
// KVMemory::tensors(), layer by layer, and last the clock that all layers share: `seen` and
// `rewindable`, int64 [B]. Row operations are rare and may wait for a device to read an index.
//
// `where` is the public name that the user called; messages begin with it. Every function throws
// ValueError, TypeError or IndexError before anything is written. What is made is fresh, and made in
// inference mode it can be used outside of it, too.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/Device.h>
#include <c10/core/ScalarType.h>

#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "ctx/export.h"
#include "ctx/schedule.h"

namespace ctx {

// What the shapes of a layer's tensors follow from, but for the number of rows.
struct LayerShape {
  Schedule schedule;  // with the overlap of the compressor
  int64_t kv_heads = 1;
  int64_t head_dim = 64;
  int64_t value_dim = 64;
  int64_t max_rewind = 64;
  bool counts_attention = false;  // whether slots are chosen by the attention that tokens received
  bool slot_mass = false;         // whether slots have a mass

  // Sizes of the nine rings and of the clock, for so many rows and slots of this dtype.
  CTX_API std::vector<std::vector<int64_t>> sizes(int64_t batch, at::ScalarType slots) const;
};

namespace rows {

using State = std::vector<at::Tensor>;

// What `rewindable` is while a call overwrites what is visible; no call ends with it.
constexpr int64_t kOpen = -1;

// Names of a layer's tensors in their order, the clock's last; their dtypes where pairs have dtype
// `pairs` and slots `slots`; and what slots may be stored as beside such pairs.
CTX_API std::vector<std::string> names();
CTX_API std::vector<at::ScalarType> types(at::ScalarType pairs, at::ScalarType slots);
CTX_API std::vector<at::ScalarType> slot_types(at::ScalarType pairs);

// The state of one layer of new streams: zeros.
CTX_API State empty(const LayerShape& shape,
                    int64_t batch,
                    at::ScalarType pairs,
                    at::ScalarType slots,
                    at::Device device);

// Throws unless the tensors have these shapes, one device and fitting dtypes, are contiguous, and
// none stands in two places. Reads no number.
CTX_API void check(const State& state,
                   const std::vector<LayerShape>& layers,
                   std::string_view where);

// Throws unless 0 <= seen <= Schedule::kLastPosition, and rewindable is between 0 and `seen` and at
// most `max_rewind`; one that is kOpen is named as such.
CTX_API void check_clock(const at::Tensor& seen,
                         const at::Tensor& rewindable,
                         int64_t max_rewind,
                         std::string_view where);

// Begins a new stream in every row, or in these: int64 [N], or bool [B]. In place.
CTX_API void reset(const at::Tensor& seen,
                   const at::Tensor& rewindable,
                   const std::optional<at::Tensor>& rows,
                   std::string_view where);

// Takes back the last `tokens` of every row, int64 [B], as if they had not come. In place. Refused
// beyond rewindable, and where slots are chosen by the attention received.
CTX_API void rewind(const State& state, const at::Tensor& tokens, std::string_view where);

// These rows in this order: int64 [N], repeats allowed, or bool [B].
CTX_API State select(const State& state, const at::Tensor& rows, std::string_view where);

// The rows of several memories, one after the other; `states` holds their states one after the
// other, of equal shapes but for the rows, equal dtypes and one device.
CTX_API State merge(at::TensorList states, int64_t memories, std::string_view where);

// The same in another dtype or on another device. Slots of another dtype than pairs keep theirs, but
// beside float64, unless `slots` is given.
CTX_API State to(at::TensorList state,
                 std::optional<at::ScalarType> pairs,
                 std::optional<at::ScalarType> slots,
                 std::optional<at::Device> device,
                 std::string_view where);

// Writes another state of equal shapes and dtypes into this one.
CTX_API void copy(const State& state, const State& from, std::string_view where);

// The same streams in layers of other schedules, else of the same shapes, as if they had had them
// all along: to fewer slots always (the newest stay), to more while none has been dropped, to
// another window while that makes no group due earlier or later. Rows can be rewound as far as both
// agree.
CTX_API State resized(const State& state,
                      const std::vector<LayerShape>& layers,
                      const std::vector<LayerShape>& shapes,
                      std::string_view where);

}  // namespace rows
}  // namespace ctx
