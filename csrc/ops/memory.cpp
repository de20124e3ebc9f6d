// ctx::step_, ctx::append_, ctx::attend_memory: the memory at inference. They write into the seven
// tensors of a memory, or read them, and hand spans to the device's kernels; nothing is
// concatenated and no size depends on what was seen.
#include "ops/memory.h"

#include <torch/library.h>

#include "core/check.h"
#include "ops/layout.h"
#include "ops/registry.h"
#include "ops/settings.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr const char* kNames[kStateTensors] = {"window_keys",
                                               "window_values",
                                               "compressed_keys",
                                               "compressed_values",
                                               "sink_keys",
                                               "sink_values",
                                               "seen"};

// The tensors and settings that all three operators take, in the order of their schemas.
struct Memory {
  std::array<Tensor, kStateTensors> state;
  MemoryView view;
  int64_t headroom;

  Memory(std::array<Tensor, kStateTensors> tensors,
         at::IntArrayRef schedule,
         c10::string_view distance,
         int64_t rotary_dim,
         double rotary_base,
         bool rotary_interleaved,
         const char* where)
      : state(std::move(tensors)) {
    view.clock.schedule = parse_schedule(schedule, where);
    view.clock.token_distance = parse_token_distance({distance.data(), distance.size()}, where);
    headroom = check_state(state, view.clock.schedule, where);
    const Tensor& keys = state[0];
    view.rotary = parse_rotary(rotary_dim, rotary_base, rotary_interleaved, keys.size(3), where);
    view.storage = storage_of(keys.scalar_type(), where, "window_keys");
    view.device = device_index(keys);
    view.batch = keys.size(0);
    view.kv_heads = keys.size(1);
    view.head_dim = keys.size(3);
    view.value_dim = state[1].size(3);
    view.window_capacity = keys.size(2);
    view.compressed_capacity = state[2].size(2);
    view.window_keys = keys.data_ptr();
    view.window_values = state[1].data_ptr();
    view.compressed_keys = state[2].data_ptr();
    view.compressed_values = state[3].data_ptr();
    view.sink_keys = state[4].data_ptr();
    view.sink_values = state[5].data_ptr();
  }

  const int64_t* seen() const { return state[6].const_data_ptr<int64_t>(); }
  const Kernels& kernels() const { return kernels_for(state[0].device().type()); }
};

// The inputs of one call, kept alive and laid out for the kernels.
class Writer {
 public:
  Writer(const Memory& memory,
         const Tensor& k,
         const Tensor& v,
         const OptionalTensor& lengths,
         at::TensorList parameters,
         c10::string_view compressor,
         const char* where)
      : memory_(memory), k_(rows(k)), v_(rows(v)) {
    check_pairs(memory.state, k, v, lengths, where);
    const MemoryView& view = memory.view;
    compress_.kind = parse_compressor({compressor.data(), compressor.size()}, where);
    check_parameters(compress_.kind,
                     parameters,
                     view.kv_heads,
                     view.clock.schedule.ratio,
                     view.head_dim,
                     view.value_dim,
                     k.device(),
                     where);
    if (lengths) lengths_ = lengths->contiguous();
    append_.memory = compress_.memory = view;
    append_.keys = strided(k_);
    append_.values = strided(v_);
    // Parameters may be stored as the memory is, or as the arithmetic is; anything else is
    // converted to the latter.
    const auto storage = memory.state[0].scalar_type();
    bool same = true;
    for (const Tensor& parameter : parameters) same = same && parameter.scalar_type() == storage;
    compress_.wide_parameters = !same;
    const auto type = same ? storage : arithmetic_type(storage);
    for (size_t i = 0; i < parameters.size(); ++i) {
      parameters_.push_back(parameters[i].to(type).contiguous());
      compress_.parameters[i] = parameters_.back().const_data_ptr();
    }
  }

  int64_t tokens() const { return k_.size(2); }

  Block block(int64_t offset) const {
    return {memory_.seen(),
            lengths_.defined() ? lengths_.const_data_ptr<int64_t>() : nullptr,
            offset,
            std::min(memory_.headroom, tokens() - offset)};
  }

  void write(const Block& block) {
    append_.block = compress_.block = block;
    memory_.kernels().append(append_);
    memory_.kernels().compress(compress_);
  }

  void finish() const {
    Tensor seen = memory_.state[6];
    lengths_.defined() ? seen.add_(lengths_) : seen.add_(tokens());
  }

 private:
  const Memory& memory_;
  Tensor k_;
  Tensor v_;
  Tensor lengths_;
  std::vector<Tensor> parameters_;
  AppendArgs append_;
  CompressArgs compress_;
};

class Reader {
 public:
  Reader(const Memory& memory, const Tensor& q, const OptionalTensor& bias, double scale)
      : memory_(memory),
        q_(rows(q)),
        out_(at::empty({q.size(0), q.size(1), q.size(2), memory.view.value_dim}, q.options())) {
    args_.memory = memory.view;
    args_.heads = q.size(1);
    args_.scale = scale;
    args_.queries = strided(q_);
    args_.out = strided(out_);
    if (bias) {
      bias_ = bias->to(arithmetic_type(q.scalar_type())).expand({q.size(1)}).contiguous();
      args_.bias = bias_.const_data_ptr();
    }
  }

  void attend(const Block& block) {
    args_.block = block;
    memory_.kernels().attend(args_);
  }

  const Tensor& out() const { return out_; }

 private:
  const Memory& memory_;
  Tensor q_;
  Tensor bias_;
  Tensor out_;
  AttendArgs args_;
};

#define CTX_STATE_PARAMETERS                                                               \
  const Tensor &window_keys, const Tensor &window_values, const Tensor &compressed_keys,   \
      const Tensor &compressed_values, const Tensor &sink_keys, const Tensor &sink_values, \
      const Tensor &seen
#define CTX_STATE \
  {window_keys, window_values, compressed_keys, compressed_values, sink_keys, sink_values, seen}
#define CTX_SETTINGS_PARAMETERS                                                                \
  at::IntArrayRef schedule, c10::string_view distance, int64_t rotary_dim, double rotary_base, \
      bool rotary_interleaved
#define CTX_SETTINGS schedule, distance, rotary_dim, rotary_base, rotary_interleaved

// A call is walked in blocks as long as the rings have headroom: a block is written before its
// first query attends.
Tensor step(const Tensor& q,
            const Tensor& k,
            const Tensor& v,
            const OptionalTensor& lengths,
            CTX_STATE_PARAMETERS,
            at::TensorList parameters,
            c10::string_view compressor,
            const OptionalTensor& bias,
            CTX_SETTINGS_PARAMETERS,
            double scale) {
  constexpr const char* where = "ctx.step_";
  const Memory memory(CTX_STATE, CTX_SETTINGS, where);
  Writer writer(memory, k, v, lengths, parameters, compressor, where);
  check_queries(memory.state, q, k.size(2), bias, where);
  Reader reader(memory, q, bias, scale);
  for (int64_t offset = 0; offset < writer.tokens(); offset += memory.headroom) {
    writer.write(writer.block(offset));
    reader.attend(writer.block(offset));
  }
  writer.finish();
  return reader.out();
}

void append(const Tensor& k,
            const Tensor& v,
            const OptionalTensor& lengths,
            CTX_STATE_PARAMETERS,
            at::TensorList parameters,
            c10::string_view compressor,
            CTX_SETTINGS_PARAMETERS) {
  constexpr const char* where = "ctx.append_";
  const Memory memory(CTX_STATE, CTX_SETTINGS, where);
  Writer writer(memory, k, v, lengths, parameters, compressor, where);
  for (int64_t offset = 0; offset < writer.tokens(); offset += memory.headroom)
    writer.write(writer.block(offset));
  writer.finish();
}

Tensor attend_memory(const Tensor& q,
                     CTX_STATE_PARAMETERS,
                     const OptionalTensor& bias,
                     CTX_SETTINGS_PARAMETERS,
                     double scale) {
  constexpr const char* where = "ctx.attend_memory";
  const Memory memory(CTX_STATE, CTX_SETTINGS, where);
  check_queries(memory.state, q, -1, bias, where);
  CTX_CHECK_VALUE(q.size(2) <= memory.headroom,
                  where,
                  "q must have at most headroom = ",
                  memory.headroom,
                  " tokens, got ",
                  q.size(2));
  Reader reader(memory, q, bias, scale);
  if (q.size(2) > 0) reader.attend({memory.seen(), nullptr, 0, q.size(2), q.size(2)});
  return reader.out();
}

Tensor attended(const Tensor& q, const Tensor& window_values) {
  auto sizes = q.sym_sizes().vec();
  sizes[3] = window_values.sym_size(3);
  return q.new_empty_symint(sizes);
}

#define CTX_UNUSED_STATE                                                                           \
  const Tensor & /*window_keys*/, const Tensor &window_values, const Tensor & /*compressed_keys*/, \
      const Tensor & /*compressed_values*/, const Tensor & /*sink_keys*/,                          \
      const Tensor & /*sink_values*/, const Tensor & /*seen*/
#define CTX_UNUSED_SETTINGS                                                            \
  at::IntArrayRef /*schedule*/, c10::string_view /*distance*/, int64_t /*rotary_dim*/, \
      double /*rotary_base*/, bool /*rotary_interleaved*/

Tensor step_meta(const Tensor& q,
                 const Tensor& /*k*/,
                 const Tensor& /*v*/,
                 const OptionalTensor& /*lengths*/,
                 CTX_UNUSED_STATE,
                 at::TensorList /*parameters*/,
                 c10::string_view /*compressor*/,
                 const OptionalTensor& /*bias*/,
                 CTX_UNUSED_SETTINGS,
                 double /*scale*/) {
  return attended(q, window_values);
}

void append_meta(const Tensor& /*k*/,
                 const Tensor& /*v*/,
                 const OptionalTensor& /*lengths*/,
                 const Tensor& /*window_keys*/,
                 const Tensor& /*window_values*/,
                 const Tensor& /*compressed_keys*/,
                 const Tensor& /*compressed_values*/,
                 const Tensor& /*sink_keys*/,
                 const Tensor& /*sink_values*/,
                 const Tensor& /*seen*/,
                 at::TensorList /*parameters*/,
                 c10::string_view /*compressor*/,
                 CTX_UNUSED_SETTINGS) {}

Tensor attend_memory_meta(const Tensor& q,
                          CTX_UNUSED_STATE,
                          const OptionalTensor& /*bias*/,
                          CTX_UNUSED_SETTINGS,
                          double /*scale*/) {
  return attended(q, window_values);
}

}  // namespace

std::array<std::vector<int64_t>, kStateTensors> state_sizes(const Schedule& schedule,
                                                            int64_t batch,
                                                            int64_t kv_heads,
                                                            int64_t head_dim,
                                                            int64_t value_dim,
                                                            int64_t headroom) {
  const int64_t window = schedule.window_capacity(headroom);
  const int64_t compressed = schedule.compressed_capacity(headroom);
  return {{
      {batch, kv_heads, window, head_dim},
      {batch, kv_heads, window, value_dim},
      {batch, kv_heads, compressed, head_dim},
      {batch, kv_heads, compressed, value_dim},
      {batch, kv_heads, schedule.sinks, head_dim},
      {batch, kv_heads, schedule.sinks, value_dim},
      {batch},
  }};
}

int64_t check_state(at::TensorList state, const Schedule& schedule, const char* where) {
  CTX_CHECK_VALUE(
      state.size() == kStateTensors, where, "memory must be 7 tensors, got ", state.size());
  const Tensor& keys = state[0];
  CTX_CHECK_VALUE(
      keys.dim() == 4, where, "window_keys must be [B, Hkv, capacity, D], got ", keys.sizes());
  CTX_CHECK_VALUE(state[1].dim() == 4,
                  where,
                  "window_values must be [B, Hkv, capacity, Dv], got ",
                  state[1].sizes());
  const int64_t headroom = keys.size(2) - schedule.max_window();
  CTX_CHECK_VALUE(headroom >= 1,
                  where,
                  "window_keys must hold more than ",
                  schedule.max_window(),
                  " tokens for this schedule, got ",
                  keys.size(2));
  const auto sizes =
      state_sizes(schedule, keys.size(0), keys.size(1), keys.size(3), state[1].size(3), headroom);
  for (int i = 0; i < kStateTensors; ++i) {
    const auto type = i == 6 ? at::kLong : keys.scalar_type();
    CTX_CHECK_VALUE(state[i].sizes() == at::IntArrayRef(sizes[i]),
                    where,
                    kNames[i],
                    " must be ",
                    at::IntArrayRef(sizes[i]),
                    ", got ",
                    state[i].sizes());
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
                    state[i].strides());
  }
  return headroom;
}

void check_pairs(at::TensorList state,
                 const Tensor& k,
                 const Tensor& v,
                 const OptionalTensor& lengths,
                 const char* where) {
  const Tensor& keys = state[0];
  const int64_t batch = keys.size(0);
  const int64_t kv_heads = keys.size(1);
  const auto check = [&](const Tensor& x, const char* name, const char* width_name, int64_t width) {
    CTX_CHECK_VALUE(
        x.dim() == 4 && x.size(0) == batch && x.size(1) == kv_heads && x.size(3) == width,
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
        x.sizes());
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
  };
  check(k, "k", "D", keys.size(3));
  check(v, "v", "Dv", state[1].size(3));
  CTX_CHECK_VALUE(v.size(2) == k.size(2),
                  where,
                  "v must have as many tokens as k = ",
                  k.size(2),
                  ", got ",
                  v.size(2));
  if (!lengths) return;
  CTX_CHECK_TYPE(lengths->scalar_type() == at::kLong,
                 where,
                 "lengths must be int64, got ",
                 lengths->scalar_type());
  CTX_CHECK_VALUE(lengths->dim() == 1 && lengths->size(0) == batch,
                  where,
                  "lengths must be [B] = [",
                  batch,
                  "], got ",
                  lengths->sizes());
  CTX_CHECK_VALUE(lengths->device() == keys.device(),
                  where,
                  "lengths must be on ",
                  keys.device(),
                  " as the memory, got ",
                  lengths->device());
  // A device is never asked for values.
  if (!lengths->is_cpu() || batch == 0) return;
  const Tensor values = lengths->contiguous();
  for (int64_t b = 0; b < batch; ++b) {
    const int64_t length = values.const_data_ptr<int64_t>()[b];
    CTX_CHECK_VALUE(length >= 0 && length <= k.size(2),
                    where,
                    "lengths must be between 0 and T = ",
                    k.size(2),
                    ", got ",
                    length,
                    " in row ",
                    b);
  }
}

void check_queries(at::TensorList state,
                   const Tensor& q,
                   int64_t tokens,
                   const OptionalTensor& bias,
                   const char* where) {
  const Tensor& keys = state[0];
  const int64_t kv_heads = keys.size(1);
  CTX_CHECK_VALUE(q.dim() == 4 && q.size(0) == keys.size(0) && q.size(3) == keys.size(3),
                  where,
                  "q must be [B, H, T, D] = [",
                  keys.size(0),
                  ", H, T, ",
                  keys.size(3),
                  "], got ",
                  q.sizes());
  CTX_CHECK_VALUE(q.size(1) > 0 && q.size(1) % kv_heads == 0,
                  where,
                  "q must have a multiple of Hkv = ",
                  kv_heads,
                  " heads, got ",
                  q.size(1));
  CTX_CHECK_VALUE(tokens < 0 || q.size(2) == tokens,
                  where,
                  "q must have as many tokens as k = ",
                  tokens,
                  ", got ",
                  q.size(2));
  CTX_CHECK_TYPE(q.scalar_type() == keys.scalar_type(),
                 where,
                 "q must be ",
                 keys.scalar_type(),
                 " as the memory, got ",
                 q.scalar_type());
  CTX_CHECK_VALUE(q.device() == keys.device(),
                  where,
                  "q must be on ",
                  keys.device(),
                  " as the memory, got ",
                  q.device());
  if (!bias) return;
  CTX_CHECK_VALUE(bias->dim() == 1 && (bias->size(0) == q.size(1) || bias->size(0) == 1),
                  where,
                  "compressed_bias must be [H] = [",
                  q.size(1),
                  "], got ",
                  bias->sizes());
  CTX_CHECK_VALUE(bias->device() == keys.device(),
                  where,
                  "compressed_bias must be on ",
                  keys.device(),
                  ", got ",
                  bias->device());
}

#define CTX_MUTABLE_STATE                                                                     \
  "Tensor(a!) window_keys, Tensor(b!) window_values, Tensor(c!) compressed_keys, Tensor(d!) " \
  "compressed_values, Tensor(e!) sink_keys, Tensor(f!) sink_values, Tensor(g!) seen, "
#define CTX_SETTINGS_SCHEMA \
  "int[] schedule, str distance, int rotary_dim, float rotary_base, bool rotary_interleaved"

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def("step_(Tensor q, Tensor k, Tensor v, Tensor? lengths, " CTX_MUTABLE_STATE
        "Tensor[] parameters, str compressor, Tensor? bias, " CTX_SETTINGS_SCHEMA
        ", float scale) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def("append_(Tensor k, Tensor v, Tensor? lengths, " CTX_MUTABLE_STATE
        "Tensor[] parameters, str compressor, " CTX_SETTINGS_SCHEMA ") -> ()",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "attend_memory(Tensor q, Tensor window_keys, Tensor window_values, Tensor compressed_keys, "
      "Tensor "
      "compressed_values, Tensor sink_keys, Tensor sink_values, Tensor seen, Tensor? "
      "bias, " CTX_SETTINGS_SCHEMA ", float scale) -> Tensor",
      {at::Tag::pt2_compliant_tag});
}

// The kernels' table knows the device; the walk is the same on each.
#define CTX_REGISTER_MEMORY(key)            \
  TORCH_LIBRARY_IMPL(ctx, key, m) {         \
    m.impl("step_", step);                  \
    m.impl("append_", append);              \
    m.impl("attend_memory", attend_memory); \
  }
CTX_REGISTER_MEMORY(CPU)
CTX_REGISTER_MEMORY(CUDA)

TORCH_LIBRARY_IMPL(ctx, Meta, m) {
  m.impl("step_", step_meta);
  m.impl("append_", append_meta);
  m.impl("attend_memory", attend_memory_meta);
}

// Mutation and differentiation never meet in one operator: these record nothing, by contract.
TORCH_LIBRARY_IMPL(ctx, Autograd, m) {
  m.impl("step_", torch::CppFunction::makeFallthrough());
  m.impl("append_", torch::CppFunction::makeFallthrough());
  m.impl("attend_memory", torch::CppFunction::makeFallthrough());
}

}  // namespace ctx::ops
