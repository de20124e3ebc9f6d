// Gradients of one softmax over three spans: weights are made again out of the log-sum-exp, a block
// of queries against a block of keys at a time (Dao et al. 2022, arXiv:2205.14135, appendix B.2).
//
// Zero times NaN is NaN, so a pair that the law does not show must not reach a product. Weights and
// gradients of scores are zero there by selection; a row that is not finite is zero as an operand of
// a product, and what it does to the pairs that it is in stands in their gradients. A query whose
// outputs have no gradient takes part in nothing.
#include <ATen/Parallel.h>

#include "kernels/cpu/span_sums.h"
#include "kernels/cpu/spans.h"
#include "kernels/cpu/table.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {
namespace {

constexpr int64_t kPartTokens = 256;  // sums of a part cost as much as some ten queries
constexpr int64_t kMostParts = 16;

template <typename T>
class SpansBackward {
 public:
  using A = Acc<T>;

  explicit SpansBackward(const SpansBackwardArgs& args)
      : args_(args), forward_(args.forward), block_(args.forward, /*derivatives=*/true) {
    const int64_t lanes = block_.most_lanes();
    grads_ = scratch_.take(kBlockKeys * lanes);
    out_rows_ = scratch_.take(lanes * args.value_width);
    out_columns_ = scratch_.take(forward_.value_dim * lanes);
    query_columns_ = scratch_.take(forward_.head_dim * lanes);
    query_rows_ = scratch_.take(lanes * forward_.head_dim);
    query_sums_ = scratch_.take(lanes * forward_.head_dim);
    base_ = scratch_.take(lanes);
    logsumexp_ = scratch_.take(lanes);
    bias_ = scratch_.take(lanes);
    wide_keys_ = scratch_.take(kBlockKeys * forward_.head_dim);
    wide_values_ = scratch_.take(kBlockKeys * forward_.value_dim);
    out_ = scratch_.take(forward_.value_dim);
    mass_ = scratch_.take(kBlockKeys * kLanes<A>);
    for (A*& sums : relative_sums_) sums = scratch_.take(lanes * forward_.relative.dim);
  }

  // Adds a block of queries to the sums of its kv head.
  void run(int64_t b, int64_t kv, int64_t first, const HeadSums<A>& sums) {
    sums_ = sums;
    block_.place(b, kv, first);
    load_block();
    for (int64_t span = 0; span < kRegions; ++span) {
      if (!block_.sees(span)) continue;
      block_.rotate_to(span);
      std::fill_n(query_columns_, forward_.head_dim * block_.lanes(), A(0));
      const bool relative = forward_.relative.dim > 0;
      if (relative) block_.relative().clear_grads(block_.lanes());
      block_.for_each_key_block(span, [&](const KeyBlock& keys) { attend(span, keys); });
      add_query_grads();
      if (relative)
        block_.relative().finish_grads(block_.lanes(), relative_sums_[span == kCompressed]);
    }
    store_block();
  }

 private:
  // Gradients of the outputs, as rows and as columns, and what every weight's gradient is relative
  // to: sum_j p_j dp_j = grad . out; the log-sum-exp's own gradient enters with the other sign.
  void load_block() {
    const int64_t lanes = block_.lanes();
    const int64_t width = args_.value_width;
    std::fill_n(base_, lanes, A(0));
    std::fill_n(bias_, lanes, A(0));
    std::fill_n(query_sums_, block_.used() * forward_.head_dim, A(0));
    for (A* sums : relative_sums_) std::fill_n(sums, block_.used() * forward_.relative.dim, A(0));
    // exp(score - infinity) = 0: no weight where a query sees nothing, or where a lane is none.
    std::fill_n(logsumexp_, lanes, std::numeric_limits<A>::infinity());
    block_.set_lanes([&](int64_t lane) { return load_lane(lane); });
    transpose(out_rows_, width, block_.used(), forward_.value_dim, out_columns_, lanes);
  }

  typename QueryBlock<T>::Lane load_lane(int64_t lane) {
    using Lane = typename QueryBlock<T>::Lane;
    const int64_t head = block_.head(lane);
    const int64_t token = block_.token(lane);
    const int64_t index = block_.index(lane);
    A* grad = out_rows_ + lane * args_.value_width;
    load_row(row<T>(args_.grad_out, block_.b(), head, token), grad, forward_.value_dim);
    const A grad_logsumexp = static_cast<const A*>(args_.grad_logsumexp)[index];
    const bool none =
        std::all_of(grad, grad + forward_.value_dim, [](A number) { return number == A(0); });
    if (none && grad_logsumexp == A(0)) return Lane::kAbsent;
    load_row(row<T>(forward_.out, block_.b(), head, token), out_, forward_.value_dim);
    load_row(row<T>(forward_.queries, block_.b(), head, token), query_rows_, forward_.head_dim);
    const A base = dot(grad, out_, forward_.value_dim) - grad_logsumexp;
    const A logsumexp = static_cast<const A*>(forward_.logsumexp)[index];
    if (!(finite(grad, forward_.value_dim) && finite(query_rows_, forward_.head_dim) &&
          std::isfinite(base) && logsumexp < std::numeric_limits<A>::infinity())) {
      // Weights and gradients of the pairs that the query sees are NaN.
      logsumexp_[lane] = std::numeric_limits<A>::quiet_NaN();
      std::fill_n(grad, forward_.value_dim, A(0));
      return Lane::kBlank;
    }
    base_[lane] = base;
    if (logsumexp != -std::numeric_limits<A>::infinity()) logsumexp_[lane] = logsumexp;
    return Lane::kWhole;
  }

  void attend(int64_t span, const KeyBlock& keys) {
    const int64_t lanes = block_.lanes();
    const int64_t count = keys.size();
    const int64_t key_width = args_.key_width;
    const int64_t value_width = args_.value_width;
    auto k = block_.keys(keys, wide_keys_);
    const auto v = block_.values(keys, wide_values_);
    A* weights = block_.score(keys, k);
    multiply<Left::kRows>(count,
                          lanes,
                          forward_.value_dim,
                          v.data,
                          v.stride,
                          out_columns_,
                          lanes,
                          grads_,
                          lanes,
                          false);
    A* const mass = keys.past ? nullptr : sums_.mass[span];
    make_grads(span, keys.keys, weights, mass == nullptr ? nullptr : mass + keys.row);
    if (!keys.past) {  // which is constant
      multiply<Left::kRows>(count,
                            value_width,
                            block_.used(),
                            weights,
                            lanes,
                            out_rows_,
                            value_width,
                            sums_.values[span] + keys.row * value_width,
                            value_width,
                            true);
      multiply<Left::kRows>(count,
                            key_width,
                            block_.used(),
                            grads_,
                            lanes,
                            block_.rows(),
                            key_width,
                            sums_.keys[span] + keys.row * key_width,
                            key_width,
                            true);
    }
    if (forward_.relative.dim > 0) block_.relative().add_grads(keys.keys, lanes, grads_);
    if (block_.hides(keys.keys)) k = finite_rows(k, count);
    multiply<Left::kColumns>(forward_.head_dim,
                             lanes,
                             count,
                             k.data,
                             k.stride,
                             grads_,
                             lanes,
                             query_columns_,
                             lanes,
                             true);
  }

  // Keys with zeros in place of the rows that are not finite.
  SpanRows<A> finite_rows(SpanRows<A> keys, int64_t count) {
    const int64_t width = forward_.head_dim;
    for (int64_t j = 0; j < count; ++j) {
      if (finite(keys.data + j * keys.stride, width)) continue;
      if (keys.data != wide_keys_) {
        for (int64_t i = 0; i < count; ++i)
          std::copy_n(keys.data + i * keys.stride, width, wide_keys_ + i * width);
        keys = {wide_keys_, width};
      }
      std::fill_n(wide_keys_ + j * width, width, A(0));
    }
    return keys;
  }

  // Scores to weights, and the weights' gradients to the scores'; zero where a lane sees nothing.
  // Those of the keys' mass are added to `mass`, if that is asked for.
  void make_grads(int64_t span, Range keys, A* scores, A* mass) {
    const int64_t lanes = block_.lanes();
    // Lanes past used() hold anything: sums over lanes need the selection.
    const bool selects = mass != nullptr || block_.hides(keys);
    const A* const slopes = block_.slopes_of_cap();
    if (mass != nullptr) std::fill_n(mass_, keys.size() * kLanes<A>, A(0));
    const auto zero = broadcast(A(0));
    for (int64_t v = 0; v < lanes; v += kLanes<A>) {
      const auto subtract = load(logsumexp_ + v) - load(block_.shift() + v);
      const auto base = load(base_ + v);
      const auto see = block_.seers(v);
      auto sum = zero;
      for (int64_t j = 0; j < keys.size(); ++j) {
        A* place = scores + j * lanes + v;
        A* grads = grads_ + j * lanes + v;
        auto weight = exponential(load(place) - subtract);
        auto grad = (load(grads) - base) * weight;
        if (selects) {
          const auto seen = see.of(static_cast<typename QueryBlock<T>::Integer>(keys.begin + j));
          weight = seen ? weight : zero;
          grad = seen ? grad : zero;
        }
        store(place, weight);
        sum += grad;
        if (mass != nullptr) {
          A* part = mass_ + j * kLanes<A>;
          store(part, load(part) + grad);
        }
        if (slopes != nullptr) grad = capped_grad(grad, slopes + j * lanes + v);
        store(grads, grad);
      }
      if (span == kCompressed) store(bias_ + v, load(bias_ + v) + sum);
    }
    if (mass == nullptr) return;
    for (int64_t j = 0; j < keys.size(); ++j) mass[j] += sum_lanes<A>(load(mass_ + j * kLanes<A>));
  }

  // Zero stays zero where a pair that is not seen has a score that is not finite.
  static Vec<A> capped_grad(Vec<A> grad, const A* slope) {
    const auto zero = broadcast(A(0));
    return grad == zero ? zero : grad * load(slope);
  }

  // Turns the gradients of a span's rotated queries back, and adds them up.
  void add_query_grads() {
    const int64_t dim = forward_.head_dim;
    transpose(query_columns_, block_.lanes(), dim, block_.used(), query_rows_, dim);
    for (int64_t lane = 0; lane < block_.used(); ++lane) {
      A* grad = query_rows_ + lane * dim;
      block_.rotate(lane, Rotation::kTransposed, grad);
      axpy(static_cast<A>(forward_.scale), grad, query_sums_ + lane * dim, dim);
    }
  }

  void store_block() {
    for (int64_t lane = 0; lane < block_.used(); ++lane) {
      const int64_t head = block_.head(lane);
      store_row(query_sums_ + lane * forward_.head_dim,
                row<T>(args_.grad_queries, block_.b(), head, block_.token(lane)),
                forward_.head_dim);
      if (sums_.bias != nullptr) sums_.bias[head - block_.head(0)] += bias_[lane];
    }
    const int64_t dim = forward_.relative.dim;
    if (dim == 0) return;
    const Strided* const grads[] = {&args_.grad_relative, &args_.grad_compressed_relative};
    for (int64_t lane = 0; lane < block_.used(); ++lane) {
      for (int which = 0; which < 2; ++which) {
        if (grads[which]->data == nullptr) continue;
        T* to = row<T>(*grads[which], block_.b(), block_.head(lane), block_.token(lane));
        store_row(relative_sums_[which] + lane * dim, to, dim);
      }
    }
  }

  const SpansBackwardArgs& args_;
  const SpansArgs& forward_;
  QueryBlock<T> block_;
  HeadSums<A> sums_;
  Scratch<A> scratch_;
  A* grads_;             // [keys, lanes]: of the weights, then of the scores
  A* out_rows_;          // [lanes, value_width]: of the outputs
  A* out_columns_;       // [Dv, lanes]
  A* query_columns_;     // [D, lanes]: of the rotated queries of a span
  A* query_rows_;        // [lanes, D]
  A* query_sums_;        // [lanes, D]: of the queries
  A* base_;              // [lanes]
  A* logsumexp_;         // [lanes]
  A* bias_;              // [lanes]
  A* mass_;              // [keys, kLanes]: of the keys' mass
  A* relative_sums_[2];  // [lanes, relative.dim]: of the relative queries, and of those for slots
  A* wide_keys_;         // a block's, where storage is narrower
  A* wide_values_;
  A* out_;  // [Dv]
};

// The queries of a kv head are cut into parts by the length of the call alone. Each part is summed
// by itself and the parts are added in order, so a sum does not depend on who makes it: a thread
// makes whole heads where there are enough of them, else parts.
template <typename T>
void run_parts(const SpansBackwardArgs& args) {
  using A = Acc<T>;
  const SpansArgs& f = args.forward;
  const int64_t step = QueryBlock<T>::tokens_per_block(f);
  const int64_t heads = f.batch * f.kv_heads;
  const int64_t parts = std::clamp<int64_t>(f.tokens / kPartTokens, 1, kMostParts);
  // A part takes every parts-th block: early ones may see less than late ones.
  const auto run_part = [&](auto& spans, int64_t head, int64_t part, const HeadSums<A>& sums) {
    for (int64_t first = part * step; first < f.tokens; first += parts * step)
      spans.run(head / f.kv_heads, head % f.kv_heads, first, sums);
  };
  if (parts == 1 || heads >= at::get_num_threads()) {
    at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
      SpansBackward<T> spans(args);
      PartSums<A> room(args, parts > 1 ? 1 : 0);
      for (int64_t head = begin; head < end; ++head) {
        const HeadSums<A> all = sums_of<A>(args, head);
        run_part(spans, head, 0, all);
        for (int64_t part = 1; part < parts; ++part) {
          const HeadSums<A> mine = room.clear(args, 0);
          run_part(spans, head, part, mine);
          add_sums(args, mine, all);
        }
      }
    });
    return;
  }
  PartSums<A> room(args, heads * (parts - 1));
  at::parallel_for(0, heads * parts, 1, [&](int64_t begin, int64_t end) {
    SpansBackward<T> spans(args);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task % heads;
      const int64_t part = task / heads;
      run_part(
          spans, head, part, part == 0 ? sums_of<A>(args, head) : room.clear(args, task - heads));
    }
  });
  at::parallel_for(0, heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      for (int64_t part = 1; part < parts; ++part)
        add_sums(args, room.at(args, (part - 1) * heads + head), sums_of<A>(args, head));
    }
  });
}

}  // namespace

void spans_backward(const SpansBackwardArgs& args) {
  dispatch(args.forward.storage, [&](auto type) { run_parts<decltype(type)>(args); });
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
