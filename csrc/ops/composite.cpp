#include "ops/composite_tiles.h"

namespace ctx::ops {
namespace {

// Rows of x [..., width] that are not finite, bool [...].
at::Tensor bad_rows(const at::Tensor& x) { return at::isfinite(x).all(-1).logical_not(); }

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
  window_begin_ = s.first_token(groups_);
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
  const double origin = centres ? s.centre(0.0) : 0.0;
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

}  // namespace ctx::ops
