#include "ops/composite.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

#include "ops/derivatives.h"
#include "ops/finite.h"
#include "ops/rotary.h"
#include "ops/settings.h"

namespace ctx::ops {
namespace {

Rotary sinusoids(int64_t width) { return {width, inverse_frequencies(width, 10000.0)}; }

// Rows of x [..., width] that are not finite, bool [...].
at::Tensor bad_rows(const at::Tensor& x) { return at::isfinite(x).all(-1).logical_not(); }

bool surely_none(const at::Tensor& mask) { return is_readable(mask) && !mask.any().item<bool>(); }

// x with another number in place of minus infinity.
at::Tensor infinite_to(double number, const at::Tensor& x) {
  return x.masked_fill(x.detach().eq(-std::numeric_limits<double>::infinity()), number);
}

at::Tensor nan_where(const at::Tensor& mask, at::ScalarType type) {
  return at::zeros(mask.sizes(), mask.options().dtype(type))
      .masked_fill(mask, std::numeric_limits<double>::quiet_NaN());
}

}  // namespace

Composite::Composite(const at::Tensor& q,
                     const EncodedQueries& encoded,
                     const CallSpans& spans,
                     const AttendCall& call,
                     bool recorded)
    : type_(arithmetic_type(q.scalar_type())),
      recorded_(recorded),
      batch_(q.size(0)),
      heads_(q.size(1)),
      tokens_(q.size(2)),
      head_dim_(q.size(3)),
      kv_heads_(call.k.size(1)),
      mass_(spans.mass()),
      t_(spans.plan().token(kPlanPosition)) {
  const Settings settings = call.settings();
  clock_ = settings.clock, rotary_ = settings.rotary;
  scale_ = settings.scale, softcap_ = settings.logit_softcap;
  if (call.bias) bias_ = call.bias->to(type_);
  if (call.slopes) slopes_ = call.slopes->to(type_).view({1, -1, 1, 1});
  const Schedule& s = clock_.schedule;
  groups_ = groups_of(s, t_);
  window_begin_ = groups_.mul(s.ratio).add(s.sinks);
  held_ = groups_.clamp_max(s.compressed);
  clocks_ = {clock_.token_distance ? t_ : t_ - window_begin_ + held_ + s.sinks,
             clock_.token_distance ? t_ : t_ - window_begin_ + groups_,
             t_};
  const at::Tensor wide = q.to(type_);
  const at::Tensor positions = spans.positions();
  for (int i = 0; i < kRegions; ++i) {
    const auto region = static_cast<Region>(i);
    keys_[i] = spans.keys(region), values_[i] = spans.values(region);
    first_[i] = spans.first(region);
    if (size(i) == 0) continue;
    const at::Tensor& queries = region == kCompressed ? encoded.compressed : encoded.relative;
    if (queries.defined() || slopes_.defined()) measure(i, positions);
    queries_[i] = rotate(wide, clocks_[i], rotary_) * scale_;
    if (queries.defined()) add_relative(i, queries.to(type_));
  }
  set_apart();
}

// Zeros in place of rows that are not finite.
void Composite::set_apart() {
  bool finite = true;
  for (int region = 0; region < kRegions; ++region) {
    if (size(region) == 0) continue;
    finite = finite && surely_finite(queries_[region]) && surely_finite(keys_[region]) &&
             surely_finite(values_[region]);
  }
  if (finite) return;
  bad_queries_ = at::zeros({batch_, heads_, tokens_}, t_.options().dtype(at::kBool));
  for (int region = 0; region < kRegions; ++region) {
    if (size(region) == 0) continue;
    const at::Tensor bad = bad_rows(queries_[region].detach());
    bad_queries_ = bad_queries_.logical_or(bad);
    queries_[region] = queries_[region].masked_fill(bad.unsqueeze(-1), 0.0);
    bad_keys_[region] =
        bad_rows(keys_[region].detach()).logical_or(bad_rows(values_[region].detach()));
    const at::Tensor wide = bad_keys_[region].unsqueeze(-1);
    keys_[region] = keys_[region].masked_fill(wide, 0.0);
    values_[region] = values_[region].masked_fill(wide, 0.0);
  }
}

// NaN for the queries that are not finite or see something that is not, else zero: [rows, H, tokens,
// 1].
at::Tensor Composite::poison(const Tile& tile) const {
  at::Tensor bad = cut(bad_queries_, tile);
  for (int region = 0; region < kRegions; ++region) {
    const Range& keys = tile.keys[region];
    if (keys.size() == 0) continue;
    const at::Tensor mine = row_range(bad_keys_[region], tile).narrow(2, keys.begin, keys.size());
    const at::Tensor seen = hidden(region, tile).logical_not().logical_and(mine.unsqueeze(2));
    bad = bad.logical_or(seen.any(-1).repeat_interleave(heads_ / kv_heads_, 1));
  }
  return nan_where(bad.unsqueeze(-1), type_);
}

Attended Composite::forward(bool with_region_weights) const {
  const auto options = values_[kWindow].options();
  const at::Tensor region_weights = with_region_weights
                                        ? at::zeros({batch_, heads_, tokens_, kRegions}, options)
                                        : at::zeros({0}, options);
  const at::Tensor out = at::empty({batch_, heads_, tokens_, values_[kWindow].size(3)}, options);
  const at::Tensor logsumexp = at::empty({batch_, heads_, tokens_}, out.options());
  for_each_tile([&](const Tile& tile) {
    std::vector<at::Tensor> parts;
    for (int region = 0; region < kRegions; ++region) {
      if (tile.keys[region].size() > 0) parts.push_back(scores(region, tile));
    }
    if (parts.empty()) {  // a row of padding sees nothing
      cut(out, tile).zero_();
      cut(logsumexp, tile).fill_(-std::numeric_limits<double>::infinity());
      return;
    }
    at::Tensor weights = parts.size() == 1 ? parts[0] : at::cat(parts, -1);
    const at::Tensor total = weights.logsumexp(-1);
    // A query that sees nothing has the log-sum-exp of minus infinity, and no weights.
    const at::Tensor subtract = infinite_to(0.0, total).unsqueeze(-1);
    weights = recorded_ ? (weights - subtract).exp() : weights.sub_(subtract).exp_();
    const at::Tensor poison = bad_queries_.defined() ? this->poison(tile) : at::Tensor();
    cut(logsumexp, tile).copy_(poison.defined() ? total + poison.squeeze(-1) : total);
    at::Tensor sum;
    int64_t begin = 0;
    for (int region = 0; region < kRegions; ++region) {
      const int64_t count = tile.keys[region].size();
      if (count == 0) continue;
      const at::Tensor mine = weights.narrow(-1, begin, count);
      if (with_region_weights)
        cut(region_weights, tile).select(-1, region).copy_(mine.detach().sum(-1));
      const at::Tensor part = at::matmul(per_kv_head(mine), keyed(values_[region], tile, region));
      sum = sum.defined() ? sum.add_(part) : part;
      begin += count;
    }
    sum = sum.view({tile.rows.size(), heads_, tile.tokens.size(), -1});
    cut(out, tile).copy_(poison.defined() ? sum + poison : sum);
  });
  return {out, logsumexp, region_weights};
}

Composite::Gradients Composite::backward(const at::Tensor& grad_out,
                                         const at::Tensor& grad_logsumexp,
                                         const at::Tensor& out,
                                         const at::Tensor& logsumexp) const {
  Gradients g;
  std::array<at::Tensor, kRegions> queries;
  for (int region = 0; region < kRegions; ++region) {
    g.keys[region] = at::zeros_like(keys_[region]);
    g.values[region] = at::zeros_like(values_[region]);
    if (size(region) > 0) queries[region] = at::zeros_like(queries_[region]);
  }
  at::Tensor grad = grad_out.to(type_);
  // sum_j p_j dp_j = grad . out; the log-sum-exp's own gradient enters with the other sign.
  at::Tensor base = (grad * out.to(type_)).sum(-1).sub_(grad_logsumexp.to(type_));
  const double infinity = std::numeric_limits<double>::infinity();
  at::Tensor total = infinite_to(infinity, logsumexp);  // exp(score - infinity) = 0: no weights
  // Queries with numbers that are not finite: those without a gradient take part in nothing, what the
  // others see gets NaN.
  const at::Tensor bad = base.isfinite().logical_and(logsumexp.lt(infinity)).logical_not();
  at::Tensor dropped, poison;
  if (!surely_none(bad)) {
    const at::Tensor none = grad_out.eq(0).all(-1).logical_and(grad_logsumexp.eq(0));
    dropped = bad.logical_and(none);
    poison = nan_where(bad.logical_and(none.logical_not()), type_);
    grad = grad.masked_fill(bad.unsqueeze(-1), 0.0);
    base = base.masked_fill(bad, 0.0), total = total.masked_fill(bad, 0.0);
  }
  at::Tensor bias = bias_.defined() ? at::zeros({batch_, heads_}, base.options()) : at::Tensor();
  if (mass_.defined()) g.mass = at::zeros_like(mass_);
  for_each_tile([&](const Tile& tile) {
    const at::Tensor grad_rows = per_kv_head(cut(grad, tile));
    const auto rows = [&](const at::Tensor& x) { return cut(x, tile).unsqueeze(-1); };
    for (int region = 0; region < kRegions; ++region) {
      if (tile.keys[region].size() == 0) continue;
      at::Tensor mask = hidden(region, tile);
      if (dropped.defined()) mask = mask.logical_or(rows(dropped));
      at::Tensor weights = scores(region, tile).sub_(rows(total)).exp_();
      if (poison.defined()) weights = weights + rows(poison);
      weights = weights.masked_fill(mask, 0.0);
      keyed(g.values[region], tile, region)
          .add_(at::matmul(per_kv_head(weights).transpose(-1, -2), grad_rows));
      at::Tensor d = at::matmul(grad_rows, keyed(values_[region], tile, region).transpose(-1, -2))
                         .view(weights.sizes());
      d = d.sub_(rows(base)).mul_(weights).masked_fill_(mask, 0.0);  // gradient of the scores
      if (region == kCompressed && bias_.defined())
        row_range(bias, tile).add_(d.sum(at::IntArrayRef{2, 3}));
      if (region == kCompressed && mass_.defined()) {
        const at::Tensor heads = d.sum(2).unflatten(1, {kv_heads_, heads_ / kv_heads_}).sum(2);
        row_range(g.mass, tile)
            .narrow(2, tile.keys[region].begin, tile.keys[region].size())
            .add_(heads);
      }
      if (softcap_ > 0) {  // d (c tanh(x / c)) = 1 - tanh(x / c)^2, where the pair is seen
        const at::Tensor part = products(region, tile) / softcap_;
        d = (d * (1 - part * part)).masked_fill(mask, 0.0);
      }
      const at::Tensor d_rows = per_kv_head(d);
      keyed(g.keys[region], tile, region)
          .add_(at::matmul(d_rows.transpose(-1, -2), per_kv_head(cut(queries_[region], tile))));
      cut(queries[region], tile)
          .copy_(at::matmul(d_rows, keyed(keys_[region], tile, region))
                     .view(cut(queries[region], tile).sizes()));
    }
  });
  for (int region = 0; region < kRegions; ++region) {
    if (!queries[region].defined()) continue;
    const at::Tensor own = queries[region].narrow(3, 0, head_dim_);
    const at::Tensor back = rotate(own, clocks_[region].neg(), rotary_);
    g.q = g.q.defined() ? g.q.add_(back) : back;
    const int64_t width = queries[region].size(3) - head_dim_;
    if (width == 0) continue;
    g.relative[region] =
        rotate(
            queries[region].narrow(3, head_dim_, width), offsets_[region].neg(), sinusoids(width)) *
        scale_;
    g.keys[region] = g.keys[region].narrow(3, 0, head_dim_).contiguous();
  }
  g.q = g.q.defined() ? g.q.mul(scale_)
                      : at::zeros({batch_, heads_, tokens_, head_dim_}, base.options());
  if (bias.defined()) g.bias = bias_.size(0) == 1 ? bias.sum().reshape({1}) : bias.sum(0);
  return g;
}

// The distance of a key from a query is offset - place, whatever stream the query is of: places
// are counted from the region's first key (but for slots that are tokens), which keeps them small.
void Composite::measure(int region, const at::Tensor& slot_positions) {
  const Schedule& s = clock_.schedule;
  const at::Tensor clock = clocks_[region].to(at::kDouble);
  const bool slots = region == kCompressed;
  if (slots && clock_.token_distance && slot_positions.defined()) {
    places_[region] = slot_positions.to(at::kDouble);
    offsets_[region] = clock;
    return;
  }
  const bool centres = slots && clock_.token_distance;
  const double step = centres ? static_cast<double>(s.ratio) : 1.0;
  const double origin = centres ? s.sinks + (s.ratio - 1) / 2.0 : 0.0;
  places_[region] = at::arange(size(region), clock.options()).mul(step).view({1, 1, -1});
  offsets_[region] = clock - first_[region].to(at::kDouble).mul(step).add(origin);
}

// Transformer-XL's encoding of a distance is that of its two ends, multiplied out:
// z . [sin(d w); cos(d w)] = rotate(z, offset) . rotate([0; 1], place) for d = offset - place, so
// that it is the product of longer queries and longer keys.
void Composite::add_relative(int region, const at::Tensor& queries) {
  const int64_t width = queries.size(3);
  const at::Tensor& places = places_[region];  // [1, 1, keys], or [B, Hkv, keys]
  const at::Tensor unit = at::cat(
      {at::zeros({width / 2}, queries.options()), at::ones({width / 2}, queries.options())});
  const at::Tensor rows = unit.expand({places.size(0) * places.size(1), 1, places.size(2), width});
  const at::Tensor encoded = rotate(rows, places.flatten(0, 1), sinusoids(width))
                                 .view({places.size(0), places.size(1), places.size(2), width})
                                 .expand({batch_, kv_heads_, size(region), width});
  keys_[region] = at::cat({keys_[region], encoded}, 3);
  queries_[region] =
      at::cat({queries_[region], rotate(queries, offsets_[region], sinusoids(width)) * scale_}, 3);
}

// [rows, 1 or H, tokens, keys]
at::Tensor Composite::distances(int region, const Tile& tile) const {
  const Range& keys = tile.keys[region];
  const at::Tensor offset = row_range(offsets_[region], tile)
                                .narrow(1, tile.tokens.begin, tile.tokens.size())
                                .unsqueeze(1)
                                .unsqueeze(-1);
  at::Tensor place = places_[region].narrow(2, keys.begin, keys.size());
  if (place.size(1) > 1) {
    place = row_range(place, tile).repeat_interleave(heads_ / kv_heads_, 1);
  } else if (place.size(0) > 1) {
    place = row_range(place, tile);
  }
  return offset - place.unsqueeze(2);
}

// Products of queries and keys, capped: [rows, H, tokens, keys].
at::Tensor Composite::products(int region, const Tile& tile) const {
  const at::Tensor product = at::matmul(per_kv_head(cut(queries_[region], tile)),
                                        keyed(keys_[region], tile, region).transpose(-1, -2));
  const at::Tensor s =
      product.view({tile.rows.size(), heads_, tile.tokens.size(), tile.keys[region].size()});
  return softcap_ > 0 ? at::tanh(s / softcap_) * softcap_ : s;
}

// Scores of one region, minus infinity where the law shows nothing: [rows, H, tokens, keys].
at::Tensor Composite::scores(int region, const Tile& tile) const {
  at::Tensor s = products(region, tile);
  if (region == kCompressed && bias_.defined()) s = s + bias_.view({1, -1, 1, 1});
  if (region == kCompressed && mass_.defined()) {
    const Range& keys = tile.keys[region];
    const at::Tensor mine = row_range(mass_, tile).narrow(2, keys.begin, keys.size());
    s = s + mine.repeat_interleave(heads_ / kv_heads_, 1).unsqueeze(2);
  }
  if (slopes_.defined()) s = s - distances(region, tile).to(type_) * slopes_;
  return s.masked_fill(hidden(region, tile), -std::numeric_limits<double>::infinity());
}

// True where a query of the tile does not see a key: [rows, 1, tokens, keys].
at::Tensor Composite::hidden(int region, const Tile& tile) const {
  const auto tokens = [&](const at::Tensor& x) {
    return row_range(x, tile)
        .narrow(1, tile.tokens.begin, tile.tokens.size())
        .unsqueeze(1)
        .unsqueeze(-1);
  };
  const at::Tensor index = at::arange(tile.keys[region].begin, tile.keys[region].end, t_.options());
  const at::Tensor number = index + tokens(first_[region]);
  switch (region) {
    case kSinks:
      return number.lt(0).logical_or_(number.gt(tokens(t_).clamp_max(clock_.schedule.sinks - 1)));
    case kCompressed:
      return number.ge(tokens(groups_)).logical_or_(number.lt(tokens(groups_ - held_)));
    default:
      return number.gt(tokens(t_)).logical_or_(number.lt(tokens(window_begin_)));
  }
}

// On the CPU a tile is one row and as many tokens as keep its scores in cache, with only the keys
// that they can see; rows run in parallel. Elsewhere positions are not known to the host, and one
// tile is everything.
template <typename F>
void Composite::for_each_tile(const F& run) const {
  if (batch_ == 0 || tokens_ == 0) return;
  if (!t_.is_cpu() || is_transformed()) {
    Tile all{{0, batch_}, {0, tokens_}, {}};
    for (int region = 0; region < kRegions; ++region) all.keys[region] = {0, size(region)};
    return run(all);
  }
  if (recorded_) {  // by this thread, which has the tape
    for (int64_t b = 0; b < batch_; ++b) walk_row(b, run);
    return;
  }
  // In a parallel region also where there is one row: torch's products then run on one thread each,
  // and their bits do not depend on how many there are.
  at::parallel_for(0, std::max<int64_t>(batch_, 2), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below;  // worker threads do not inherit it
    for (int64_t b = begin; b < std::min(end, batch_); ++b) walk_row(b, run);
  });
}

template <typename F>
void Composite::walk_row(int64_t b, const F& run) const {
  const Schedule& s = clock_.schedule;
  const int64_t most = std::min(s.max_slots(), size(kSinks) + size(kCompressed) + size(kWindow));
  const int64_t step =
      std::clamp<int64_t>(kTileScores / (heads_ * std::max<int64_t>(most, 1)), 16, 256);
  const auto value = [b](const at::Tensor& x, int64_t i) {
    return x.const_data_ptr<int64_t>()[b * x.stride(0) + i * x.stride(1)];
  };
  for (int64_t begin = 0; begin < tokens_; begin += step) {
    Tile tile{{b, b + 1}, {begin, std::min(begin + step, tokens_)}, {}};
    for (int64_t i = begin; i < tile.tokens.end; ++i) {
      const int64_t t = value(t_, i);
      const Ranges seen = visible(s, t);
      for (int region = 0; region < kRegions; ++region) {
        if (seen[region].size() <= 0) continue;
        const int64_t first = value(first_[region], i);
        Range& keys = tile.keys[region];
        const bool none = keys.size() == 0;
        keys.begin =
            none ? seen[region].begin - first : std::min(keys.begin, seen[region].begin - first);
        keys.end = none ? seen[region].end - first : std::max(keys.end, seen[region].end - first);
      }
    }
    for (int region = 0; region < kRegions; ++region) {  // tokens before the stream see too much
      tile.keys[region].begin = std::clamp<int64_t>(tile.keys[region].begin, 0, size(region));
      tile.keys[region].end =
          std::clamp<int64_t>(tile.keys[region].end, tile.keys[region].begin, size(region));
    }
    run(tile);
  }
}

}  // namespace ctx::ops
