// Ticks: how streams bring tokens.
#include "ctx/session.h"

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>

#include <algorithm>
#include <bit>

#include "core/settings.h"
#include "ops/check.h"
#include "ops/plan.h"
#include "ops/settings.h"
#include "ops/state.h"
#include "ops/step.h"

namespace ctx {
namespace {

using at::Tensor;

Tensor on_device(const std::vector<int64_t>& numbers, at::Device device) {
  return at::tensor(numbers, at::kLong).to(device);
}

ops::ScoreOperands scores_of(const MemoryOptions& options) {
  return {options.compressed_bias, options.attention.alibi_slopes, options.attention.relative};
}

auto packed_of(const MemoryOptions& options) {
  return pack(options.attention, options.compressor.name);
}

// Where streams of so many tokens are put together: none becomes twice as long.
int64_t size_class(int64_t tokens) { return std::bit_width(static_cast<uint64_t>(tokens)); }

// What streams of a batch bring, each with zeros behind it.
Tensor padded(const std::vector<Tensor>& x, const std::vector<size_t>& batch, int64_t tokens) {
  const Tensor& first = x[batch[0]];
  if (batch.size() == 1) return first.unsqueeze(0);
  std::vector<int64_t> sizes = first.sizes().vec();
  sizes[0] = tokens;
  sizes.insert(sizes.begin(), static_cast<int64_t>(batch.size()));
  const Tensor made = at::zeros(sizes, first.options());
  for (size_t i = 0; i < batch.size(); ++i) {
    const Tensor& mine = x[batch[i]];
    made[static_cast<int64_t>(i)].narrow(0, 0, mine.size(0)).copy_(mine);
  }
  return made;
}

void check_inputs(const std::vector<Tensor>& x, size_t streams, const char* where) {
  CTX_CHECK_VALUE(x.size() == streams,
                  where,
                  "x must be a tensor for each stream = ",
                  streams,
                  ", got ",
                  x.size());
  for (const Tensor& mine : x) {
    CTX_CHECK_VALUE(mine.defined() && mine.dim() >= 1, where, "x must be [T, ...] for each stream");
    const at::IntArrayRef rest = mine.sizes().slice(1), wanted = x[0].sizes().slice(1);
    CTX_CHECK_VALUE(
        rest == wanted, where, "x must be [T, ...] with ... = ", wanted, ", got ", rest);
    CTX_CHECK_TYPE(mine.scalar_type() == x[0].scalar_type() && mine.device() == x[0].device(),
                   where,
                   "x must be ",
                   x[0].scalar_type(),
                   " on ",
                   x[0].device(),
                   " for every stream, got ",
                   mine.scalar_type(),
                   " on ",
                   mine.device());
  }
}

}  // namespace

Session::Call Session::prepared(const std::vector<int64_t>& ids,
                                int64_t tokens,
                                const Lengths& lengths,
                                const char* where) const {
  Call call;
  call.ids = ids, call.tokens = tokens, call.changes = changes_;
  for (const int64_t id : ids) call.rows.push_back(whole_row_of(id, where));
  std::vector<int64_t> sorted = ids;
  std::sort(sorted.begin(), sorted.end());
  const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
  CTX_CHECK_VALUE(twice == sorted.end(), where, "ids must be different, got ", *twice, " twice");
  call.counts = lengths.value_or(std::vector<int64_t>(ids.size(), tokens));
  CTX_CHECK_VALUE(call.counts.size() == ids.size(),
                  where,
                  "lengths must be a number for each stream = ",
                  ids.size(),
                  ", got ",
                  call.counts.size());
  for (const int64_t count : call.counts) {
    CTX_CHECK_VALUE(count >= 0 && count <= tokens,
                    where,
                    "lengths must be between 0 and T = ",
                    tokens,
                    ", got ",
                    count);
  }
  const at::Device device = layers_[0].options().device;
  call.row_index = on_device(call.rows, device);
  if (lengths) call.lengths = on_device(call.counts, device);
  return call;
}

void Session::check_tensors(int64_t layer,
                            int64_t streams,
                            const Tensor& q,
                            const Tensor& k,
                            const Tensor& v,
                            const char* where) const {
  const KVMemory& memory = layers_[layer];
  ops::check_pairs(memory.rings(), k, v, where, streams);
  ops::check_queries(memory.rings(), q, k.size(2), scores_of(memory.options()), where, streams);
}

const Tensor& Session::plan_of(Call& call) const {
  const MemoryOptions& options = layers_[call.next_layer].options();
  const auto packed = packed_of(options);
  Tensor& plan = call.plans[packed.settings];  // most models have one law
  if (!plan.defined()) {
    plan = ops::plan(layers_[0].seen(),
                     call.lengths,
                     {},
                     call.tokens,
                     packed.settings,
                     /*carried=*/true,
                     call.row_index);
  }
  return plan;
}

std::vector<Tensor> Session::operands(const Call& call,
                                      const Tensor& k,
                                      const Tensor& v,
                                      const Tensor& plan) const {
  const KVMemory& memory = layers_[call.next_layer];
  const bool here = memory.options().compressor.name != "custom" || k.is_cpu();
  if (here) return memory.operands(k, v, plan);
  // torch's own operators make the groups there: of a memory that has these rows alone.
  const Tensor own = plan.clone();
  own.select(1, kPlanRow).fill_(-1);
  return memory.select(call.row_index).operands(k, v, own);
}

// Before a ring is written the clock says what an interrupted tick would leave.
void Session::begin(Call& call) {
  for (size_t i = 0; i < call.rows.size(); ++i) {
    Row& row = rows_[call.rows[i]];
    const int64_t count = call.counts[i];
    call.after.push_back({row.seen + count, std::min(row.rewindable + count, max_rewind_)});
    const bool opens = count > max_rewind_ || (counts_attention_ && count > 0);
    row.rewindable = opens ? rows::kOpen : std::min(row.rewindable, max_rewind_ - count);
  }
  write_clock(call.rows);
}

void Session::end(const Call& call) {
  if (call.after.empty()) return;
  for (size_t i = 0; i < call.rows.size(); ++i) rows_[call.rows[i]] = call.after[i];
  write_clock(call.rows);
}

// Every tick but this one is over.
void Session::change() {
  call_.reset();
  ++changes_;
}

void Session::check_unchanged(const Call& call, const char* where) const {
  CTX_CHECK_VALUE(
      call.changes == changes_,
      where,
      "layer must leave the session as it is, got one that was changed in the middle of a "
      "tick");
}

Tensor Session::run(Call& call, const Tensor& q, const Tensor& k, const Tensor& v) {
  const at::NoGradGuard no_grad;
  const MemoryOptions& options = layers_[call.next_layer].options();
  if (call.rows.empty() || call.tokens == 0) {
    ++call.next_layer;
    return at::empty({q.size(0), q.size(1), q.size(2), v.size(3)}, q.options());
  }
  const Tensor& plan = plan_of(call);
  const std::vector<Tensor> made = operands(call, k, v, plan);
  if (call.after.empty()) begin(call);
  const auto rings = layers_[call.next_layer].rings();
  const Tensor out = std::get<0>(ops::step_(
      q, k, v, plan, rings, made, scores_of(options), packed_of(options), /*weights=*/false));
  ++call.next_layer;
  return out;
}

Tensor Session::step(const std::vector<int64_t>& ids,
                     int64_t layer,
                     const Tensor& q,
                     const Tensor& k,
                     const Tensor& v,
                     const Lengths& lengths) {
  constexpr const char* where = "ctx.Session.step";
  CTX_CHECK_INDEX(layer >= 0 && layer < layers(),
                  where,
                  "layer must be between 0 and ",
                  layers() - 1,
                  ", got ",
                  layer);
  check_tensors(layer, static_cast<int64_t>(ids.size()), q, k, v, where);
  const int64_t tokens = k.size(2);
  if (layer == 0) {
    Call call = prepared(ids, tokens, lengths, where);
    change();
    call.changes = changes_;
    call_ = std::move(call);
  } else {
    const int64_t next = call_ ? call_->next_layer : 0;
    CTX_CHECK_VALUE(
        layer == next, where, "layer must be the tick's next = ", next, ", got ", layer);
    const bool same = call_->ids == ids && call_->tokens == tokens &&
                      lengths.has_value() == call_->lengths.has_value() &&
                      (!lengths || *lengths == call_->counts);
    CTX_CHECK_VALUE(same, where, "ids, T and lengths must be those of layer 0, got others");
  }
  try {
    const Tensor out = run(*call_, q, k, v);
    if (call_->next_layer == layers()) {
      end(*call_);
      call_.reset();
    }
    return out;
  } catch (...) {
    call_.reset();
    throw;
  }
}

std::vector<Tensor> Session::tick(const std::vector<int64_t>& ids,
                                  const std::vector<Tensor>& x,
                                  const Layer& layer) {
  constexpr const char* where = "ctx.Session.tick";
  check_inputs(x, ids.size(), where);
  prepared(ids, 0, std::nullopt, where);  // all ids, before the first batch is worked on
  change();
  std::map<int64_t, std::vector<size_t>> batches;
  for (size_t i = 0; i < x.size(); ++i) batches[size_class(x[i].size(0))].push_back(i);
  std::vector<Tensor> made(x.size());
  std::vector<Call> done;
  for (const auto& [size, batch] : batches) {
    std::vector<int64_t> some, counts;
    for (const size_t i : batch) some.push_back(ids[i]), counts.push_back(x[i].size(0));
    const int64_t tokens = *std::max_element(counts.begin(), counts.end());
    const bool ragged = tokens != *std::min_element(counts.begin(), counts.end());
    Call call = prepared(some, tokens, ragged ? Lengths(counts) : std::nullopt, where);
    Tensor hidden = padded(x, batch, tokens);
    for (int64_t i = 0; i < layers(); ++i) {
      bool attended = false;
      hidden = layer(i, hidden, [&](const Tensor& q, const Tensor& k, const Tensor& v) {
        CTX_CHECK_VALUE(!attended, where, "layer must attend once, got more in layer ", i);
        attended = true;
        check_unchanged(call, where);
        check_tensors(i, static_cast<int64_t>(some.size()), q, k, v, where);
        CTX_CHECK_VALUE(
            k.size(2) == tokens, where, "k must have T = ", tokens, " tokens, got ", k.size(2));
        return run(call, q, k, v);
      });
      CTX_CHECK_VALUE(attended, where, "layer must attend once, got not at all in layer ", i);
      CTX_CHECK_VALUE(hidden.defined() && hidden.dim() >= 2 && hidden.size(1) == tokens &&
                          hidden.size(0) == static_cast<int64_t>(some.size()),
                      where,
                      "layer must return [N, T, ...] = [",
                      some.size(),
                      ", ",
                      tokens,
                      ", ...], got ",
                      hidden.defined() ? hidden.sizes() : at::IntArrayRef{});
    }
    for (size_t i = 0; i < batch.size(); ++i)
      made[batch[i]] = hidden[static_cast<int64_t>(i)].narrow(0, 0, counts[i]);
    done.push_back(std::move(call));
  }
  for (const Call& call : done) check_unchanged(call, where);
  for (const Call& call : done) end(call);
  return made;
}

}  // namespace ctx
