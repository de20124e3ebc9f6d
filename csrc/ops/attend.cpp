// ctx::attend: attention over three spans as a functional operator, and its backward, which
// recomputes the weights from the log-sum-exp instead of keeping them. On the CPU both are kernels
// of our own (spans.h); elsewhere, and for what those leave out, composites of torch's operators.
#include "ops/attend.h"

#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>

#include "core/check.h"
#include "ops/rotary.h"
#include "ops/settings.h"
#include "ops/spans.h"

namespace ctx::ops {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<at::Tensor>;

enum Region : int { kSinks = 0, kCompressed = 1, kWindow = 2, kRegions = 3 };

// Rows and tokens of a call that are handled together, and the keys that they can see.
struct Range {
  int64_t begin = 0;
  int64_t end = 0;
  int64_t size() const { return end - begin; }
};
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
  const OptionalTensor& bias;                 // [H]
  const OptionalTensor& slopes;               // [H]
  const OptionalTensor& relative;             // for the window and the sinks
  const OptionalTensor& compressed_relative;  // for compressed slots
};

// One call, in the arithmetic's type.
class Call {
 public:
  Call(const Tensor& q,
       const Tensor& position,
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
    const Tensor wide = q.to(type_);
    const bool relative = operands.relative.has_value();
    if (operands.slopes) slopes_ = operands.slopes->to(type_).view({1, -1, 1, 1});
    for (int region = 0; region < kRegions; ++region) {
      if (size(region) == 0) continue;
      if (relative || slopes_.defined()) measure(region, spans.slot_positions);
      queries_[region] = rotate(wide, clocks_[region], rotary_) * scale_;
      if (relative) {
        const OptionalTensor& queries =
            region == kCompressed ? operands.compressed_relative : operands.relative;
        add_relative(region, queries->to(type_));
      }
    }
  }

  // `usage` [B, Hkv, window keys, 1] is added to, where it is defined.
  std::tuple<Tensor, Tensor, Tensor> forward(bool with_mass, const Tensor& usage = {}) const {
    const Tensor mass = new_mass(queries_[kWindow], with_mass).zero_();
    const Tensor out =
        at::empty({batch_, heads_, tokens_, values_[kWindow].size(3)}, values_[kWindow].options());
    const Tensor logsumexp = at::empty({batch_, heads_, tokens_}, out.options());
    for_each_tile([&](const Tile& tile) {
      std::vector<Tensor> parts;
      for (int region = 0; region < kRegions; ++region) {
        if (tile.keys[region].size() > 0) parts.push_back(scores(region, tile));
      }
      if (parts.empty()) {  // a row of padding sees nothing
        cut(out, tile).zero_();
        cut(logsumexp, tile).fill_(-std::numeric_limits<double>::infinity());
        return;
      }
      Tensor weights = parts.size() == 1 ? parts[0] : at::cat(parts, -1);
      const Tensor total = weights.logsumexp(-1);
      weights = weights.sub_(total.unsqueeze(-1)).exp_();
      cut(logsumexp, tile).copy_(total);
      Tensor sum;
      int64_t begin = 0;
      for (int region = 0; region < kRegions; ++region) {
        const int64_t count = tile.keys[region].size();
        if (count == 0) continue;
        const Tensor mine = weights.narrow(-1, begin, count);
        if (with_mass) cut(mass, tile).select(-1, region).copy_(mine.sum(-1));
        if (usage.defined() && region == kWindow) {
          const Tensor seen = mine.masked_fill(absent(tile), 0.0)
                                  .sum(2)
                                  .unflatten(1, {kv_heads_, heads_ / kv_heads_});
          keyed(usage, tile, region).add_(seen.mean(2).unsqueeze(-1));
        }
        const Tensor part = at::matmul(per_kv_head(mine), keyed(values_[region], tile, region));
        sum = sum.defined() ? sum.add_(part) : part;
        begin += count;
      }
      cut(out, tile).copy_(sum.view({tile.rows.size(), heads_, tile.tokens.size(), -1}));
    });
    return {out, logsumexp, mass};
  }

  struct Gradients {
    Tensor q;
    std::array<Tensor, kRegions> relative;  // of the queries of relative positions
    std::array<Tensor, kRegions> keys;
    std::array<Tensor, kRegions> values;
    Tensor bias;
  };

  Gradients backward(const Tensor& grad_out,
                     const Tensor& grad_logsumexp,
                     const Tensor& out,
                     const Tensor& logsumexp) const {
    Gradients g;
    std::array<Tensor, kRegions> queries;
    for (int region = 0; region < kRegions; ++region) {
      g.keys[region] = at::zeros_like(keys_[region]);
      g.values[region] = at::zeros_like(values_[region]);
      if (size(region) > 0) queries[region] = at::zeros_like(queries_[region]);
    }
    const Tensor grad = grad_out.to(type_);
    // sum_j p_j dp_j = grad . out; the log-sum-exp's own gradient enters with the other sign.
    const Tensor base = (grad * out.to(type_)).sum(-1).sub_(grad_logsumexp.to(type_));
    Tensor bias = bias_.defined() ? at::zeros({batch_, heads_}, base.options()) : Tensor();
    for_each_tile([&](const Tile& tile) {
      const Tensor grad_rows = per_kv_head(cut(grad, tile));
      for (int region = 0; region < kRegions; ++region) {
        if (tile.keys[region].size() == 0) continue;
        const Tensor weights = scores(region, tile).sub_(cut(logsumexp, tile).unsqueeze(-1)).exp_();
        keyed(g.values[region], tile, region)
            .add_(at::matmul(per_kv_head(weights).transpose(-1, -2), grad_rows));
        Tensor d = at::matmul(grad_rows, keyed(values_[region], tile, region).transpose(-1, -2))
                       .view(weights.sizes());
        d = d.sub_(cut(base, tile).unsqueeze(-1)).mul_(weights);  // gradient of the scores
        if (region == kCompressed && bias_.defined())
          row_range(bias, tile).add_(d.sum(at::IntArrayRef{2, 3}));
        const Tensor d_rows = per_kv_head(d);
        keyed(g.keys[region], tile, region)
            .add_(at::matmul(d_rows.transpose(-1, -2), per_kv_head(cut(queries_[region], tile))));
        cut(queries[region], tile)
            .copy_(at::matmul(d_rows, keyed(keys_[region], tile, region))
                       .view(cut(queries[region], tile).sizes()));
      }
    });
    for (int region = 0; region < kRegions; ++region) {
      if (!queries[region].defined()) continue;
      const Tensor own = queries[region].narrow(3, 0, head_dim_);
      const Tensor back = rotate(own, clocks_[region].neg(), rotary_);
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
  void measure(int region, const Tensor& slot_positions) {
    const Schedule& s = clock_.schedule;
    const Tensor clock = clocks_[region].to(at::kDouble);
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
  void add_relative(int region, const Tensor& queries) {
    const int64_t width = queries.size(3);
    const Tensor& places = places_[region];  // [1, 1, keys], or [B, Hkv, keys]
    const Tensor unit = at::cat(
        {at::zeros({width / 2}, queries.options()), at::ones({width / 2}, queries.options())});
    const Tensor rows = unit.expand({places.size(0) * places.size(1), 1, places.size(2), width});
    const Tensor encoded = rotate(rows, places.flatten(0, 1), sinusoids(width))
                               .view({places.size(0), places.size(1), places.size(2), width})
                               .expand({batch_, kv_heads_, size(region), width});
    keys_[region] = at::cat({keys_[region], encoded}, 3);
    queries_[region] = at::cat(
        {queries_[region], rotate(queries, offsets_[region], sinusoids(width)) * scale_}, 3);
  }

  static Rotary sinusoids(int64_t width) { return {width, 10000.0, false}; }

  // Queries before their streams: [rows, 1, tokens, 1].
  Tensor absent(const Tile& tile) const {
    return row_range(t_, tile)
        .narrow(1, tile.tokens.begin, tile.tokens.size())
        .lt(0)
        .unsqueeze(1)
        .unsqueeze(-1);
  }

  // [rows, 1 or H, tokens, keys]
  Tensor distances(int region, const Tile& tile) const {
    const Range& keys = tile.keys[region];
    const Tensor offset = row_range(offsets_[region], tile)
                              .narrow(1, tile.tokens.begin, tile.tokens.size())
                              .unsqueeze(1)
                              .unsqueeze(-1);
    Tensor place = places_[region].narrow(2, keys.begin, keys.size());
    if (place.size(1) > 1) {
      place = row_range(place, tile).repeat_interleave(heads_ / kv_heads_, 1);
    } else if (place.size(0) > 1) {
      place = row_range(place, tile);
    }
    return offset - place.unsqueeze(2);
  }

  // Query heads of a kv head lie behind one another, so that each region costs one product per kv
  // head: [B, H, T, width] -> [B, Hkv, R T, width], R = H / Hkv.
  Tensor per_kv_head(const Tensor& x) const {
    return x.reshape({x.size(0), kv_heads_, heads_ / kv_heads_ * x.size(2), x.size(3)});
  }

  static Tensor row_range(const Tensor& x, const Tile& tile) {
    return x.narrow(0, tile.rows.begin, tile.rows.size());
  }

  // x [B, H, T, ...]: the tile's rows and tokens.
  static Tensor cut(const Tensor& x, const Tile& tile) {
    return row_range(x, tile).narrow(2, tile.tokens.begin, tile.tokens.size());
  }

  // x [B, Hkv, keys, width]: the tile's rows and keys.
  static Tensor keyed(const Tensor& x, const Tile& tile, int region) {
    return row_range(x, tile).narrow(2, tile.keys[region].begin, tile.keys[region].size());
  }

  // Scores of one region, minus infinity where the law shows nothing: [rows, H, tokens, keys].
  Tensor scores(int region, const Tile& tile) const {
    const Tensor product = at::matmul(per_kv_head(cut(queries_[region], tile)),
                                      keyed(keys_[region], tile, region).transpose(-1, -2));
    Tensor s =
        product.view({tile.rows.size(), heads_, tile.tokens.size(), tile.keys[region].size()});
    if (region == kCompressed && bias_.defined()) s = s.add_(bias_.view({1, -1, 1, 1}));
    if (slopes_.defined()) s = s.sub_(distances(region, tile).to(type_) * slopes_);
    return s.masked_fill_(hidden(region, tile), -std::numeric_limits<double>::infinity());
  }

  // True where a query of the tile does not see a key: [rows, 1, tokens, keys].
  Tensor hidden(int region, const Tile& tile) const {
    const auto tokens = [&](const Tensor& x) {
      return row_range(x, tile)
          .narrow(1, tile.tokens.begin, tile.tokens.size())
          .unsqueeze(1)
          .unsqueeze(-1);
    };
    const Tensor index = at::arange(tile.keys[region].begin, tile.keys[region].end, t_.options());
    const Tensor number = index + tokens(first_[region]);
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
    const auto value = [b](const Tensor& x, int64_t i) {
      return x.const_data_ptr<int64_t>()[b * x.stride(0) + i * x.stride(1)];
    };
    for (int64_t begin = 0; begin < tokens_; begin += step) {
      Tile tile{{b, b + 1}, {begin, std::min(begin + step, tokens_)}, {}};
      for (int64_t i = begin; i < tile.tokens.end; ++i) {
        const int64_t t = value(t_, i);
        const Range visible[kRegions] = {
            {0, s.visible_sinks(t)}, {s.groups(t) - s.slots(t), s.groups(t)}, {s.edge(t), t + 1}};
        for (int region = 0; region < kRegions; ++region) {
          if (visible[region].size() <= 0) continue;
          const int64_t first = value(first_[region], i);
          Range& keys = tile.keys[region];
          const bool none = keys.size() == 0;
          keys.begin = none ? visible[region].begin - first
                            : std::min(keys.begin, visible[region].begin - first);
          keys.end =
              none ? visible[region].end - first : std::max(keys.end, visible[region].end - first);
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
  std::array<Tensor, kRegions> keys_;
  std::array<Tensor, kRegions> values_;
  Tensor bias_;
  Tensor slopes_;                       // [1, H, 1, 1]
  Tensor t_;                            // [B, T], and so are the others
  std::array<Tensor, kRegions> first_;  // number of a region's first key in the query's stream
  Tensor groups_;
  Tensor edge_;
  Tensor held_;
  std::array<Tensor, kRegions> clocks_;
  std::array<Tensor, kRegions>
      queries_;  // rotated to the region's clock and scaled; undefined for an empty region
  std::array<Tensor, kRegions> places_;   // double [1, 1, keys], or [B, Hkv, keys]
  std::array<Tensor, kRegions> offsets_;  // double [B, T]
};

void check_spans(const Tensor& q, const Tensor& position, const Spans& s, const Scores& scores) {
  constexpr const char* where = "ctx.attend";
  CTX_CHECK_VALUE(q.dim() == 4, where, "q must be [B, H, T, D], got ", q.sizes());
  storage_of(q.scalar_type(), where, "q");
  const int64_t batch = q.size(0);
  CTX_CHECK_VALUE(s.window_values.dim() == 4,
                  where,
                  "window_values must be [B, Hkv, K, Dv], got ",
                  s.window_values.sizes());
  const int64_t kv_heads = s.window_values.size(1);
  const auto pair = [&](const Tensor& keys,
                        const Tensor& values,
                        const char* keys_name,
                        const char* values_name) {
    CTX_CHECK_VALUE(keys.dim() == 4 && keys.size(0) == batch && keys.size(1) == kv_heads &&
                        keys.size(3) == q.size(3),
                    where,
                    keys_name,
                    " must be [B, Hkv, keys, D] = [",
                    batch,
                    ", ",
                    kv_heads,
                    ", keys, ",
                    q.size(3),
                    "], got ",
                    keys.sizes());
    CTX_CHECK_VALUE(values.dim() == 4 && values.size(0) == batch && values.size(1) == kv_heads &&
                        values.size(2) == keys.size(2) && values.size(3) == s.window_values.size(3),
                    where,
                    values_name,
                    " must be [B, Hkv, keys, Dv] = [",
                    batch,
                    ", ",
                    kv_heads,
                    ", ",
                    keys.size(2),
                    ", ",
                    s.window_values.size(3),
                    "], got ",
                    values.sizes());
    CTX_CHECK_TYPE(keys.scalar_type() == q.scalar_type() && values.scalar_type() == q.scalar_type(),
                   where,
                   keys_name,
                   " and ",
                   values_name,
                   " must be ",
                   q.scalar_type(),
                   " as q, got ",
                   keys.scalar_type(),
                   " and ",
                   values.scalar_type());
  };
  pair(s.sink_keys, s.sink_values, "sink_keys", "sink_values");
  pair(s.compressed_keys, s.compressed_values, "compressed_keys", "compressed_values");
  pair(s.window_keys, s.window_values, "window_keys", "window_values");
  CTX_CHECK_VALUE(kv_heads > 0 && q.size(1) % kv_heads == 0,
                  where,
                  "q must have a multiple of ",
                  kv_heads,
                  " heads, got ",
                  q.size(1));
  const auto integers = [&](const Tensor& x, const char* name) {
    CTX_CHECK_VALUE(x.dim() == 2 && x.size(0) == batch && x.size(1) == q.size(2) &&
                        x.scalar_type() == at::kLong,
                    where,
                    name,
                    " must be int64 [B, T] = [",
                    batch,
                    ", ",
                    q.size(2),
                    "], got ",
                    x.scalar_type(),
                    " ",
                    x.sizes());
  };
  integers(position, "position");
  integers(s.first_sink, "first_sink");
  integers(s.first_slot, "first_slot");
  integers(s.first_token, "first_token");
  const auto per_head = [&](const OptionalTensor& x, const char* name) {
    CTX_CHECK_VALUE(!x || (x->dim() == 1 && (x->size(0) == q.size(1) || x->size(0) == 1)),
                    where,
                    name,
                    " must be [",
                    q.size(1),
                    "], got ",
                    x ? x->sizes() : at::IntArrayRef{});
  };
  per_head(scores.bias, "bias");
  per_head(scores.slopes, "slopes");
  if (s.slot_positions.defined()) {
    CTX_CHECK_VALUE(s.slot_positions.sizes() == s.compressed_keys.sizes().slice(0, 3) &&
                        s.slot_positions.scalar_type() == at::kLong,
                    where,
                    "slot_positions must be int64 [B, Hkv, G] = ",
                    s.compressed_keys.sizes().slice(0, 3),
                    ", got ",
                    s.slot_positions.scalar_type(),
                    " ",
                    s.slot_positions.sizes());
  }
  CTX_CHECK_VALUE(scores.relative.has_value() == scores.compressed_relative.has_value(),
                  where,
                  "relative and compressed_relative must come together, got one");
  if (!scores.relative) return;
  for (const Tensor& x : {*scores.relative, *scores.compressed_relative}) {
    CTX_CHECK_VALUE(x.dim() == 4 && x.sizes().slice(0, 3) == q.sizes().slice(0, 3) &&
                        x.size(3) > 0 && x.size(3) % 2 == 0,
                    where,
                    "relative must be [B, H, T, P] with q's B, H, T and an even P, got ",
                    x.sizes());
  }
}

// The operators' common arguments, in the order of their schemas.
#define CTX_ATTEND_PARAMETERS                                                                     \
  const Tensor &q, [[maybe_unused]] const Tensor &position,                                       \
      [[maybe_unused]] const Tensor &sink_keys, [[maybe_unused]] const Tensor &sink_values,       \
      [[maybe_unused]] const Tensor &compressed_keys,                                             \
      [[maybe_unused]] const Tensor &compressed_values,                                           \
      [[maybe_unused]] const Tensor &window_keys, [[maybe_unused]] const Tensor &window_values,   \
      [[maybe_unused]] const Tensor &first_sink, [[maybe_unused]] const Tensor &first_slot,       \
      [[maybe_unused]] const Tensor &first_token,                                                 \
      [[maybe_unused]] const OptionalTensor &slot_positions,                                      \
      [[maybe_unused]] const OptionalTensor &bias, [[maybe_unused]] const OptionalTensor &slopes, \
      [[maybe_unused]] const OptionalTensor &relative,                                            \
      [[maybe_unused]] const OptionalTensor &compressed_relative,                                 \
      [[maybe_unused]] at::IntArrayRef schedule, [[maybe_unused]] c10::string_view distance,      \
      [[maybe_unused]] int64_t rotary_dim, [[maybe_unused]] double rotary_base,                   \
      [[maybe_unused]] bool rotary_interleaved, [[maybe_unused]] double scale
#define CTX_ATTEND_ARGUMENTS                                                                      \
  q, position, sink_keys, sink_values, compressed_keys, compressed_values, window_keys,           \
      window_values, first_sink, first_slot, first_token, slot_positions, bias, slopes, relative, \
      compressed_relative, schedule, distance, rotary_dim, rotary_base, rotary_interleaved, scale

AttendCall check_call(CTX_ATTEND_PARAMETERS) {
  constexpr const char* where = "ctx.attend";
  const Spans spans{sink_keys,
                    sink_values,
                    compressed_keys,
                    compressed_values,
                    window_keys,
                    window_values,
                    first_sink,
                    first_slot,
                    first_token,
                    slot_positions.value_or(Tensor())};
  const Scores scores{bias, slopes, relative, compressed_relative};
  check_spans(q, position, spans, scores);
  const Clock clock{parse_schedule(schedule, where),
                    parse_token_distance({distance.data(), distance.size()}, where)};
  const Rotary turned = parse_rotary(rotary_dim, rotary_base, rotary_interleaved, q.size(3), where);
  return {q, position, spans, bias, slopes, clock, turned, scale};
}

Call make_call(CTX_ATTEND_PARAMETERS) {
  const AttendCall c = check_call(CTX_ATTEND_ARGUMENTS);
  const Scores scores{bias, slopes, relative, compressed_relative};
  return Call(q, position, c.spans, scores, c.clock, c.rotary, scale);
}

std::tuple<Tensor, Tensor, Tensor> attend_forward(CTX_ATTEND_PARAMETERS, bool with_mass) {
  const auto precision = own_precision();
  auto [out, logsumexp, mass] = make_call(CTX_ATTEND_ARGUMENTS).forward(with_mass);
  return {out.to(q.scalar_type()), logsumexp, mass};
}

std::tuple<Tensor, Tensor, Tensor> attend_meta(CTX_ATTEND_PARAMETERS, bool with_mass) {
  auto sizes = q.sym_sizes().vec();
  const Tensor logsumexp = q.new_empty_symint(c10::SymIntArrayRef(sizes).slice(0, 3),
                                              q.options().dtype(arithmetic_type(q.scalar_type())));
  sizes[3] = window_values.sym_size(3);
  return {q.new_empty_symint(sizes), logsumexp, new_mass(q, with_mass)};
}

// Of q, sink keys and values, compressed, window, bias, and the queries of relative positions.
using Gradients =
    std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// The sum of what the regions give; zeros where none of them has keys.
Tensor relative_gradient(const OptionalTensor& like,
                         std::initializer_list<Tensor> parts,
                         const Tensor& q) {
  if (!like) return at::zeros({0}, q.options());
  Tensor sum = at::zeros_like(*like);
  for (const Tensor& part : parts) {
    if (part.defined()) sum = sum + part.to(sum.scalar_type());
  }
  return sum;
}

Gradients attend_backward(const Tensor& grad_out,
                          const Tensor& grad_logsumexp,
                          const Tensor& out,
                          const Tensor& logsumexp,
                          CTX_ATTEND_PARAMETERS) {
  const auto precision = own_precision();
  auto g = make_call(CTX_ATTEND_ARGUMENTS).backward(grad_out, grad_logsumexp, out, logsumexp);
  const auto type = q.scalar_type();
  return {g.q.to(type),
          g.keys[kSinks].to(type),
          g.values[kSinks].to(type),
          g.keys[kCompressed].to(type),
          g.values[kCompressed].to(type),
          g.keys[kWindow].to(type),
          g.values[kWindow].to(type),
          bias ? g.bias.to(bias->scalar_type()) : at::zeros({0}, q.options()),
          relative_gradient(relative, {g.relative[kWindow], g.relative[kSinks]}, q),
          relative_gradient(compressed_relative, {g.relative[kCompressed]}, q)};
}

// What the kernels of spans.h leave to torch's operators: relative positions, and distances to slots
// that are single tokens.
bool is_composite(const OptionalTensor& slot_positions,
                  const OptionalTensor& slopes,
                  const OptionalTensor& relative,
                  c10::string_view distance) {
  return relative || (slopes && slot_positions && distance == "token");
}

std::tuple<Tensor, Tensor, Tensor> attend_forward_cpu(CTX_ATTEND_PARAMETERS, bool with_mass) {
  if (is_composite(slot_positions, slopes, relative, distance))
    return attend_forward(CTX_ATTEND_ARGUMENTS, with_mass);
  const auto precision = own_precision();
  return spans_forward(check_call(CTX_ATTEND_ARGUMENTS), with_mass);
}

Gradients attend_backward_cpu(const Tensor& grad_out,
                              const Tensor& grad_logsumexp,
                              const Tensor& out,
                              const Tensor& logsumexp,
                              CTX_ATTEND_PARAMETERS) {
  if (is_composite(slot_positions, slopes, relative, distance)) {
    return attend_backward(grad_out, grad_logsumexp, out, logsumexp, CTX_ATTEND_ARGUMENTS);
  }
  const auto precision = own_precision();
  const auto g =
      spans_backward(check_call(CTX_ATTEND_ARGUMENTS), grad_out, grad_logsumexp, out, logsumexp);
  const auto none = [&] { return at::zeros({0}, q.options()); };  // outputs share no memory
  return {g.q,
          g.keys[kSinks],
          g.values[kSinks],
          g.keys[kCompressed],
          g.values[kCompressed],
          g.keys[kWindow],
          g.values[kWindow],
          bias ? g.bias : none(),
          none(),
          none()};
}

Gradients attend_backward_meta(const Tensor& /*grad_out*/,
                               const Tensor& /*grad_logsumexp*/,
                               const Tensor& /*out*/,
                               const Tensor& /*logsumexp*/,
                               CTX_ATTEND_PARAMETERS) {
  const auto like = [](const Tensor& x) { return x.new_empty_symint(x.sym_sizes()); };
  return {like(q),
          like(sink_keys),
          like(sink_values),
          like(compressed_keys),
          like(compressed_values),
          like(window_keys),
          like(window_values),
          bias ? like(*bias) : q.new_empty({0}),
          relative ? like(*relative) : q.new_empty({0}),
          compressed_relative ? like(*compressed_relative) : q.new_empty({0})};
}

class AttendFunction : public torch::autograd::Function<AttendFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* saved,
                                                CTX_ATTEND_PARAMETERS,
                                                bool with_mass) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ctx::attend", "")
                               .typed<decltype(attend_forward)>();
    auto [out, logsumexp, mass] = op.call(CTX_ATTEND_ARGUMENTS, with_mass);
    saved->mark_non_differentiable({mass});
    saved->save_for_backward({out,
                              logsumexp,
                              q,
                              position,
                              sink_keys,
                              sink_values,
                              compressed_keys,
                              compressed_values,
                              window_keys,
                              window_values,
                              first_sink,
                              first_slot,
                              first_token,
                              slot_positions.value_or(Tensor()),
                              bias.value_or(Tensor()),
                              slopes.value_or(Tensor()),
                              relative.value_or(Tensor()),
                              compressed_relative.value_or(Tensor())});
    saved->saved_data["schedule"] = schedule.vec();
    saved->saved_data["distance"] = std::string(distance);
    saved->saved_data["rotary_dim"] = rotary_dim;
    saved->saved_data["rotary_base"] = rotary_base;
    saved->saved_data["rotary_interleaved"] = rotary_interleaved;
    saved->saved_data["scale"] = scale;
    return {out, logsumexp, mass};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* saved,
                                                 torch::autograd::variable_list grads) {
    const auto x = saved->get_saved_variables();
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ctx::attend_backward", "")
                               .typed<decltype(attend_backward)>();
    const Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(x[0]);
    const Tensor grad_logsumexp = grads[1].defined() ? grads[1] : at::zeros_like(x[1]);
    const auto given = [&](size_t i) {
      return x[i].defined() ? OptionalTensor(x[i]) : std::nullopt;
    };
    const auto& data = saved->saved_data;
    auto [q, sk, sv, ck, cv, wk, wv, b, r, cr] = op.call(grad_out,
                                                         grad_logsumexp,
                                                         x[0],
                                                         x[1],
                                                         x[2],
                                                         x[3],
                                                         x[4],
                                                         x[5],
                                                         x[6],
                                                         x[7],
                                                         x[8],
                                                         x[9],
                                                         x[10],
                                                         x[11],
                                                         x[12],
                                                         given(13),
                                                         given(14),
                                                         given(15),
                                                         given(16),
                                                         given(17),
                                                         data.at("schedule").toIntVector(),
                                                         data.at("distance").toStringView(),
                                                         data.at("rotary_dim").toInt(),
                                                         data.at("rotary_base").toDouble(),
                                                         data.at("rotary_interleaved").toBool(),
                                                         data.at("scale").toDouble());
    torch::autograd::variable_list result(23);
    result[0] = q, result[2] = sk, result[3] = sv, result[4] = ck, result[5] = cv, result[6] = wk,
    result[7] = wv;
    if (given(14)) result[12] = b;
    if (given(16)) result[14] = r;
    if (given(17)) result[15] = cr;
    return result;
  }
};

std::tuple<Tensor, Tensor, Tensor> attend_autograd(CTX_ATTEND_PARAMETERS, bool with_mass) {
  auto results = AttendFunction::apply(CTX_ATTEND_ARGUMENTS, with_mass);
  return {results[0], results[1], results[2]};
}

// What is multiplied with keys, and with the encodings of distances.
struct Queries {
  Tensor content;                      // q + u, [B, H, T, D]
  OptionalTensor relative;             // (q + v) W, [B, H, T, P]
  OptionalTensor compressed_relative;  // the same with those of compressed slots

  // `operands`: as AttentionOptions::relative.
  Queries(const Tensor& q, at::TensorList operands) : content(q) {
    if (operands.empty()) return;
    const auto type = arithmetic_type(q.scalar_type());
    const Tensor wide = q.to(type);
    const auto biased = [&](int i) { return wide + operands[i].to(type).unsqueeze(1); };
    content = biased(0).to(q.scalar_type());
    relative = at::matmul(biased(1), operands[2].to(type));
    compressed_relative = at::matmul(biased(3), operands[4].to(type));
  }
};

}  // namespace

std::tuple<Tensor, Tensor> attend(const Tensor& q,
                                  const Tensor& position,
                                  const Spans& s,
                                  const ScoreOperands& operands,
                                  const Clock& clock,
                                  const Rotary& rotary,
                                  double scale,
                                  bool with_mass) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::attend", "")
                             .typed<decltype(attend_forward)>();
  const Schedule& l = clock.schedule;
  const Queries queries(q, operands.relative);
  auto [out, logsumexp, mass] =
      op.call(queries.content,
              position,
              s.sink_keys,
              s.sink_values,
              s.compressed_keys,
              s.compressed_values,
              s.window_keys,
              s.window_values,
              s.first_sink,
              s.first_slot,
              s.first_token,
              s.slot_positions.defined() ? OptionalTensor(s.slot_positions) : std::nullopt,
              operands.bias,
              operands.slopes,
              queries.relative,
              queries.compressed_relative,
              {l.window, l.compressed, l.ratio, l.segment, l.sinks},
              clock.token_distance ? "token" : "slot",
              rotary.dim,
              rotary.base,
              rotary.interleaved,
              scale,
              with_mass);
  return {out, mass};
}

Attended attend_now(const Tensor& q,
                    const Tensor& position,
                    const Spans& spans,
                    const ScoreOperands& operands,
                    const Clock& clock,
                    const Rotary& rotary,
                    double scale,
                    bool with_mass,
                    bool with_usage) {
  const Queries queries(q, operands.relative);
  const Scores scores{
      operands.bias, operands.slopes, queries.relative, queries.compressed_relative};
  const Call call(queries.content, position, spans, scores, clock, rotary, scale);
  Tensor usage;
  if (with_usage) {
    usage = at::zeros({q.size(0), spans.window_keys.size(1), spans.window_keys.size(2), 1},
                      q.options().dtype(arithmetic_type(q.scalar_type())));
  }
  const auto [out, logsumexp, mass] = call.forward(with_mass, usage);
  return {out.to(q.scalar_type()), mass, with_usage ? usage.squeeze(-1) : usage};
}

#define CTX_ATTEND_SCHEMA                                                                          \
  "Tensor q, Tensor position, Tensor sink_keys, Tensor sink_values, Tensor compressed_keys, "      \
  "Tensor compressed_values, Tensor window_keys, Tensor window_values, Tensor first_sink, Tensor " \
  "first_slot, Tensor "                                                                            \
  "first_token, Tensor? slot_positions, "                                                          \
  "Tensor? bias, Tensor? slopes, Tensor? relative, Tensor? compressed_relative, int[] schedule, "  \
  "str distance, int rotary_dim, float rotary_base, bool "                                         \
  "rotary_interleaved, "                                                                           \
  "float scale"

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def("attend(" CTX_ATTEND_SCHEMA
        ", bool with_mass) -> (Tensor out, Tensor logsumexp, Tensor mass)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "attend_backward(Tensor grad_out, Tensor grad_logsumexp, Tensor out, Tensor "
      "logsumexp, " CTX_ATTEND_SCHEMA
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(ctx, CompositeExplicitAutograd, m) {
  m.impl("attend", attend_forward);
  m.impl("attend_backward", attend_backward);
}

TORCH_LIBRARY_IMPL(ctx, CPU, m) {
  m.impl("attend", attend_forward_cpu);
  m.impl("attend_backward", attend_backward_cpu);
}

TORCH_LIBRARY_IMPL(ctx, Meta, m) {
  m.impl("attend", attend_meta);
  m.impl("attend_backward", attend_backward_meta);
}

TORCH_LIBRARY_IMPL(ctx, Autograd, m) { m.impl("attend", attend_autograd); }

}  // namespace ctx::ops
