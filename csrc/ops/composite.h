// Attention over three spans out of torch's own operators, for every device; differentiable by hand:
// the backward recomputes the weights from the log-sum-exp instead of keeping them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <array>
#include <optional>

#include "ops/attend.h"
#include "ops/rotary.h"
#include "ops/settings.h"

namespace ctx::ops {

// Rows and tokens of a call that are handled together, and the keys that they can see.
struct Tile {
  Range rows;
  Range tokens;
  std::array<Range, kRegions> keys;
};

// Scores of one tile that are held at once on the CPU: they stay in its cache from the product to
// the last use.
constexpr int64_t kTileScores = 1 << 17;

// What is added to the product of queries and keys. The queries of relative positions, [B, H, T, P],
// are what is multiplied with the encoding of a distance.
struct Scores {
  const std::optional<at::Tensor>& bias;                 // [H]
  const std::optional<at::Tensor>& slopes;               // [H]
  const std::optional<at::Tensor>& relative;             // for the window and the sinks
  const std::optional<at::Tensor>& compressed_relative;  // for compressed slots
};

// One call, in the arithmetic's type.
class Composite {
 public:
  Composite(const at::Tensor& q,
            const at::Tensor& position,
            const Spans& spans,
            const Scores& operands,
            const Clock& clock,
            const Rotary& rotary,
            double scale)
      : type_(arithmetic_type(q.scalar_type())),
        clock_(clock),
        rotary_(rotary),
        scale_(scale),
        batch_(q.size(0)),
        heads_(q.size(1)),
        tokens_(q.size(2)),
        head_dim_(q.size(3)),
        kv_heads_(spans.window_keys.size(1)),
        keys_{spans.sink_keys.to(type_),
              spans.compressed_keys.to(type_),
              spans.window_keys.to(type_)},
        values_{spans.sink_values.to(type_),
                spans.compressed_values.to(type_),
                spans.window_values.to(type_)},
        t_(position),
        first_{spans.first_sink, spans.first_slot, spans.first_token} {
    if (operands.bias) bias_ = operands.bias->to(type_);
    const Schedule& s = clock.schedule;
    groups_ = groups_of(s, t_);
    edge_ = edge_of(s, groups_);
    held_ = groups_.clamp_max(s.compressed);
    clocks_ = {clock.token_distance ? t_ : t_ - edge_ + held_ + s.sinks,
               clock.token_distance ? t_ : t_ - edge_ + groups_,
               t_};
    const at::Tensor wide = q.to(type_);
    const bool relative = operands.relative.has_value();
    if (operands.slopes) slopes_ = operands.slopes->to(type_).view({1, -1, 1, 1});
    for (int region = 0; region < kRegions; ++region) {
      if (size(region) == 0) continue;
      if (relative || slopes_.defined()) measure(region, spans.slot_positions);
      queries_[region] = rotate(wide, clocks_[region], rotary_) * scale_;
      if (relative) {
        const std::optional<at::Tensor>& queries =
            region == kCompressed ? operands.compressed_relative : operands.relative;
        add_relative(region, queries->to(type_));
      }
    }
  }

  // `usage` [B, Hkv, window keys, 1] is added to, where it is defined.
  std::tuple<at::Tensor, at::Tensor, at::Tensor> forward(bool with_mass,
                                                         const at::Tensor& usage = {}) const {
    const at::Tensor mass = new_mass(queries_[kWindow], with_mass).zero_();
    const at::Tensor out =
        at::empty({batch_, heads_, tokens_, values_[kWindow].size(3)}, values_[kWindow].options());
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
      weights = weights.sub_(total.unsqueeze(-1)).exp_();
      cut(logsumexp, tile).copy_(total);
      at::Tensor sum;
      int64_t begin = 0;
      for (int region = 0; region < kRegions; ++region) {
        const int64_t count = tile.keys[region].size();
        if (count == 0) continue;
        const at::Tensor mine = weights.narrow(-1, begin, count);
        if (with_mass) cut(mass, tile).select(-1, region).copy_(mine.sum(-1));
        if (usage.defined() && region == kWindow) {
          const at::Tensor seen = mine.masked_fill(absent(tile), 0.0)
                                      .sum(2)
                                      .unflatten(1, {kv_heads_, heads_ / kv_heads_});
          keyed(usage, tile, region).add_(seen.mean(2).unsqueeze(-1));
        }
        const at::Tensor part = at::matmul(per_kv_head(mine), keyed(values_[region], tile, region));
        sum = sum.defined() ? sum.add_(part) : part;
        begin += count;
      }
      cut(out, tile).copy_(sum.view({tile.rows.size(), heads_, tile.tokens.size(), -1}));
    });
    return {out, logsumexp, mass};
  }

  struct Gradients {
    at::Tensor q;
    std::array<at::Tensor, kRegions> relative;  // of the queries of relative positions
    std::array<at::Tensor, kRegions> keys;
    std::array<at::Tensor, kRegions> values;
    at::Tensor bias;
  };

  Gradients backward(const at::Tensor& grad_out,
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
    const at::Tensor grad = grad_out.to(type_);
    // sum_j p_j dp_j = grad . out; the log-sum-exp's own gradient enters with the other sign.
    const at::Tensor base = (grad * out.to(type_)).sum(-1).sub_(grad_logsumexp.to(type_));
    at::Tensor bias = bias_.defined() ? at::zeros({batch_, heads_}, base.options()) : at::Tensor();
    for_each_tile([&](const Tile& tile) {
      const at::Tensor grad_rows = per_kv_head(cut(grad, tile));
      for (int region = 0; region < kRegions; ++region) {
        if (tile.keys[region].size() == 0) continue;
        const at::Tensor weights =
            scores(region, tile).sub_(cut(logsumexp, tile).unsqueeze(-1)).exp_();
        keyed(g.values[region], tile, region)
            .add_(at::matmul(per_kv_head(weights).transpose(-1, -2), grad_rows));
        at::Tensor d = at::matmul(grad_rows, keyed(values_[region], tile, region).transpose(-1, -2))
                           .view(weights.sizes());
        d = d.sub_(cut(base, tile).unsqueeze(-1)).mul_(weights);  // gradient of the scores
        if (region == kCompressed && bias_.defined())
          row_range(bias, tile).add_(d.sum(at::IntArrayRef{2, 3}));
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
      g.relative[region] = rotate(queries[region].narrow(3, head_dim_, width),
                                  offsets_[region].neg(),
                                  sinusoids(width)) *
                           scale_;
      g.keys[region] = g.keys[region].narrow(3, 0, head_dim_).contiguous();
    }
    g.q = g.q.mul(scale_);
    if (bias.defined()) g.bias = bias_.size(0) == 1 ? bias.sum().reshape({1}) : bias.sum(0);
    return g;
  }

 private:
  int64_t size(int region) const { return keys_[region].size(2); }

  // The distance of a key from a query is offset - place, whatever stream the query is of: places
  // are counted from the region's first key (but for slots that are tokens), which keeps them small.
  void measure(int region, const at::Tensor& slot_positions) {
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
  void add_relative(int region, const at::Tensor& queries) {
    const int64_t width = queries.size(3);
    const at::Tensor& places = places_[region];  // [1, 1, keys], or [B, Hkv, keys]
    const at::Tensor unit = at::cat(
        {at::zeros({width / 2}, queries.options()), at::ones({width / 2}, queries.options())});
    const at::Tensor rows =
        unit.expand({places.size(0) * places.size(1), 1, places.size(2), width});
    const at::Tensor encoded = rotate(rows, places.flatten(0, 1), sinusoids(width))
                                   .view({places.size(0), places.size(1), places.size(2), width})
                                   .expand({batch_, kv_heads_, size(region), width});
    keys_[region] = at::cat({keys_[region], encoded}, 3);
    queries_[region] = at::cat(
        {queries_[region], rotate(queries, offsets_[region], sinusoids(width)) * scale_}, 3);
  }

  static Rotary sinusoids(int64_t width) { return {width, 10000.0, false}; }

  // Queries before their streams: [rows, 1, tokens, 1].
  at::Tensor absent(const Tile& tile) const {
    return row_range(t_, tile)
        .narrow(1, tile.tokens.begin, tile.tokens.size())
        .lt(0)
        .unsqueeze(1)
        .unsqueeze(-1);
  }

  // [rows, 1 or H, tokens, keys]
  at::Tensor distances(int region, const Tile& tile) const {
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

  // Query heads of a kv head lie behind one another, so that each region costs one product per kv
  // head: [B, H, T, width] -> [B, Hkv, R T, width], R = H / Hkv.
  at::Tensor per_kv_head(const at::Tensor& x) const {
    return x.reshape({x.size(0), kv_heads_, heads_ / kv_heads_ * x.size(2), x.size(3)});
  }

  static at::Tensor row_range(const at::Tensor& x, const Tile& tile) {
    return x.narrow(0, tile.rows.begin, tile.rows.size());
  }

  // x [B, H, T, ...]: the tile's rows and tokens.
  static at::Tensor cut(const at::Tensor& x, const Tile& tile) {
    return row_range(x, tile).narrow(2, tile.tokens.begin, tile.tokens.size());
  }

  // x [B, Hkv, keys, width]: the tile's rows and keys.
  static at::Tensor keyed(const at::Tensor& x, const Tile& tile, int region) {
    return row_range(x, tile).narrow(2, tile.keys[region].begin, tile.keys[region].size());
  }

  // Scores of one region, minus infinity where the law shows nothing: [rows, H, tokens, keys].
  at::Tensor scores(int region, const Tile& tile) const {
    const at::Tensor product = at::matmul(per_kv_head(cut(queries_[region], tile)),
                                          keyed(keys_[region], tile, region).transpose(-1, -2));
    at::Tensor s =
        product.view({tile.rows.size(), heads_, tile.tokens.size(), tile.keys[region].size()});
    if (region == kCompressed && bias_.defined()) s = s.add_(bias_.view({1, -1, 1, 1}));
    if (slopes_.defined()) s = s.sub_(distances(region, tile).to(type_) * slopes_);
    return s.masked_fill_(hidden(region, tile), -std::numeric_limits<double>::infinity());
  }

  // True where a query of the tile does not see a key: [rows, 1, tokens, keys].
  at::Tensor hidden(int region, const Tile& tile) const {
    const auto tokens = [&](const at::Tensor& x) {
      return row_range(x, tile)
          .narrow(1, tile.tokens.begin, tile.tokens.size())
          .unsqueeze(1)
          .unsqueeze(-1);
    };
    const at::Tensor index =
        at::arange(tile.keys[region].begin, tile.keys[region].end, t_.options());
    const at::Tensor number = index + tokens(first_[region]);
    switch (region) {
      case kSinks:
        return number.lt(0).logical_or_(number.gt(tokens(t_).clamp_max(clock_.schedule.sinks - 1)));
      case kCompressed:
        return number.ge(tokens(groups_)).logical_or_(number.lt(tokens(groups_ - held_)));
      default:
        return number.gt(tokens(t_)).logical_or_(number.lt(tokens(edge_)));
    }
  }

  // On the CPU a tile is one row and as many tokens as keep its scores in cache, with only the keys
  // that they can see; rows run in parallel. Elsewhere positions are not known to the host, and one
  // tile is everything.
  template <typename F>
  void for_each_tile(const F& run) const {
    if (batch_ == 0 || tokens_ == 0) return;
    if (!t_.is_cpu()) {
      Tile all{{0, batch_}, {0, tokens_}, {}};
      for (int region = 0; region < kRegions; ++region) all.keys[region] = {0, size(region)};
      return run(all);
    }
    const auto walk = [&](int64_t begin, int64_t end) {
      at::AutoDispatchBelowADInplaceOrView below;  // worker threads do not inherit it
      for (int64_t b = begin; b < end; ++b) walk_row(b, run);
    };
    batch_ == 1 ? walk(0, 1) : at::parallel_for(0, batch_, 1, walk);
  }

  template <typename F>
  void walk_row(int64_t b, const F& run) const {
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

  at::ScalarType type_;
  Clock clock_;
  Rotary rotary_;
  double scale_;
  int64_t batch_;
  int64_t heads_;
  int64_t tokens_;
  int64_t head_dim_;
  int64_t kv_heads_;
  std::array<at::Tensor, kRegions> keys_;
  std::array<at::Tensor, kRegions> values_;
  at::Tensor bias_;
  at::Tensor slopes_;                       // [1, H, 1, 1]
  at::Tensor t_;                            // [B, T], and so are the others
  std::array<at::Tensor, kRegions> first_;  // number of a region's first key in the query's stream
  at::Tensor groups_;
  at::Tensor edge_;
  at::Tensor held_;
  std::array<at::Tensor, kRegions> clocks_;
  std::array<at::Tensor, kRegions>
      queries_;  // rotated to the region's clock and scaled; undefined for an empty region
  std::array<at::Tensor, kRegions> places_;   // double [1, 1, keys], or [B, Hkv, keys]
  std::array<at::Tensor, kRegions> offsets_;  // double [B, T]
};

}  // namespace ctx::ops
