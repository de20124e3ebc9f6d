// The seam between operators and kernels: plain structs of pointers and sizes, one table of
// functions per device.
//
// Nothing here knows ATen, so that a kernel file compiles fast and a device kernel can be compiled
// for the host in tests. Operators have checked everything before a kernel sees it.
#pragma once

#include <cstdint>

#include "ctx/schedule.h"

namespace ctx {

// kInt8: of compressed slots only. A row is `width` multiples of its scale, which follows them as a
// float32.
enum class Storage : uint8_t { kFloat32, kFloat64, kBFloat16, kFloat16, kInt8 };
constexpr int64_t kScaleBytes = 4;

// The parts of a memory, in this order wherever something is kept for each.
enum Region : int { kSinks = 0, kCompressed = 1, kWindow = 2, kRegions = 3 };

// Numbers begin ... end - 1 of a region: tokens, or groups.
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  CTX_HOST_DEVICE int64_t size() const { return end - begin; }
};
struct Ranges {
  Range of[kRegions];
  CTX_HOST_DEVICE Range& operator[](int64_t region) { return of[region]; }
  CTX_HOST_DEVICE const Range& operator[](int64_t region) const { return of[region]; }
};

// What the query of token t sees of each region.
CTX_HOST_DEVICE inline Ranges visible(const Schedule& schedule, int64_t t) {
  const int64_t n = schedule.groups(t);
  return {{{0, schedule.visible_sinks(t)},
           {n - schedule.slots(t), n},
           {schedule.window_begin(t), t + 1}}};
}

// Where the query of token t and key `number` of a region are rotated to: their difference is the
// distance between them.
CTX_HOST_DEVICE inline int64_t query_clock(const Clock& clock, int64_t region, int64_t t) {
  return region == kSinks ? clock.sink_query(t) : region == kCompressed ? clock.group_query(t) : t;
}
CTX_HOST_DEVICE inline double key_clock(const Clock& clock, int64_t region, int64_t number) {
  return region == kCompressed ? clock.group_key(number) : static_cast<double>(number);
}

// A [B, heads, T, width] tensor whose last dimension is contiguous; strides count elements.
struct Strided {
  void* data = nullptr;
  int64_t batch = 0;
  int64_t head = 0;
  int64_t token = 0;
};

// Rotary position. Angles are position * inv_freq[i], in float64; cosines and sines are multiplied by
// attention_factor, and rotating back divides by it. dim = 0 rotates nothing.
struct Rotary {
  int64_t dim = 0;
  const double* inv_freq = nullptr;  // [dim / 2], the caller's; not null where dim > 0
  double attention_factor = 1.0;
  bool interleaved = false;
  bool keys_rotated = false;  // append is given keys that are rotated to their positions already
};

// Relative positions (Transformer-XL, arXiv:1901.02860): queries [B, H, T, dim] in the type of the
// content queries, whose product with the sinusoids of a key's distance, sin(distance * w_i) and then
// cos(distance * w_i) with w_i = 10000^(-2i/dim), is added to the score before it is scaled. dim = 0:
// none.
struct RelativeQueries {
  int64_t dim = 0;     // even
  Strided queries;     // for sinks and window
  Strided compressed;  // for compressed slots
};

// The rings of one memory, all contiguous: keys [rows, Hkv, capacity, D], values [rows, Hkv, capacity,
// Dv]. A call has B rows, of which Block::row says which of the memory's each is.
struct MemoryView {
  Clock clock;
  Rotary rotary;
  Storage storage = Storage::kFloat32;
  Storage compressed_storage = Storage::kFloat32;  // arithmetic is that of `storage`
  int device = 0;                                  // index among devices of its kind
  int64_t batch = 0;                               // B, of the call
  int64_t kv_heads = 0;
  int64_t head_dim = 0;
  int64_t value_dim = 0;
  int64_t window_capacity = 0;
  int64_t compressed_capacity = 0;
  void* window_keys = nullptr;
  void* window_values = nullptr;
  void* compressed_keys = nullptr;
  void* compressed_values = nullptr;
  void* sink_keys = nullptr;
  void* sink_values = nullptr;
  // Log-mass of every slot, added to its scores: [B, Hkv, compressed capacity] in the arithmetic's
  // type; null: none.
  void* slot_mass = nullptr;
  // Of a memory whose compressor chooses by usage, else null: what every window token was attended
  // to, [B, Hkv, capacity] in the arithmetic's type, and the token that every slot is, [B, Hkv,
  // capacity].
  void* usage = nullptr;
  int64_t* slot_positions = nullptr;
};

// The memory's row that row b of a call is, given its entry: negative where they are one. A damaged
// entry stays inside the memory.
CTX_HOST_DEVICE constexpr int64_t row_in_memory(int64_t entry, int64_t b, int64_t memory_rows) {
  const int64_t row = entry < 0 ? b : entry;
  return row < memory_rows ? row : memory_rows - 1;
}
static_assert(row_in_memory(-1, 2, 8) == 2 && row_in_memory(9, 2, 8) == 7);

// A piece of a call: tokens offset ... offset + tokens - 1 of it, in each row that has them.
struct Block {
  const int64_t* origin = nullptr;   // number, in each row's stream, of the call's token origin_at;
                                     // negative where the stream begins later
  const int64_t* lengths = nullptr;  // tokens of the call that a row brings; null: all
  int64_t offset = 0;
  int64_t tokens = 0;
  int64_t origin_at = 0;
  int64_t row_stride = 1;         // from one row's entry of origin, lengths and rows to the next
  const int64_t* rows = nullptr;  // the memory's row that each row is; negative, or null: the same
  int64_t memory_rows = 0;        // rows of the memory, where `rows` is given
  // The row of the memory that row b of the call reads and writes.
  CTX_HOST_DEVICE int64_t row(int64_t b) const {
    return rows == nullptr ? b : row_in_memory(rows[b * row_stride], b, memory_rows);
  }
  CTX_HOST_DEVICE int64_t first(int64_t b) const {
    return origin[b * row_stride] + (offset - origin_at);
  }
  CTX_HOST_DEVICE int64_t count(int64_t b) const {
    if (lengths == nullptr) return tokens;
    const int64_t left = lengths[b * row_stride] - offset;
    return left < 0 ? 0 : left < tokens ? left : tokens;
  }
  // Place in the call at which the row's stream starts; negative: before it.
  CTX_HOST_DEVICE int64_t start(int64_t b) const { return offset - first(b); }
};

struct AppendArgs {
  MemoryView memory;
  Block block;
  Strided keys;    // of the whole call
  Strided values;  // of the whole call
};

// kGiven: slots that the caller made, for compressors that are not written here.
enum class CompressorKind : uint8_t { kMean, kMax, kConv, kDilated, kGated, kMostUsed, kGiven };

// Layers of the compressor "dilated", and what they read left of a group: the least whose receptive
// field is a group.
CTX_HOST_DEVICE constexpr int64_t dilated_layers(int64_t ratio) {
  int64_t layers = 1;
  while ((int64_t{1} << layers) < ratio) ++layers;
  return layers;
}
CTX_HOST_DEVICE constexpr int64_t dilated_overlap(int64_t ratio) {
  return (int64_t{1} << dilated_layers(ratio)) - 1;
}
static_assert(dilated_layers(1) == 1 && dilated_layers(4) == 2 && dilated_layers(5) == 3);

struct CompressArgs {
  MemoryView memory;
  Block block;
  CompressorKind kind = CompressorKind::kMean;
  bool wide_parameters =
      false;  // parameters are stored in the arithmetic's type, not in the memory's
  // As compressor.h orders them, null where absent; contiguous.
  const void* parameters[6] = {nullptr};
  // A call's slots lie where their groups' blocks are (Schedule::block_of): G of them, row b's first in
  // block slot_block[b * slot_block_stride].
  int64_t slots = 0;  // G
  const int64_t* slot_block = nullptr;
  int64_t slot_block_stride = 1;
  // kGiven: slots [B, Hkv, G, width] in the arithmetic's type, un-rotated.
  Strided slot_keys;
  Strided slot_values;
  // kGiven: log-mass of these slots, [B, Hkv, G] in the arithmetic's type, contiguous; null: log c.
  const void* given_mass = nullptr;
  // kMostUsed, null unless asked for: which token each slot is, as its place among the c G tokens
  // of the groups and as its number in its stream, both [B, Hkv, G], contiguous.
  int64_t* chosen = nullptr;
  int64_t* chosen_positions = nullptr;
};

struct AttendArgs {
  MemoryView memory;
  Block block;
  int64_t heads = 0;
  double scale = 1.0;
  // A scaled score s becomes logit_softcap * tanh(s / logit_softcap), before bias, mass and slopes;
  // 0: it stays.
  double logit_softcap = 0.0;
  // [heads] in the arithmetic's type, null: none. The bias is added to the scores of compressed
  // slots; slopes times the distance is taken from all (ALiBi, arXiv:2108.12409).
  const void* bias = nullptr;
  const void* slopes = nullptr;
  Strided queries;           // of the whole call, un-rotated
  RelativeQueries relative;  // of the whole call
  Strided out;               // of the whole call
  // Weight that each region got: [B, heads, tokens of the call, 3] (sinks, compressed, window),
  // contiguous, in the arithmetic's type; null: not asked for. Zero at absent tokens.
  void* region_weights = nullptr;
  int64_t call_tokens = 0;  // of the whole call: what `region_weights` is laid out by
  // Adds what the block's queries gave to each token of the window, averaged over the query heads
  // of a kv head, to memory.usage.
  bool count_usage = false;
};

struct PlanArgs;  // ops/plan_layout.h
struct AdvanceArgs;

struct RotateArgs {
  Rotary rotary;
  bool inverse = false;  // undo the rotation to these positions
  Storage storage = Storage::kFloat32;
  int device = 0;
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t tokens = 0;
  int64_t head_dim = 0;
  const double* positions = nullptr;  // [B, T]
  Strided in;
  Strided out;
};

// Keys that a memory holds before those of a call: the entries of its ring [rows, Hkv, capacity,
// width] from number first[b] on, of row rows[b]. Numbers below zero are nothing that a query sees.
struct PastSpan {
  int64_t size = 0;
  int64_t capacity = 0;
  Storage storage = Storage::kFloat32;
  void* keys = nullptr;
  void* values = nullptr;
  const int64_t* first = nullptr;  // [B]
  const void* mass = nullptr;      // [rows, Hkv, capacity] in the arithmetic's type; null: none
  const int64_t* rows = nullptr;   // [B]; null: the same

  CTX_HOST_DEVICE int64_t row(int64_t b) const { return rows == nullptr ? b : rows[b]; }
};

// One of the three spans of the differentiable path: keys and values already rotated to their
// clocks, and the number of the first of them in each query's stream (ops/attend.h).
struct Span {
  int64_t size = 0;  // keys, with those of the past
  PastSpan past;     // the first of them
  Strided keys;      // the others
  Strided values;
  const int64_t* first = nullptr;  // [B, T]
  // Log-mass of the keys that are not of the past, added to their scores: [B, Hkv, keys] in the
  // arithmetic's type, contiguous; null: none.
  const void* mass = nullptr;
};

// Attention over three spans (sinks, compressed, window) of tensors that stay as they are; every
// query sees what the law shows to the token at its position. Numbers "in the arithmetic's type"
// are float32, float64 for float64, and contiguous.
struct SpansArgs {
  Clock clock;
  Rotary rotary;
  Storage storage = Storage::kFloat32;
  int device = 0;
  int64_t batch = 0;
  int64_t heads = 0;
  int64_t kv_heads = 0;
  int64_t tokens = 0;
  int64_t head_dim = 0;
  int64_t value_dim = 0;
  double scale = 1.0;
  double logit_softcap = 0.0;         // as in AttendArgs
  const void* bias = nullptr;         // as in AttendArgs
  const void* slopes = nullptr;       // as in AttendArgs
  const int64_t* position = nullptr;  // [B, T]
  Strided queries;                    // [B, H, T, D], un-rotated
  RelativeQueries relative;           // not for slots that are single tokens, as in AttendArgs
  Span spans[3];
  Strided out;                // [B, H, T, Dv]; zero for a query that sees nothing
  void* logsumexp = nullptr;  // [B, H, T] in the arithmetic's type; minus infinity for such a query
  void* region_weights = nullptr;  // as in AttendArgs; null: not asked for
};

struct SpansBackwardArgs {
  SpansArgs forward;  // with what it has put out
  Strided grad_out;
  const void* grad_logsumexp = nullptr;  // [B, H, T] in the arithmetic's type
  Strided grad_queries;                  // written
  // Written; needed where forward.relative.dim > 0.
  Strided grad_relative;
  Strided grad_compressed_relative;
  // Sums over queries, in the arithmetic's type: [B, Hkv, keys, width] of the keys that are not of
  // the past, rows padded to key_width and value_width (kSpanWidthStep), zero before. Their bits
  // follow from sizes alone, not from the number of threads.
  int64_t key_width = 0;
  int64_t value_width = 0;
  void* grad_keys[3] = {nullptr};
  void* grad_values[3] = {nullptr};
  void* grad_mass[3] = {nullptr};  // [B, Hkv, keys], where the span has a mass; null: not asked for
  void* grad_bias = nullptr;       // [B, H] in the arithmetic's type, zero before; null: none
};

// Kernels write whole vectors of the sums above.
constexpr int64_t kSpanWidthStep = 16;

// What a device offers; work is queued on the calling thread's current stream, where a device has
// one. Arithmetic is float32, float64 for float64.
struct Kernels {
  const char* name = "";  // what the kernels were built for: an instruction set, an architecture
  // Whether the host may read what tensors hold; else it is never waited for.
  bool host_reads = true;
  // Fills the plan of a call, and counts a call's tokens in the clock of its rows.
  void (*plan)(const PlanArgs&) = nullptr;
  void (*advance)(const AdvanceArgs&) = nullptr;
  // Rotates every row of [B, heads, T, D] to its token's position, or back.
  void (*rotate)(const RotateArgs&) = nullptr;
  // Rotates the block's keys to their positions and writes pairs into the window ring, or the
  // sinks; what is new in the window has not been used. Then makes every group due for the block's last token: read back, un-rotate, compress, rotate,
  // write, with its log-mass (log c for mean, max, conv and dilated; the entropy of the key gate's
  // weights for gated; 0 for most_used). kMostUsed: a block holds no segment's first token but as its own first.
  void (*write)(const AppendArgs&, const CompressArgs&) = nullptr;  // of the same block
  // Attends over sinks, slots and window; outputs of absent tokens (past lengths, before the
  // stream) are zero.
  void (*attend)(const AttendArgs&) = nullptr;
  // The differentiable path; null on a device that leaves it to torch's operators.
  void (*spans_forward)(const SpansArgs&) = nullptr;
  void (*spans_backward)(const SpansBackwardArgs&) = nullptr;
};

// Groups that row b of a block makes due, first inclusive, last exclusive; those that a later one
// would overwrite are left out, so that no two writers meet.
struct EvictedGroups {
  int64_t first = 0;
  int64_t last = 0;
};
CTX_HOST_DEVICE inline EvictedGroups evicted_groups(const MemoryView& memory,
                                                    const Block& block,
                                                    int64_t b) {
  const int64_t count = block.count(b);
  if (count == 0 || memory.compressed_capacity == 0) return {};
  const Schedule& schedule = memory.clock.schedule;
  const int64_t last = schedule.groups(block.first(b) + count - 1);
  const int64_t begun = schedule.groups(block.first(b) - 1);
  const int64_t kept = last - memory.compressed_capacity;
  return {begun > kept ? begun : kept, last};
}

}  // namespace ctx
