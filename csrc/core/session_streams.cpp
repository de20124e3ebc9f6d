// Who is in a session: joining and leaving, forks, and snapshots of single streams.
#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>

#include "core/huge_pages.h"
#include "core/settings.h"
#include "ctx/session.h"
#include "ops/check.h"
#include "ops/rows.h"

namespace ctx {
namespace {

using at::Tensor;

constexpr const char* kStreamFormat = "ctx.Session";
constexpr int64_t kStreamVersion = 1;

std::string prefix(int64_t layer) { return "layer." + std::to_string(layer) + "."; }

template <typename Value>
bool holds(const Snapshot& snapshot, const char* name, const Value& value) {
  const auto found = snapshot.find(name);
  if (found == snapshot.end()) return false;
  const Value* const held = std::get_if<Value>(&found->second);
  return held != nullptr && *held == value;
}

}  // namespace

Session::Session(std::vector<MemoryOptions> layers, int64_t rows) {
  constexpr const char* where = "ctx.Session";
  CTX_CHECK_VALUE(!layers.empty(), where, "layers must be at least one, got none");
  check_size(where, "rows", rows);
  max_rewind_ = layers[0].max_rewind;
  for (MemoryOptions& options : layers) {
    CTX_CHECK_VALUE(options.max_rewind == max_rewind_,
                    where,
                    "layers must have one max_rewind = ",
                    max_rewind_,
                    ", got ",
                    options.max_rewind);
    CTX_CHECK_VALUE(options.device == layers[0].device,
                    where,
                    "layers must be on one device = ",
                    layers[0].device,
                    ", got ",
                    options.device);
    options.batch_size = rows;
    layers_.emplace_back(std::move(options));
    counts_attention_ =
        counts_attention_ || layers_.back().options().compressor.name == "most_used";
    auto& tensors = layers_.back().tensors_;
    for (size_t i = 0; i < layers_.back().rings().size(); ++i)
      tensors[i] = in_huge_pages(tensors[i]);
    for (const int clock : {ops::kSeen, ops::kRewindable})
      tensors[clock] = layers_[0].tensors_[clock];
  }
  rows_.resize(rows);
  for (int64_t row = rows - 1; row >= 0; --row) free_.push_back(row);
}

void Session::write_clock(const std::vector<int64_t>& rows) {
  const at::NoGradGuard no_grad;
  const Tensor &seen = layers_[0].seen(), &rewindable = layers_[0].rewindable();
  if (seen.is_cpu()) {
    for (const int64_t row : rows) {
      seen.data_ptr<int64_t>()[row] = rows_[row].seen;
      rewindable.data_ptr<int64_t>()[row] = rows_[row].rewindable;
    }
    return;
  }
  std::vector<int64_t> counts, spare;
  for (const int64_t row : rows)
    counts.push_back(rows_[row].seen), spare.push_back(rows_[row].rewindable);
  const auto there = [&](const std::vector<int64_t>& numbers) {
    return at::tensor(numbers, at::kLong).to(seen.device());
  };
  const Tensor index = there(rows);
  Tensor(seen).index_copy_(0, index, there(counts));
  Tensor(rewindable).index_copy_(0, index, there(spare));
}

int64_t Session::row_of(int64_t id, const char* where) const {
  const auto found = row_of_.find(id);
  CTX_CHECK_INDEX(found != row_of_.end(),
                  where,
                  "id must be of a stream that joined and has not left, got ",
                  id);
  return found->second;
}

int64_t Session::whole_row_of(int64_t id, const char* where) const {
  const int64_t row = row_of(id, where);
  CTX_CHECK_VALUE(
      rows_[row].rewindable != rows::kOpen,
      where,
      "id must be of a stream whose last tick ended, got one that was interrupted (let it "
      "leave, and take it from a snapshot): ",
      id);
  return row;
}

int64_t Session::free_row(const char* where) const {
  CTX_CHECK_VALUE(
      !free_.empty(), where, "streams must be at most rows = ", rows(), ", got one more");
  return free_.back();
}

// The row that free_row() gave has a stream.
int64_t Session::enter(int64_t row, Row state) {
  change();
  free_.pop_back();
  rows_[row] = state;
  write_clock({row});
  row_of_.emplace(next_id_, row);
  return next_id_++;
}

int64_t Session::join() { return enter(free_row("ctx.Session.join"), {}); }

void Session::leave(int64_t id) {
  const int64_t row = row_of(id, "ctx.Session.leave");
  change();
  {
    const at::NoGradGuard no_grad;
    for (const KVMemory& layer : layers_) {
      for (const Tensor& ring : layer.rings()) ring.select(0, row).zero_();
    }
  }
  rows_[row] = {};
  write_clock({row});
  row_of_.erase(id);
  free_.push_back(row);
}

int64_t Session::fork(int64_t id) {
  constexpr const char* where = "ctx.Session.fork";
  const int64_t from = whole_row_of(id, where), to = free_row(where);
  const at::NoGradGuard no_grad;
  for (const KVMemory& layer : layers_) {
    for (const Tensor& ring : layer.rings()) ring.select(0, to).copy_(ring.select(0, from));
  }
  return enter(to, rows_[from]);
}

void Session::rewind(int64_t id, int64_t tokens) {
  constexpr const char* where = "ctx.Session.rewind";
  const int64_t row = whole_row_of(id, where);
  for (const KVMemory& layer : layers_) ops::refuse_counted(layer.tensors(), where);
  Row& held = rows_[row];
  CTX_CHECK_VALUE(tokens >= 0 && tokens <= held.rewindable,
                  where,
                  "tokens must be between 0 and what the stream can take back = ",
                  held.rewindable,
                  ", got ",
                  tokens);
  change();
  held.seen -= tokens, held.rewindable -= tokens;
  write_clock({row});
}

int64_t Session::seen(int64_t id) const { return rows_[row_of(id, "ctx.Session.seen")].seen; }

int64_t Session::rewindable(int64_t id) const {
  return std::max<int64_t>(0, rows_[row_of(id, "ctx.Session.rewindable")].rewindable);
}

std::vector<int64_t> Session::ids() const {
  std::vector<int64_t> made;
  for (const auto& [id, row] : row_of_) made.push_back(id);
  std::sort(made.begin(), made.end());
  return made;
}

int64_t Session::bytes() const {
  int64_t total = 0;
  for (const KVMemory& layer : layers_) total += layer.nbytes();
  const auto clock = layers_[0].seen().nbytes() + layers_[0].rewindable().nbytes();
  return total - (layers() - 1) * static_cast<int64_t>(clock);  // which they share
}

Snapshot Session::state_of(int64_t id, const char* where) const {
  const int64_t row = whole_row_of(id, where);
  const at::NoGradGuard no_grad;
  const Tensor index = at::full({1}, row, layers_[0].seen().options());
  Snapshot all = {
      {"format", std::string(kStreamFormat)}, {"version", kStreamVersion}, {"layers", layers()}};
  for (int64_t layer = 0; layer < layers(); ++layer) {
    for (auto& [name, part] : layers_[layer].select(index).state_dict())
      all[prefix(layer) + name] = part;
  }
  return all;
}

std::vector<char> Session::snapshot(int64_t id) const {
  constexpr const char* where = "ctx.Session.snapshot";
  return snapshot_bytes(state_of(id, where), where);
}

void Session::save(int64_t id, const std::string& path) const {
  constexpr const char* where = "ctx.Session.save";
  write_snapshot(state_of(id, where), path, where);
}

int64_t Session::restore(const std::vector<char>& bytes) {
  constexpr const char* where = "ctx.Session.restore";
  free_row(where);
  return take(snapshot_of_bytes(bytes, where), where);
}

int64_t Session::load(const std::string& path) {
  constexpr const char* where = "ctx.Session.load";
  free_row(where);
  return take(read_snapshot(path, where), where);
}

int64_t Session::take(const Snapshot& snapshot, const std::string& where) {
  CTX_CHECK_VALUE(holds(snapshot, "format", std::string(kStreamFormat)),
                  where,
                  "format must be ",
                  kStreamFormat,
                  ", got another");
  CTX_CHECK_VALUE(holds(snapshot, "version", kStreamVersion),
                  where,
                  "version must be ",
                  kStreamVersion,
                  ", got another");
  CTX_CHECK_VALUE(holds(snapshot, "layers", layers()),
                  where,
                  "layers must be as many as the session's = ",
                  layers(),
                  ", got another number");
  const int64_t row = free_row(where.c_str());
  const at::NoGradGuard no_grad;
  const Tensor index = at::full({1}, row, layers_[0].seen().options());
  std::vector<KVMemory> made;
  size_t known = 3;
  Row state;
  for (int64_t layer = 0; layer < layers(); ++layer) {
    const std::string at = layers() == 1 ? where : where + ": layer " + std::to_string(layer);
    Snapshot part;
    const std::string begin = prefix(layer);
    for (auto found = snapshot.lower_bound(begin);
         found != snapshot.end() && found->first.compare(0, begin.size(), begin) == 0;
         ++found)
      part[found->first.substr(begin.size())] = found->second;
    known += part.size();
    made.push_back(layers_[layer].select(index));
    made.back().take_state(part, at.c_str());
    const Row mine{made.back().seen()[0].item<int64_t>(),
                   made.back().rewindable()[0].item<int64_t>()};
    if (layer == 0) state = mine;
    CTX_CHECK_VALUE(mine.seen == state.seen && mine.rewindable == state.rewindable,
                    at,
                    "seen must be that of all layers = ",
                    state.seen,
                    ", got ",
                    mine.seen);
  }
  CTX_CHECK_VALUE(known == snapshot.size(),
                  where,
                  "snapshot must hold what version ",
                  kStreamVersion,
                  " holds, got ",
                  snapshot.size() - known,
                  " other parts");
  for (int64_t layer = 0; layer < layers(); ++layer) {
    const at::TensorList from = made[layer].rings(), to = layers_[layer].rings();
    for (size_t i = 0; i < from.size(); ++i) to[i].select(0, row).copy_(from[i][0]);
  }
  return enter(row, state);
}

}  // namespace ctx
