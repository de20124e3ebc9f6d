#include "ops/reader.h"

#include <algorithm>

#include "ops/attend.h"
#include "ops/layout.h"

namespace ctx::ops {

using at::Tensor;

Reader::Reader(const Memory& memory,
               const Tensor& q,
               const ScoreOperands& operands,
               bool with_region_weights,
               bool counts)
    : memory_(memory),
      q_(rows(memory.apart(q))),
      out_(at::empty({q.size(0), q.size(1), q.size(2), memory.view.value_dim}, q.options())),
      region_weights_(new_region_weights(q, with_region_weights)) {
  args_.memory = memory.view;
  args_.heads = q.size(1);
  args_.scale = memory.settings.scale;
  args_.logit_softcap = memory.settings.logit_softcap;
  args_.bias = per_head(operands.bias);
  args_.slopes = per_head(operands.slopes);
  if (!operands.relative.empty()) {
    const RelativeQueries queries(q_, operands.relative);
    q_ = rows(queries.content);
    args_.relative = {queries.relative.size(3),
                      keep_rows(queries.relative.to(q.scalar_type())),
                      keep_rows(queries.compressed.to(q.scalar_type()))};
  }
  args_.queries = strided(q_);
  args_.out = strided(out_);
  if (with_region_weights) args_.region_weights = region_weights_.data_ptr();
  args_.call_tokens = q.size(2);
  args_.count_usage = counts && memory.view.usage != nullptr;
}

Strided Reader::keep_rows(const Tensor& x) { return strided(kept_.emplace_back(rows(x))); }

const void* Reader::per_head(const std::optional<Tensor>& values) {
  if (!values) return nullptr;
  kept_.push_back(values->to(arithmetic_type(q_.scalar_type())).expand({q_.size(1)}).contiguous());
  return kept_.back().const_data_ptr();
}

void Reader::attend(const Block& block) {
  if (many(block)) return attend_spans(block);
  args_.block = block;
  memory_.kernels().attend(args_);
}

// Whether a block has so many queries that the kernels of the differentiable path are faster, and they
// know all that it asks for.
bool Reader::many(const Block& block) const {
  constexpr int64_t kManyRows = 16;  // query heads of a kv head times tokens; measured
  const MemoryView& m = memory_.view;
  const int64_t rows = block.tokens * (args_.heads / m.kv_heads);
  const bool threads_share = m.kv_heads > 1 || rows >= 8 * kManyRows;
  const bool single_tokens = m.slot_positions != nullptr && m.clock.token_distance;
  return block.tokens > 1 && rows >= kManyRows && threads_share && memory_.kernels().host_reads &&
         !args_.count_usage &&
         !((args_.slopes != nullptr || args_.relative.dim > 0) && single_tokens);
}

// The rings are the past of all queries, and nothing comes behind it.
void Reader::attend_spans(const Block& block) {
  const MemoryView& m = memory_.view;
  const Schedule& s = m.clock.schedule;
  const int64_t all = m.batch * block.tokens;
  std::vector<int64_t> position(all, -1), sink(all, 0), slot(all), token(all);
  std::vector<int64_t> no_sink(m.batch, 0), first_slot(m.batch), first_token(m.batch);
  std::vector<int64_t> held(m.batch);
  for (int64_t b = 0; b < m.batch; ++b) {
    const int64_t t = block.first(b);
    const int64_t begin = std::max<int64_t>(0, t);
    first_slot[b] = s.groups(begin) - s.compressed;
    first_token[b] = s.window_begin(begin);
    held[b] = block.row(b);
    for (int64_t i = 0; i < block.tokens; ++i) {
      const int64_t place = b * block.tokens + i;
      if (i < block.count(b) && t + i >= 0) position[place] = t + i;
      slot[place] = first_slot[b];
      token[place] = first_token[b];
    }
  }
  const auto from = [&](Strided x) {  // the block's first token on
    const auto bytes = static_cast<int64_t>(q_.element_size());
    x.data = static_cast<char*>(x.data) + block.offset * x.token * bytes;
    return x;
  };
  SpansArgs a;
  a.clock = m.clock, a.rotary = m.rotary, a.storage = m.storage, a.device = m.device;
  a.batch = m.batch, a.heads = args_.heads, a.kv_heads = m.kv_heads, a.tokens = block.tokens;
  a.head_dim = m.head_dim, a.value_dim = m.value_dim;
  a.scale = args_.scale, a.bias = args_.bias, a.slopes = args_.slopes;
  a.logit_softcap = args_.logit_softcap;
  a.position = position.data();
  a.queries = from(args_.queries), a.out = from(args_.out);
  if (args_.relative.dim > 0)
    a.relative = {
        args_.relative.dim, from(args_.relative.queries), from(args_.relative.compressed)};
  const auto set = [&](Span& span,
                       int64_t size,
                       Storage storage,
                       void* keys,
                       void* values,
                       const std::vector<int64_t>& first,
                       const std::vector<int64_t>& numbers) {
    span.size = size;
    span.past = {size, size, storage, keys, values, first.data(), nullptr, held.data()};
    span.first = numbers.data();
  };
  set(a.spans[kSinks], s.sinks, m.storage, m.sink_keys, m.sink_values, no_sink, sink);
  set(a.spans[kCompressed],
      m.compressed_capacity,
      m.compressed_storage,
      m.compressed_keys,
      m.compressed_values,
      first_slot,
      slot);
  a.spans[kCompressed].past.mass = m.slot_mass;
  set(a.spans[kWindow],
      m.window_capacity,
      m.storage,
      m.window_keys,
      m.window_values,
      first_token,
      token);
  const auto wide = q_.options().dtype(arithmetic_type(q_.scalar_type()));
  const Tensor logsumexp = at::empty({a.batch, a.heads, a.tokens}, wide);
  a.logsumexp = logsumexp.data_ptr();
  const bool weighs = args_.region_weights != nullptr;
  const Tensor weights =
      weighs ? at::empty({a.batch, a.heads, a.tokens, kRegions}, wide) : Tensor();
  if (weighs) a.region_weights = weights.data_ptr();
  memory_.kernels().spans_forward(a);
  if (weighs) region_weights_.narrow(2, block.offset, block.tokens).copy_(weights);
}

}  // namespace ctx::ops
