// Relative positions (relative.h) for a block of queries, one per vector lane, and a block of keys at
// a time: their part of the scores, and the gradients of the relative queries.
#pragma once

#include "kernels/cpu/relative.h"
#include "kernels/cpu/span_rows.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

static_assert(kBlockKeys / 2 < kPlaces);

template <typename T>
class RelativeBlock {
 public:
  using A = Acc<T>;

  RelativeBlock(const SpansArgs& args, int64_t most_tokens, int64_t most_lanes)
      : args_(args), dim_(args.relative.dim), half_(dim_ / 2), most_lanes_(most_lanes) {
    if (dim_ == 0) return;
    rows_ = scratch_.take(most_lanes * dim_);
    tables_ = scratch_.take(most_tokens * dim_);
    columns_ = scratch_.take(dim_ * most_lanes);
    turned_ = scratch_.take(dim_ * most_lanes);
    sums_ = scratch_.take(2 * kPlaces * most_lanes);
  }

  // Rotates the queries of a block to key 0 of a span, and scales them. distance(i): of token i from
  // that key; lanes that are not whole(lane) are zero.
  template <typename W, typename F>
  void rotate_to(int64_t span,
                 int64_t b,
                 int64_t kv,
                 int64_t first,
                 int64_t tokens,
                 int64_t lanes,
                 const W& whole,
                 const F& distance) {
    span_ = span, b_ = b, kv_ = kv, first_ = first, tokens_ = tokens;
    used_ = args_.heads / args_.kv_heads * tokens;
    step_ = key_step(args_.clock, span);
    for (int64_t i = 0; i < tokens; ++i) {
      A* table = tables_ + i * dim_;
      cosines_and_sines(
          distance(i), relative_frequencies(dim_).data(), half_, table, table + half_);
    }
    for (int64_t lane = 0; lane < used_; ++lane) {
      A* query = rows_ + lane * dim_;
      if (!whole(lane)) {
        std::fill_n(query, dim_, A(0));
        continue;
      }
      load_row(row<T>(queries(), b, head(lane), first + lane % tokens), query, dim_);
      scale_row(static_cast<A>(args_.scale), query, dim_);
      rotate(lane, A(1), query);
    }
    transpose(rows_, dim_, used_, dim_, columns_, lanes);
  }

  // Adds r(distance) of every lane to its scores [keys, lanes].
  void add_scores(Range keys, int64_t lanes, A* scores) {
    const int64_t middle = keys.size() / 2;
    A* odd = sums_;
    A* even = odd + (middle + 1) * lanes;
    rotate_columns(middle_table(keys), columns_, turned_, lanes);
    const PlaceTable<A>& places = place_table<A>(dim_, step_);
    add_product(middle + 1, lanes, places.sines(), turned_, odd);
    add_product(middle + 1, lanes, places.cosines(), turned_ + half_ * lanes, even);
    for (int64_t v = 0; v < lanes; v += kLanes<A>) {
      A* score = scores + middle * lanes + v;
      const auto add = [&](int64_t p, auto r) {
        store(score + p * lanes, load(score + p * lanes) + r);
      };
      add(0, load(even + v));
      for (int64_t p = 1; p <= middle; ++p) {
        const auto c = load(even + p * lanes + v), s = load(odd + p * lanes + v);
        add(-p, c + s);
        if (middle + p < keys.size()) add(p, c - s);
      }
    }
  }

  // Gradients: clear_grads() and, for each block of keys, add_grads() with those of its scores; then
  // finish_grads(), which adds them to rows [used lanes, dim].
  void clear_grads(int64_t lanes) {
    if (grads_ == nullptr) grads_ = scratch_.take(dim_ * most_lanes_);
    std::fill_n(grads_, dim_ * lanes, A(0));
  }

  void add_grads(Range keys, int64_t lanes, const A* grads) {
    const int64_t middle = keys.size() / 2;
    A* odd = sums_;
    A* even = odd + (middle + 1) * lanes;
    for (int64_t v = 0; v < lanes; v += kLanes<A>) {
      const A* grad = grads + middle * lanes + v;
      store(odd + v, broadcast(A(0)));
      store(even + v, load(grad));
      for (int64_t p = 1; p <= middle; ++p) {
        const auto before = load(grad - p * lanes);
        const auto behind = middle + p < keys.size() ? load(grad + p * lanes) : broadcast(A(0));
        store(odd + p * lanes + v, before - behind);
        store(even + p * lanes + v, before + behind);
      }
    }
    const PlaceTable<A>& places = place_table<A>(dim_, step_);
    const auto product = [&](const A* table, const A* sums, A* to) {
      multiply<Left::kColumns>(
          half_, lanes, middle + 1, table, half_, sums, lanes, to, lanes, false);
    };
    product(places.sines(), odd, turned_);
    product(places.cosines(), even, turned_ + half_ * lanes);
    RotaryTable<A> table = middle_table(keys);
    for (int64_t i = 0; i < half_; ++i) {
      const auto c = broadcast(table.cosine[i]), s = broadcast(table.sine[i]);
      for (int64_t v = i * lanes; v < (i + 1) * lanes; v += kLanes<A>) {
        const auto x = load(turned_ + v), y = load(turned_ + half_ * lanes + v);
        store(grads_ + v, load(grads_ + v) + (x * c - y * s));
        A* second = grads_ + half_ * lanes + v;
        store(second, load(second) + (y * c + x * s));
      }
    }
  }

  void finish_grads(int64_t lanes, A* rows) {
    transpose(grads_, lanes, dim_, used_, rows_, dim_);
    for (int64_t lane = 0; lane < used_; ++lane) {
      A* grad = rows_ + lane * dim_;
      rotate(lane, A(-1), grad);
      axpy(static_cast<A>(args_.scale), grad, rows + lane * dim_, dim_);
    }
  }

 private:
  const Strided& queries() const {
    return span_ == kCompressed ? args_.relative.compressed : args_.relative.queries;
  }
  int64_t head(int64_t lane) const { return kv_ * (args_.heads / args_.kv_heads) + lane / tokens_; }

  // Of the distance from key 0 to the middle of these.
  RotaryTable<A> middle_table(Range keys) const {
    const double middle = static_cast<double>(keys.begin + keys.size() / 2);
    return distance_table<A>(dim_, middle * step_);
  }

  void rotate(int64_t lane, A direction, A* z) const {
    const A* __restrict cosine = tables_ + lane % tokens_ * dim_;
    const A* __restrict sine = cosine + half_;
    A* __restrict first = z;
    A* __restrict second = z + half_;
    for (int64_t i = 0; i < half_; ++i) {
      const A x = first[i], y = second[i], s = direction * sine[i];
      first[i] = x * cosine[i] - y * s;
      second[i] = y * cosine[i] + x * s;
    }
  }

  // All lanes by the same angles, back: the middle is nearer than key 0.
  void rotate_columns(const RotaryTable<A>& table, const A* from, A* to, int64_t lanes) const {
    for (int64_t i = 0; i < half_; ++i) {
      const auto c = broadcast(table.cosine[i]), s = broadcast(table.sine[i]);
      for (int64_t v = i * lanes; v < (i + 1) * lanes; v += kLanes<A>) {
        const auto x = load(from + v), y = load(from + half_ * lanes + v);
        store(to + v, x * c + y * s);
        store(to + half_ * lanes + v, y * c - x * s);
      }
    }
  }

  // to [places, lanes] = table [places, half] . columns [half, lanes], by pieces of the depth that
  // stay in the first-level cache.
  void add_product(int64_t places, int64_t lanes, const A* table, const A* columns, A* to) const {
    constexpr int64_t kDepth = 64;
    for (int64_t i = 0; i < half_; i += kDepth) {
      multiply<Left::kRows>(places,
                            lanes,
                            std::min(kDepth, half_ - i),
                            table + i,
                            half_,
                            columns + i * lanes,
                            lanes,
                            to,
                            lanes,
                            i > 0);
    }
  }

  const SpansArgs& args_;
  int64_t dim_;
  int64_t half_;
  int64_t most_lanes_;
  int64_t span_ = 0;
  int64_t b_ = 0;
  int64_t kv_ = 0;
  int64_t first_ = 0;
  int64_t tokens_ = 0;
  int64_t used_ = 0;
  double step_ = 1;
  Scratch<A> scratch_;
  A* rows_ = nullptr;     // [lanes, dim]
  A* tables_ = nullptr;   // [tokens, dim]: angles of the distances to key 0
  A* columns_ = nullptr;  // [dim, lanes]: queries at the distance of key 0
  A* turned_ = nullptr;   // [dim, lanes]: at that of the middle of a block of keys
  A* sums_ = nullptr;     // [2, places, lanes]
  A* grads_ = nullptr;    // [dim, lanes]: of columns_
};

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
