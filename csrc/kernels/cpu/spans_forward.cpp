// One softmax over three spans, for blocks of queries against blocks of keys with a running maximum
// and sum (Milakov & Gimelshein 2018, arXiv:1805.02867; Dao et al. 2022, arXiv:2205.14135). No more
// than a block of scores ever exists; keys that no query of a block sees are not touched.
#include <ATen/Parallel.h>

#include "kernels/cpu/spans.h"
#include "kernels/cpu/table.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {
namespace {

template <typename T>
class SpansForward {
 public:
  using A = Acc<T>;

  explicit SpansForward(const SpansArgs& args) : args_(args), block_(args) {
    const int64_t lanes = block_.most_lanes();
    sums_ = scratch_.take(args.value_dim * lanes);
    largest_ = scratch_.take(lanes);
    totals_ = scratch_.take(kRegions * lanes);
    shrink_ = scratch_.take(lanes);
    out_ = scratch_.take(args.value_dim * lanes);
    wide_ = scratch_.take(kBlockKeys * std::max(args.head_dim, args.value_dim));
  }

  void run(int64_t b, int64_t kv, int64_t first) {
    block_.place(b, kv, first);
    const int64_t lanes = block_.lanes();
    std::fill_n(sums_, args_.value_dim * lanes, A(0));
    std::fill_n(largest_, lanes, -std::numeric_limits<A>::infinity());
    std::fill_n(totals_, kRegions * lanes, A(0));
    for (int64_t span = 0; span < kRegions; ++span) {
      if (!block_.sees(span)) continue;
      block_.rotate_to(span);
      block_.for_each_key_block(span, [&](const KeyBlock& keys) { attend(span, keys); });
    }
    store_block();
  }

 private:
  void attend(int64_t span, const KeyBlock& keys) {
    A* weights = block_.score(keys, block_.keys(keys, wide_));
    if (block_.hides(keys.keys)) block_.hide(keys.keys);
    if (weigh(span, keys.size(), weights)) shrink_sums();
    SpanRows<A> values = block_.values(keys, wide_);
    if (block_.hides(keys.keys)) values = keep_apart(keys, values, weights);
    multiply<Left::kColumns>(args_.value_dim,
                             block_.lanes(),
                             keys.size(),
                             values.data,
                             values.stride,
                             weights,
                             block_.lanes(),
                             sums_,
                             block_.lanes(),
                             true);
  }

  // Zero times NaN is NaN: rows that are not finite are added here to the queries that see them, and
  // are zero in what is returned.
  SpanRows<A> keep_apart(const KeyBlock& keys, SpanRows<A> values, const A* weights) {
    const int64_t lanes = block_.lanes();
    const int64_t width = args_.value_dim;
    for (int64_t j = 0; j < keys.size(); ++j) {
      if (finite(values.data + j * values.stride, width)) continue;
      if (values.data != wide_) {
        for (int64_t i = 0; i < keys.size(); ++i)
          std::copy_n(values.data + i * values.stride, width, wide_ + i * width);
        values = {wide_, width};
      }
      A* row = wide_ + j * width;
      for (int64_t lane = 0; lane < block_.used(); ++lane) {
        if (!block_.sees(lane, keys.keys.begin + j)) continue;
        for (int64_t d = 0; d < width; ++d)
          sums_[d * lanes + lane] += weights[j * lanes + lane] * row[d];
      }
      std::fill_n(row, width, A(0));
    }
    return values;
  }

  // Scores to weights relative to the largest so far; true if that grew, by `shrink_`.
  bool weigh(int64_t span, int64_t count, A* scores) {
    const int64_t lanes = block_.lanes();
    const auto least = broadcast(-std::numeric_limits<A>::infinity());
    bool grew = false;
    for (int64_t v = 0; v < lanes; v += kLanes<A>) {
      auto highest = least;
      for (int64_t j = 0; j < count; ++j) {
        const auto x = load(scores + j * lanes + v);
        highest = highest < x ? x : highest;
      }
      const auto shift = load(block_.shift() + v);
      const auto before = load(largest_ + v);
      highest += shift;
      const auto largest = before < highest ? highest : before;
      // All scores minus infinity so far (hidden, or by a bias): weights are zero, not NaN.
      const auto reference = largest == least ? broadcast(A(0)) : largest;
      const auto subtract = reference - shift;
      auto total = broadcast(A(0));
      for (int64_t j = 0; j < count; ++j) {
        A* place = scores + j * lanes + v;
        const auto weight = exponential(load(place) - subtract);
        store(place, weight);
        total += weight;
      }
      const auto shrink = exponential(before - reference);
      for (int64_t earlier = 0; earlier < kRegions; ++earlier) {
        A* sum = totals_ + earlier * lanes + v;
        const auto shrunk = load(sum) * shrink;
        store(sum, earlier == span ? shrunk + total : shrunk);
      }
      store(largest_ + v, largest);
      store(shrink_ + v, shrink);
      for (int64_t i = 0; i < kLanes<A>; ++i) grew |= shrink_[v + i] != A(1);
    }
    return grew;
  }

  void shrink_sums() {
    const int64_t lanes = block_.lanes();
    for (int64_t d = 0; d < args_.value_dim; ++d) {
      A* sum = sums_ + d * lanes;
#pragma omp simd
      for (int64_t lane = 0; lane < lanes; ++lane) sum[lane] *= shrink_[lane];
    }
  }

  void store_block() {
    const int64_t lanes = block_.lanes();
    transpose(sums_, lanes, args_.value_dim, block_.used(), out_, args_.value_dim);
    for (int64_t lane = 0; lane < block_.used(); ++lane) {
      const A* totals = totals_ + lane;
      const A total = totals[0] + totals[lanes] + totals[2 * lanes];
      const A inverse = total == A(0) ? A(0) : A(1) / total;  // zero: this query sees nothing
      A* out = out_ + lane * args_.value_dim;
      scale_row(inverse, out, args_.value_dim);
      store_row(out,
                row<T>(args_.out, block_.b(), block_.head(lane), block_.token(lane)),
                args_.value_dim);
      const int64_t index = block_.index(lane);
      static_cast<A*>(args_.logsumexp)[index] = largest_[lane] + std::log(total);
      if (args_.region_weights == nullptr) continue;
      for (int64_t span = 0; span < kRegions; ++span)
        static_cast<A*>(args_.region_weights)[index * kRegions + span] =
            totals[span * lanes] * inverse;
    }
  }

  const SpansArgs& args_;
  QueryBlock<T> block_;
  Scratch<A> scratch_;
  A* sums_;     // [Dv, lanes]: values by weight, relative to the largest score
  A* largest_;  // [lanes]
  A* totals_;   // [spans, lanes]: weights
  A* shrink_;   // [lanes]
  A* out_;      // [lanes, Dv]
  A* wide_;     // a block's keys or values, where they cannot be used as they lie
};

template <typename T>
void run_blocks(const SpansArgs& args) {
  const int64_t step = QueryBlock<T>::tokens_per_block(args);
  const int64_t blocks = (args.tokens + step - 1) / step;
  int64_t keys = 0;
  for (const Span& span : args.spans) keys += span.size;
  const int64_t work = keys * kBlockLanes * (args.head_dim + args.value_dim) / kProductRows;
  at::parallel_for(
      0, args.batch * args.kv_heads * blocks, grain(work), [&](int64_t begin, int64_t end) {
        SpansForward<T> spans(args);
        for (int64_t task = begin; task < end; ++task) {
          spans.run(
              task / (args.kv_heads * blocks), task / blocks % args.kv_heads, task % blocks * step);
        }
      });
}

}  // namespace

void spans_forward(const SpansArgs& args) {
  dispatch(args.storage, [&](auto type) { run_blocks<decltype(type)>(args); });
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
