// ctx::attend: attention over three spans as a functional operator, and its backward, which
// recomputes the weights from the log-sum-exp instead of keeping them. On the CPU both are kernels
// of our own (spans.h); elsewhere, composites of torch's own operators, for every device.
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

// One call, in the arithmetic's type.
class Call {
 public:
  Call(const Tensor& q,
       const Tensor& position,
       const Spans& spans,
       const OptionalTensor& bias,
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
        kv_heads_(spans.window_keys.size(1)),
        keys_{spans.sink_keys.to(type_),
              spans.compressed_keys.to(type_),
              spans.window_keys.to(type_)},
        values_{spans.sink_values.to(type_),
                spans.compressed_values.to(type_),
                spans.window_values.to(type_)},
        t_(position),
        first_{spans.first_sink, spans.first_slot, spans.first_token} {
    if (bias) bias_ = bias->to(type_);
    const Schedule& s = clock.schedule;
    groups_ = groups_of(s, t_);
    edge_ = edge_of(s, groups_);
    held_ = groups_.clamp_max(s.compressed);
    clocks_ = {clock.token_distance ? t_ : t_ - edge_ + held_ + s.sinks,
               clock.token_distance ? t_ : t_ - edge_ + groups_,
               t_};
    const Tensor wide = q.to(type_);
    for (int region = 0; region < kRegions; ++region) {
      if (size(region) > 0) queries_[region] = rotate(wide, clocks_[region], rotary_) * scale_;
    }
  }

  std::tuple<Tensor, Tensor> forward() const {
    const Tensor out =
        at::empty({batch_, heads_, tokens_, values_[kWindow].size(3)}, values_[kWindow].options());
    const Tensor logsumexp = at::empty({batch_, heads_, tokens_}, out.options());
    for_each_tile([&](const Tile& tile) {
      std::vector<Tensor> parts;
      for (int region = 0; region < kRegions; ++region) {
        if (tile.keys[region].size() > 0) parts.push_back(scores(region, tile));
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
        const Tensor part = at::matmul(per_kv_head(weights.narrow(-1, begin, count)),
                                       keyed(values_[region], tile, region));
        sum = sum.defined() ? sum.add_(part) : part;
        begin += count;
      }
      cut(out, tile).copy_(sum.view({tile.rows.size(), heads_, tile.tokens.size(), -1}));
    });
    return {out, logsumexp};
  }

  struct Gradients {
    Tensor q;
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
      const Tensor back = rotate(queries[region], clocks_[region].neg(), rotary_);
      g.q = g.q.defined() ? g.q.add_(back) : back;
    }
    g.q = g.q.mul(scale_);
    if (bias.defined()) g.bias = bias_.size(0) == 1 ? bias.sum().reshape({1}) : bias.sum(0);
    return g;
  }

 private:
  int64_t size(int region) const { return keys_[region].size(2); }

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
  int64_t kv_heads_;
  std::array<Tensor, kRegions> keys_;
  std::array<Tensor, kRegions> values_;
  Tensor bias_;
  Tensor t_;                            // [B, T], and so are the others
  std::array<Tensor, kRegions> first_;  // number of a region's first key in the query's stream
  Tensor groups_;
  Tensor edge_;
  Tensor held_;
  std::array<Tensor, kRegions> clocks_;
  std::array<Tensor, kRegions>
      queries_;  // rotated to the region's clock and scaled; undefined for an empty region
};

void check_spans(const Tensor& q,
                 const Tensor& position,
                 const Spans& s,
                 const OptionalTensor& bias) {
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
  CTX_CHECK_VALUE(!bias || (bias->dim() == 1 && (bias->size(0) == q.size(1) || bias->size(0) == 1)),
                  where,
                  "bias must be [",
                  q.size(1),
                  "], got ",
                  bias ? bias->sizes() : at::IntArrayRef{});
}

// The operators' common arguments, in the order of their schemas.
#define CTX_ATTEND_PARAMETERS                                                                   \
  const Tensor &q, [[maybe_unused]] const Tensor &position,                                     \
      [[maybe_unused]] const Tensor &sink_keys, [[maybe_unused]] const Tensor &sink_values,     \
      [[maybe_unused]] const Tensor &compressed_keys,                                           \
      [[maybe_unused]] const Tensor &compressed_values,                                         \
      [[maybe_unused]] const Tensor &window_keys, [[maybe_unused]] const Tensor &window_values, \
      [[maybe_unused]] const Tensor &first_sink, [[maybe_unused]] const Tensor &first_slot,     \
      [[maybe_unused]] const Tensor &first_token, [[maybe_unused]] const OptionalTensor &bias,  \
      [[maybe_unused]] at::IntArrayRef schedule, [[maybe_unused]] c10::string_view distance,    \
      [[maybe_unused]] int64_t rotary_dim, [[maybe_unused]] double rotary_base,                 \
      [[maybe_unused]] bool rotary_interleaved, [[maybe_unused]] double scale
#define CTX_ATTEND_ARGUMENTS                                                                    \
  q, position, sink_keys, sink_values, compressed_keys, compressed_values, window_keys,         \
      window_values, first_sink, first_slot, first_token, bias, schedule, distance, rotary_dim, \
      rotary_base, rotary_interleaved, scale

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
                    first_token};
  check_spans(q, position, spans, bias);
  const Clock clock{parse_schedule(schedule, where),
                    parse_token_distance({distance.data(), distance.size()}, where)};
  const Rotary rotary =
      parse_rotary(rotary_dim, rotary_base, rotary_interleaved, q.size(3), where);
  return {q, position, spans, bias, clock, rotary, scale};
}

Call make_call(CTX_ATTEND_PARAMETERS) {
  const AttendCall c = check_call(CTX_ATTEND_ARGUMENTS);
  return Call(c.q, c.position, c.spans, c.bias, c.clock, c.rotary, c.scale);
}

std::tuple<Tensor, Tensor> attend_forward(CTX_ATTEND_PARAMETERS) {
  const auto precision = own_precision();
  auto [out, logsumexp] = make_call(CTX_ATTEND_ARGUMENTS).forward();
  return {out.to(q.scalar_type()), logsumexp};
}

std::tuple<Tensor, Tensor> attend_meta(CTX_ATTEND_PARAMETERS) {
  auto sizes = q.sym_sizes().vec();
  const Tensor logsumexp = q.new_empty_symint(c10::SymIntArrayRef(sizes).slice(0, 3),
                                              q.options().dtype(arithmetic_type(q.scalar_type())));
  sizes[3] = window_values.sym_size(3);
  return {q.new_empty_symint(sizes), logsumexp};
}

using Gradients8 = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Gradients8 attend_backward(const Tensor& grad_out,
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
          bias ? g.bias.to(bias->scalar_type()) : at::zeros({0}, q.options())};
}

std::tuple<Tensor, Tensor> attend_forward_cpu(CTX_ATTEND_PARAMETERS) {
  const auto precision = own_precision();
  return spans_forward(check_call(CTX_ATTEND_ARGUMENTS));
}

Gradients8 attend_backward_cpu(const Tensor& grad_out,
                               const Tensor& grad_logsumexp,
                               const Tensor& out,
                               const Tensor& logsumexp,
                               CTX_ATTEND_PARAMETERS) {
  const auto precision = own_precision();
  auto g = spans_backward(
      check_call(CTX_ATTEND_ARGUMENTS), grad_out, grad_logsumexp, out, logsumexp);
  return {g.q,
          g.keys[kSinks],
          g.values[kSinks],
          g.keys[kCompressed],
          g.values[kCompressed],
          g.keys[kWindow],
          g.values[kWindow],
          bias ? g.bias : at::zeros({0}, q.options())};
}

Gradients8 attend_backward_meta(const Tensor& /*grad_out*/,
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
          bias ? like(*bias) : q.new_empty({0})};
}

class AttendFunction : public torch::autograd::Function<AttendFunction> {
 public:
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* saved,
                                                CTX_ATTEND_PARAMETERS) {
    at::AutoDispatchBelowADInplaceOrView guard;
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ctx::attend", "")
                               .typed<decltype(attend_forward)>();
    auto [out, logsumexp] = op.call(CTX_ATTEND_ARGUMENTS);
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
                              bias.value_or(Tensor())});
    saved->saved_data["schedule"] = schedule.vec();
    saved->saved_data["distance"] = std::string(distance);
    saved->saved_data["rotary_dim"] = rotary_dim;
    saved->saved_data["rotary_base"] = rotary_base;
    saved->saved_data["rotary_interleaved"] = rotary_interleaved;
    saved->saved_data["scale"] = scale;
    return {out, logsumexp};
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* saved,
                                                 torch::autograd::variable_list grads) {
    const auto x = saved->get_saved_variables();
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("ctx::attend_backward", "")
                               .typed<decltype(attend_backward)>();
    const Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(x[0]);
    const Tensor grad_logsumexp = grads[1].defined() ? grads[1] : at::zeros_like(x[1]);
    const OptionalTensor bias = x[13].defined() ? OptionalTensor(x[13]) : std::nullopt;
    const auto& data = saved->saved_data;
    auto [q, sk, sv, ck, cv, wk, wv, b] = op.call(grad_out,
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
                                                  bias,
                                                  data.at("schedule").toIntVector(),
                                                  data.at("distance").toStringView(),
                                                  data.at("rotary_dim").toInt(),
                                                  data.at("rotary_base").toDouble(),
                                                  data.at("rotary_interleaved").toBool(),
                                                  data.at("scale").toDouble());
    torch::autograd::variable_list result(18);
    result[0] = q, result[2] = sk, result[3] = sv, result[4] = ck, result[5] = cv, result[6] = wk,
    result[7] = wv;
    if (bias) result[11] = b;
    return result;
  }
};

std::tuple<Tensor, Tensor> attend_autograd(CTX_ATTEND_PARAMETERS) {
  auto results = AttendFunction::apply(CTX_ATTEND_ARGUMENTS);
  return {results[0], results[1]};
}

}  // namespace

Tensor attend(const Tensor& q,
              const Tensor& position,
              const Spans& s,
              const OptionalTensor& bias,
              const Clock& clock,
              const Rotary& rotary,
              double scale) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("ctx::attend", "")
                             .typed<decltype(attend_forward)>();
  const Schedule& l = clock.schedule;
  return std::get<0>(op.call(q,
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
                             bias,
                             {l.window, l.compressed, l.ratio, l.segment, l.sinks},
                             clock.token_distance ? "token" : "slot",
                             rotary.dim,
                             rotary.base,
                             rotary.interleaved,
                             scale));
}

#define CTX_ATTEND_SCHEMA                                                                          \
  "Tensor q, Tensor position, Tensor sink_keys, Tensor sink_values, Tensor compressed_keys, "      \
  "Tensor compressed_values, Tensor window_keys, Tensor window_values, Tensor first_sink, Tensor " \
  "first_slot, Tensor "                                                                            \
  "first_token, "                                                                                  \
  "Tensor? bias, int[] schedule, str distance, int rotary_dim, float rotary_base, bool "           \
  "rotary_interleaved, "                                                                           \
  "float scale"

TORCH_LIBRARY_FRAGMENT(ctx, m) {
  m.def("attend(" CTX_ATTEND_SCHEMA ") -> (Tensor out, Tensor logsumexp)",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "attend_backward(Tensor grad_out, Tensor grad_logsumexp, Tensor out, Tensor "
      "logsumexp, " CTX_ATTEND_SCHEMA
      ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
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
