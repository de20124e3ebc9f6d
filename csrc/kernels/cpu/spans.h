// What the forward and the backward of the differentiable path share: a block of queries, one per
// vector lane, and its scores against a block of keys, [keys, lanes]. With queries in the lanes,
// keys and values are read where they lie, rows of both are left operands of `multiply`, and a
// softmax over keys never crosses lanes.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "kernels/cpu/relative_block.h"
#include "kernels/cpu/rotary.h"
#include "kernels/cpu/softcap.h"
#include "kernels/cpu/span_rows.h"
#include "kernels/cpu/visible_keys.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

// The query heads of a kv head at some neighbouring tokens of a row: head r at token i is lane
// r * tokens() + i. Lanes past used() are there to fill vectors; what they hold is never read.
template <typename T>
class QueryBlock {
 public:
  using A = Acc<T>;
  using Integer = typename VisibleKeys<A>::Integer;

  // `derivatives`: score() also keeps those of capped scores.
  explicit QueryBlock(const SpansArgs& args, bool derivatives = false)
      : args_(args),
        q_per_kv_(args.heads / args.kv_heads),
        most_tokens_(tokens_per_block(args)),
        most_lanes_(round_up(q_per_kv_ * most_tokens_, kLanes<A>)),
        width_(round_up(args.head_dim, kSpanWidthStep)),
        visible_(most_lanes_),
        relative_(args, most_tokens_, most_lanes_) {
    scores_ = scratch_.take(kBlockKeys * most_lanes_);
    rows_ = scratch_.take(most_lanes_ * width_);
    columns_ = scratch_.take(args.head_dim * most_lanes_);
    shift_ = scratch_.take(most_lanes_);
    slope_ = scratch_.take(most_lanes_);
    distance_ = scratch_.take(most_lanes_);
    table_ = scratch_.take(most_tokens_ * std::max<int64_t>(1, args.rotary.dim));
    if (derivatives && args.logit_softcap > 0)
      slopes_of_cap_ = scratch_.take(kBlockKeys * most_lanes_);
    states_.resize(most_lanes_);
  }

  static int64_t tokens_per_block(const SpansArgs& args) {
    const int64_t q_per_kv = args.heads / args.kv_heads;
    return std::clamp<int64_t>(kBlockLanes / q_per_kv, 1, std::max<int64_t>(1, args.tokens));
  }

  // Tokens first ... of row b, as many as a block has.
  void place(int64_t b, int64_t kv, int64_t first) {
    b_ = b, kv_ = kv, first_ = first;
    rotated_ = false;
    tokens_ = std::min(most_tokens_, args_.tokens - first);
    lanes_ = round_up(used(), kLanes<A>);
    std::fill(states_.begin(), states_.end(), Lane::kWhole);
    for (int64_t span = 0; span < kRegions; ++span) find_visible(span);
  }

  // What a lane's query takes part in. kBlank: it sees what it sees, but its row is zero, so that a
  // number in it that is not finite reaches no other lane through a product. kAbsent: it sees
  // nothing, either.
  enum class Lane : uint8_t { kWhole, kBlank, kAbsent };

  // For all used lanes, after place() and before rotate_to().
  template <typename F>
  void set_lanes(const F& state) {
    bool absent = false;
    for (int64_t lane = 0; lane < used(); ++lane) {
      states_[lane] = state(lane);
      absent = absent || states_[lane] == Lane::kAbsent;
    }
    for (int64_t span = 0; absent && span < kRegions; ++span) find_visible(span);
  }

  int64_t b() const { return b_; }
  int64_t kv() const { return kv_; }
  int64_t tokens() const { return tokens_; }
  int64_t used() const { return q_per_kv_ * tokens_; }
  int64_t lanes() const { return lanes_; }
  int64_t most_lanes() const { return most_lanes_; }
  int64_t width() const { return width_; }
  int64_t head(int64_t lane) const { return kv_ * q_per_kv_ + lane / tokens_; }
  int64_t token(int64_t lane) const { return first_ + lane % tokens_; }
  int64_t index(int64_t lane) const {  // in [B, H, T]
    return (b_ * args_.heads + head(lane)) * args_.tokens + token(lane);
  }

  // Calls run(block) for blocks of the keys of a span that some query sees.
  template <typename F>
  void for_each_key_block(int64_t span, const F& run) {
    const PastSpan& past = args_.spans[span].past;
    const Range seen = visible_.by_some(span);
    for (int64_t begin = seen.begin; begin < seen.end;) {
      KeyBlock all{{begin, seen.end}, begin < past.size, begin - past.size};
      if (all.past) {
        all.row = (past.first[b_] + begin) % past.capacity;
        all.keys.end = std::min({seen.end, past.size, begin + past.capacity - all.row});
      }
      const int64_t blocks = (all.size() + kBlockKeys - 1) / kBlockKeys;
      const int64_t step = round_up((all.size() + blocks - 1) / blocks, kProductRows);
      for (int64_t j = begin; j < all.keys.end; j += step)
        run(KeyBlock{{j, std::min(j + step, all.keys.end)}, all.past, all.row + (j - begin)});
      begin = all.keys.end;
    }
  }
  bool sees(int64_t span) const { return visible_.by_some(span).size() > 0; }

  // Whether the query in a lane sees a key of the span that rotate_to() chose.
  bool sees(int64_t lane, int64_t key) const {
    const Range seen = visible_.of(span_, lane);
    return key >= seen.begin && key < seen.end;
  }

  // Rotates the queries to the clock of a span, and scales them: rows [used, width], and columns
  // [D, lanes].
  void rotate_to(int64_t span) {
    span_ = span;
    make_offsets(span);
    if (args_.relative.dim > 0) rotate_relative(span);
    const bool same = args_.rotary.dim == 0 || args_.clock.token_distance;
    if (rotated_ && same) return;  // as for the span before
    rotated_ = true;
    make_table(span);
    for (int64_t lane = 0; lane < used(); ++lane) {
      A* query = rows_ + lane * width_;
      if (states_[lane] != Lane::kWhole) {
        std::fill_n(query, args_.head_dim, A(0));
        continue;
      }
      load_row(row<T>(args_.queries, b_, head(lane), token(lane)), query, args_.head_dim);
      rotate(lane, Rotation::kTo, query);
      scale_row(static_cast<A>(args_.scale), query, args_.head_dim);
    }
    transpose(rows_, width_, used(), args_.head_dim, columns_, lanes_);
  }

  // Rotates a row of the width D to the clock that rotate_to() chose.
  void rotate(int64_t lane, Rotation rotation, A* query) const {
    const int64_t half = args_.rotary.dim / 2;
    const A* cosine = table_ + lane % tokens_ * args_.rotary.dim;
    rotate_row(args_.rotary, RotaryTable<A>{cosine, cosine + half}, rotation, query);
  }

  // Keys or values of a block of the span that rotate_to() chose; `buffer` is room for them.
  SpanRows<A> keys(const KeyBlock& block, A* buffer) const {
    return key_rows<T>(args_, span_, b_, kv_, block, buffer);
  }
  SpanRows<A> values(const KeyBlock& block, A* buffer) const {
    return value_rows<T>(args_, span_, b_, kv_, block, buffer);
  }

  const A* rows() const { return rows_; }
  // Added to every score of a lane; the caller adds it, to a sum that it makes anyhow.
  const A* shift() const { return shift_; }

  // Scores of every lane against the given keys, but for `shift`. What a lane does not see has a
  // score, too, be it NaN: the caller masks it, by hide() or by visible().
  A* score(const KeyBlock& block, SpanRows<A> rows) {
    multiply<Left::kRows>(block.size(),
                          lanes_,
                          args_.head_dim,
                          rows.data,
                          rows.stride,
                          columns_,
                          lanes_,
                          scores_,
                          lanes_,
                          false);
    if (args_.relative.dim > 0) relative_.add_scores(block.keys, lanes_, scores_);
    if (args_.logit_softcap > 0) cap_scores(block.size());
    if (has_mass()) add_mass(block);
    if (args_.slopes != nullptr) take_distances(block.keys);
    return scores_;
  }
  // d capped / d score of the keys last scored; null: scores are not capped.
  const A* slopes_of_cap() const { return slopes_of_cap_; }
  bool has_mass() const {
    const Span& s = args_.spans[span_];
    return s.mass != nullptr || s.past.mass != nullptr;
  }

  // Gradients of the relative queries; RelativeBlock says how.
  RelativeBlock<T>& relative() { return relative_; }

  // Whether some query does not see some of these keys.
  bool hides(Range keys) const {
    return keys.begin < visible_.by_all(span_).begin || keys.end > visible_.by_all(span_).end;
  }

  // The lanes of the vector at `v` that see a key of the span that rotate_to() chose: all bits set.
  auto seers(int64_t v) const { return visible_.seers(span_, v); }

  // Scores of what a lane does not see become minus infinity.
  void hide(Range keys) {
    const auto nothing = broadcast(-std::numeric_limits<A>::infinity());
    for (int64_t v = 0; v < lanes_; v += kLanes<A>) {
      const auto see = seers(v);
      for (int64_t j = 0; j < keys.size(); ++j) {
        A* scores = scores_ + j * lanes_ + v;
        store(scores, see.of(static_cast<Integer>(keys.begin + j)) ? load(scores) : nothing);
      }
    }
  }

 private:
  void cap_scores(int64_t count) {
    const A softcap = static_cast<A>(args_.logit_softcap);
    for (int64_t i = 0; i < count * lanes_; i += kLanes<A>) {
      const auto score = capped<A>(load(scores_ + i), softcap);
      store(scores_ + i, score);
      if (slopes_of_cap_ == nullptr) continue;
      const auto part = score * (A(1) / softcap);
      store(slopes_of_cap_ + i, A(1) - part * part);
    }
  }

  void add_mass(const KeyBlock& block) {
    const Span& s = args_.spans[span_];
    const int64_t head = (block.past ? s.past.row(b_) : b_) * args_.kv_heads + kv_;
    const auto* mass = static_cast<const A*>(block.past ? s.past.mass : s.mass);
    if (mass == nullptr) return;
    mass += head * (block.past ? s.past.capacity : s.size - s.past.size) + block.row;
    for (int64_t j = 0; j < block.size(); ++j) {
      const auto m = broadcast(mass[j]);
      A* scores = scores_ + j * lanes_;
      for (int64_t v = 0; v < lanes_; v += kLanes<A>) store(scores + v, load(scores + v) + m);
    }
  }

  void rotate_relative(int64_t span) {
    relative_.rotate_to(
        span,
        b_,
        kv_,
        first_,
        tokens_,
        lanes_,
        [&](int64_t lane) { return states_[lane] == Lane::kWhole; },
        [&](int64_t i) { return key_distance(span, i); });
  }

  int64_t position(int64_t i) const { return args_.position[b_ * args_.tokens + first_ + i]; }
  int64_t first_number(int64_t span, int64_t i) const {
    return args_.spans[span].first[b_ * args_.tokens + first_ + i];
  }

  void find_visible(int64_t span) {
    const int64_t size = args_.spans[span].size;
    visible_.clear(span, size);
    for (int64_t i = 0; i < tokens_; ++i) {
      Range keys;
      if (size > 0) {
        const int64_t t = position(i);
        const Range numbers = t < 0 ? Range{} : visible(args_.clock.schedule, t)[span];
        const int64_t first = first_number(span, i);
        keys.begin = std::clamp<int64_t>(numbers.begin - first, 0, size);
        keys.end = std::clamp<int64_t>(numbers.end - first, keys.begin, size);
      }
      for (int64_t lane = i; lane < used(); lane += tokens_)
        visible_.set(span, lane, states_[lane] == Lane::kAbsent ? Range{} : keys);
    }
  }

  double clock(int64_t span, int64_t t) const {
    return static_cast<double>(query_clock(args_.clock, span, t));
  }
  // From token i of the block to key 0 of the span.
  double key_distance(int64_t span, int64_t i) const {
    return clock(span, position(i)) - key_clock(args_.clock, span, first_number(span, i));
  }

  // Cosines and sines of all tokens, [tokens, 2, dim / 2].
  void make_table(int64_t span) {
    if (args_.rotary.dim == 0) return;
    for (int64_t i = 0; i < tokens_; ++i)
      make_rotary_table(args_.rotary, clock(span, position(i)), table_ + i * args_.rotary.dim);
  }

  A per_head(const void* values, int64_t lane) const {
    return values == nullptr ? A(0) : static_cast<const A*>(values)[head(lane)];
  }

  // What is added to the scores of each lane, and the distance of key 0 of the span.
  void make_offsets(int64_t span) {
    std::fill_n(shift_, lanes_, A(0));
    std::fill_n(slope_, lanes_, A(0));
    std::fill_n(distance_, lanes_, A(0));
    for (int64_t lane = 0; lane < used(); ++lane) {
      if (span == kCompressed) shift_[lane] = per_head(args_.bias, lane);
      if (args_.slopes == nullptr) continue;
      slope_[lane] = per_head(args_.slopes, lane);
      distance_[lane] = static_cast<A>(key_distance(span, lane % tokens_));
    }
  }

  // ALiBi: a key is `step` nearer than the one before it.
  void take_distances(Range keys) {
    const A step = static_cast<A>(key_step(args_.clock, span_));
    for (int64_t j = 0; j < keys.size(); ++j) {
      A* scores = scores_ + j * lanes_;
      const A nearer = step * static_cast<A>(keys.begin + j);
#pragma omp simd
      for (int64_t lane = 0; lane < lanes_; ++lane)
        scores[lane] -= slope_[lane] * (distance_[lane] - nearer);
    }
  }

  const SpansArgs& args_;
  int64_t q_per_kv_;  // query heads of a kv head
  int64_t most_tokens_;
  int64_t most_lanes_;
  int64_t width_;
  int64_t b_ = 0;
  int64_t kv_ = 0;
  int64_t first_ = 0;
  int64_t tokens_ = 0;
  int64_t lanes_ = 0;
  int64_t span_ = 0;
  bool rotated_ = false;
  Scratch<A> scratch_;
  VisibleKeys<A> visible_;
  RelativeBlock<T> relative_;
  A* scores_;
  A* slopes_of_cap_ = nullptr;
  A* rows_;
  A* columns_;
  A* shift_;
  A* slope_;
  A* distance_;
  A* table_;
  std::vector<Lane> states_;
};

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
