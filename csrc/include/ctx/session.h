// Session: many independent streams in one set of rings, for applications that serve them.
//
// A session has a fixed number of rows, each with room for one stream in every layer of a model; all
// that it will ever hold is allocated when it is made. A stream joins, gets an id, brings tokens in
// any call together with any other streams, and leaves; what it gets does not depend on who else is
// there. Calls work on the rows of their streams where they lie: other streams are neither read,
// copied nor padded.
//
// A tick is one pass of a model over some streams: step() for layer 0, 1, ... to the last, or tick().
// A stream's clock advances once, when the tick's last layer is done: a tick that was begun and is not
// ended has not happened. It is given up by an error in the middle of a layer's work, by step() for
// layer 0, and by every other call that changes the session. Two things are left of it: what it wrote
// lies in spare entries, so that its streams can rewind by as many tokens less; and where it brought
// a stream more tokens than there are spare entries (MemoryOptions::max_rewind), or the compressor
// chooses by usage, that stream is interrupted: it can only leave, and be taken from a snapshot.
//
// Every function that throws leaves the session as it was; the exception is an error of the work itself
// (memory, a compressor of one's own), which gives up the tick. IndexError: an id or a layer that
// is not there. ValueError and TypeError: anything else that does not fit. Records no gradient.
//
// Not safe to call from two threads on one object; different objects are independent.
#pragma once

#include <ATen/core/Tensor.h>

#include <functional>
#include <map>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "ctx/export.h"
#include "ctx/memory.h"
#include "ctx/snapshot.h"

namespace ctx {

class CTX_API Session {
 public:
  // Tokens that each stream of a call brings, 0 ... T; absent: all bring T.
  using Lengths = std::optional<std::vector<int64_t>>;

  // What a layer of a model calls: q [N, H, T, D], k [N, Hkv, T, D], v [N, Hkv, T, Dv] -> [N, H, T,
  // Dv].
  using Attend =
      std::function<at::Tensor(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v)>;

  // A layer of a model: its number, its input [N, T, ...] and the attention, which it calls once, ->
  // its output [N, T, ...].
  using Layer = std::function<at::Tensor(int64_t layer, const at::Tensor& x, const Attend& attend)>;

  // Room for `rows` streams in these layers, whose batch_size is not read. They are on one device and
  // have one max_rewind. Throws what MemoryOptions::validate throws.
  Session(std::vector<MemoryOptions> layers, int64_t rows);

  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;
  Session(Session&&) = default;
  Session& operator=(Session&&) = default;

  // Begins a stream. Returns its id, which no other stream of this session ever has. ValueError where
  // all rows are taken.
  int64_t join();

  // Ends a stream, and erases what it held.
  void leave(int64_t id);

  // One layer of a tick: appends tokens to these streams and returns what their queries attend to.
  //
  //   ids      the streams, all different; of one tick the same in every layer, as are the lengths
  //   layer    0 begins a tick; then the next one; the last one ends it
  //   q [N, H, T, D], k [N, Hkv, T, D], v [N, Hkv, T, Dv], un-rotated; dtype and device of the
  //     layer, any strides
  //   lengths  stream i brings its first lengths[i] tokens, the rest is padding that nothing sees
  //   returns [N, H, T, Dv], a fresh tensor; zero at padding
  at::Tensor step(const std::vector<int64_t>& ids,
                  int64_t layer,
                  const at::Tensor& q,
                  const at::Tensor& k,
                  const at::Tensor& v,
                  const Lengths& lengths = std::nullopt);

  // A whole tick: runs all layers over what each stream brings, of any number of tokens.
  //
  //   x        for each stream [T, ...]: any T, the rest and the dtype alike, what layer 0 reads
  //   layer    called for layer 0, 1, ... of every batch; it must not change the session
  //   returns  for each stream [T, ...], what the last layer returned
  //
  // Streams are put together into batches so that none is padded to twice its tokens or more, and no
  // clock advances before the last layer of the last batch. What `layer` throws gives up the tick.
  std::vector<at::Tensor> tick(const std::vector<int64_t>& ids,
                               const std::vector<at::Tensor>& x,
                               const Layer& layer);

  // A second stream that holds what this one does. ValueError where all rows are taken.
  int64_t fork(int64_t id);

  // Takes back the last tokens of a stream, as if they had not come. Exact, and refused with a
  // ValueError beyond rewindable(id) and where a compressor chooses by usage.
  void rewind(int64_t id, int64_t tokens);

  // What a stream holds, as the bytes of the file that save() writes; their number does not depend on
  // how long it is. The file is a snapshot (snapshot.h: safetensors), whole or not at all:
  //
  //   "format"            "ctx.Session"
  //   "version"           1
  //   "layers"            their number
  //   "layer.<n>.<name>"  what KVMemory::state_dict holds of layer n with a batch_size of 1
  std::vector<char> snapshot(int64_t id) const;
  void save(int64_t id, const std::string& path) const;

  // A new stream that holds what a snapshot does, of this session or of another of the same settings,
  // in any floating dtype. ValueError, before anything is written, where all rows are taken, and for
  // bytes that are damaged or of another format, version or setting, which is named.
  int64_t restore(const std::vector<char>& bytes);
  int64_t load(const std::string& path);

  // Tokens that a stream has seen, and how many of them can be taken back.
  int64_t seen(int64_t id) const;
  int64_t rewindable(int64_t id) const;

  // The streams that are there, in the order of their ids; how many there may be; and layers.
  std::vector<int64_t> ids() const;
  int64_t rows() const { return static_cast<int64_t>(rows_.size()); }
  int64_t layers() const { return static_cast<int64_t>(layers_.size()); }

  // Bytes of all tensors, and a stream's share of them. Constant.
  int64_t bytes() const;
  int64_t bytes_per_stream() const { return bytes() / rows(); }

 private:
  // What the host knows of a row; the clock on the device follows it.
  struct Row {
    int64_t seen = 0;
    int64_t rewindable = 0;  // rows::kOpen: of a stream that was interrupted
  };

  // Some streams in one batch, and how far they are.
  struct Call {
    std::vector<int64_t> ids;
    std::vector<int64_t> rows;
    std::vector<int64_t> counts;
    int64_t tokens = 0;
    at::Tensor row_index;                              // int64 [N], on the device
    std::optional<at::Tensor> lengths;                 // int64 [N], on the device
    std::map<std::vector<int64_t>, at::Tensor> plans;  // by what operators take of the law
    std::vector<Row> after;  // the rows when the call has ended; empty: nothing was written
    int64_t next_layer = 0;
    int64_t changes = 0;  // of the session, when the call was made
  };

  Call prepared(const std::vector<int64_t>& ids,
                int64_t tokens,
                const Lengths& lengths,
                const char* where) const;
  void check_tensors(int64_t layer,
                     int64_t streams,
                     const at::Tensor& q,
                     const at::Tensor& k,
                     const at::Tensor& v,
                     const char* where) const;
  at::Tensor run(Call& call, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v);
  std::vector<at::Tensor> operands(const Call& call,
                                   const at::Tensor& k,
                                   const at::Tensor& v,
                                   const at::Tensor& plan) const;
  const at::Tensor& plan_of(Call& call) const;
  void change();
  void check_unchanged(const Call& call, const char* where) const;
  void begin(Call& call);
  void end(const Call& call);
  void write_clock(const std::vector<int64_t>& rows);
  int64_t row_of(int64_t id, const char* where) const;
  int64_t whole_row_of(int64_t id, const char* where) const;
  int64_t free_row(const char* where) const;
  int64_t enter(int64_t row, Row state);
  Snapshot state_of(int64_t id, const char* where) const;
  int64_t take(const Snapshot& snapshot, const std::string& where);

  std::vector<KVMemory> layers_;  // all on one clock
  std::vector<Row> rows_;
  std::vector<int64_t> free_;  // rows without a stream
  std::unordered_map<int64_t, int64_t> row_of_;
  std::optional<Call> call_;  // the tick that step() has begun
  int64_t next_id_ = 0;
  int64_t changes_ = 0;  // calls that changed the session or began a tick
  int64_t max_rewind_ = 0;
  bool counts_attention_ = false;
};

}  // namespace ctx
