// Gradients of one softmax over three spans: weights are made again out of the log-sum-exp, a block
// of queries against a block of keys at a time (Dao et al. 2022, arXiv:2205.14135, appendix B.2).
#include <ATen/Parallel.h>

#include "kernels/cpu/spans.h"
#include "kernels/cpu/table.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {
namespace {

template <typename T>
class SpansBackward {
 public:
  using A = Acc<T>;

  explicit SpansBackward(const SpansBackwardArgs& args)
      : args_(args), forward_(args.forward), block_(args.forward) {
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
  }

  void run(int64_t part, int64_t b, int64_t kv, int64_t first) {
    part_ = part;
    block_.place(b, kv, first);
    load_block();
    for (int64_t span = 0; span < kRegions; ++span) {
      if (!block_.sees(span)) continue;
      block_.turn_to(span);
      std::fill_n(query_columns_, forward_.head_dim * block_.lanes(), A(0));
      block_.for_each_key_block(span, [&](const KeyBlock& keys) { attend(span, keys); });
      add_query_grads();
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
    // exp(score - infinity) = 0: no weight where a query sees nothing, or where a lane is none.
    std::fill_n(logsumexp_, lanes, std::numeric_limits<A>::infinity());
    for (int64_t lane = 0; lane < block_.used(); ++lane) {
      const int64_t head = block_.head(lane);
      const int64_t token = block_.token(lane);
      A* grad = out_rows_ + lane * width;
      load_row(row<T>(args_.grad_out, block_.b(), head, token), grad, forward_.value_dim);
      load_row(row<T>(forward_.out, block_.b(), head, token), out_, forward_.value_dim);
      const int64_t index = block_.index(lane);
      base_[lane] =
          dot(grad, out_, forward_.value_dim) - static_cast<const A*>(args_.grad_logsumexp)[index];
      const A logsumexp = static_cast<const A*>(forward_.logsumexp)[index];
      if (logsumexp != -std::numeric_limits<A>::infinity()) logsumexp_[lane] = logsumexp;
    }
    transpose(out_rows_, width, block_.used(), forward_.value_dim, out_columns_, lanes);
  }

  void attend(int64_t span, const KeyBlock& keys) {
    const Span& s = forward_.spans[span];
    const int64_t lanes = block_.lanes();
    const int64_t count = keys.size();
    const int64_t key_width = args_.key_width;
    const int64_t value_width = args_.value_width;
    const auto k = block_.keys(keys, wide_keys_);
    const auto v = block_.values(keys, wide_values_);
    A* weights = block_.score(keys.keys, k);
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
    make_grads(span, keys.keys, weights);
    if (!keys.past) {  // which is constant
      const int64_t size = s.size - s.past.size;
      multiply<Left::kRows>(count,
                            value_width,
                            block_.used(),
                            weights,
                            lanes,
                            out_rows_,
                            value_width,
                            grad_row(args_.grad_values[span], size, keys.row, value_width),
                            value_width,
                            true);
      multiply<Left::kRows>(count,
                            key_width,
                            block_.used(),
                            grads_,
                            lanes,
                            block_.rows(),
                            key_width,
                            grad_row(args_.grad_keys[span], size, keys.row, key_width),
                            key_width,
                            true);
    }
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

  // Scores to weights, and the weights' gradients to the scores'.
  void make_grads(int64_t span, Range keys, A* scores) {
    const int64_t lanes = block_.lanes();
    const bool hides = block_.hides(keys);
    const auto zero = broadcast(A(0));
    for (int64_t v = 0; v < lanes; v += kLanes<A>) {
      const auto subtract = load(logsumexp_ + v) - load(block_.shift() + v);
      const auto base = load(base_ + v);
      auto sum = zero;
      for (int64_t j = 0; j < keys.size(); ++j) {
        A* place = scores + j * lanes + v;
        A* grads = grads_ + j * lanes + v;
        const auto weight = exponential(load(place) - subtract);
        auto grad = (load(grads) - base) * weight;
        // Whatever a hidden value holds, even if its product has left the range of numbers.
        if (hides) grad = weight == zero ? zero : grad;
        store(place, weight);
        store(grads, grad);
        sum += grad;
      }
      if (span == kCompressed) store(bias_ + v, load(bias_ + v) + sum);
    }
  }

  // Row `key` of this part's sums [parts, B, Hkv, keys, width].
  A* grad_row(void* sums, int64_t size, int64_t key, int64_t width) const {
    const int64_t head = (part_ * forward_.batch + block_.b()) * forward_.kv_heads + block_.kv();
    return static_cast<A*>(sums) + (head * size + key) * width;
  }

  // Turns the gradients of a span's rotated queries back, and adds them up.
  void add_query_grads() {
    const int64_t dim = forward_.head_dim;
    transpose(query_columns_, block_.lanes(), dim, block_.used(), query_rows_, dim);
    for (int64_t lane = 0; lane < block_.used(); ++lane) {
      A* grad = query_rows_ + lane * dim;
      block_.turn(lane, A(-1), grad);
      axpy(static_cast<A>(forward_.scale), grad, query_sums_ + lane * dim, dim);
    }
  }

  void store_block() {
    for (int64_t lane = 0; lane < block_.used(); ++lane) {
      const int64_t head = block_.head(lane);
      store_row(query_sums_ + lane * forward_.head_dim,
                row<T>(args_.grad_queries, block_.b(), head, block_.token(lane)),
                forward_.head_dim);
      if (args_.grad_bias == nullptr) continue;
      const int64_t index = (part_ * forward_.batch + block_.b()) * forward_.heads + head;
      static_cast<A*>(args_.grad_bias)[index] += bias_[lane];
    }
  }

  const SpansBackwardArgs& args_;
  const SpansArgs& forward_;
  QueryBlock<T> block_;
  int64_t part_ = 0;
  Scratch<A> scratch_;
  A* grads_;          // [keys, lanes]: of the weights, then of the scores
  A* out_rows_;       // [lanes, value_width]: of the outputs
  A* out_columns_;    // [Dv, lanes]
  A* query_columns_;  // [D, lanes]: of the rotated queries of a span
  A* query_rows_;     // [lanes, D]
  A* query_sums_;     // [lanes, D]: of the queries
  A* base_;           // [lanes]
  A* logsumexp_;      // [lanes]
  A* bias_;           // [lanes]
  A* wide_keys_;      // a block's, where storage is narrower
  A* wide_values_;
  A* out_;  // [Dv]
};

// A part takes every parts-th block of a kv head's queries: early ones may see less than late ones.
template <typename T>
void run_parts(const SpansBackwardArgs& args) {
  const SpansArgs& f = args.forward;
  const int64_t step = QueryBlock<T>::tokens_per_block(f);
  const int64_t heads = f.batch * f.kv_heads;
  at::parallel_for(0, heads * args.parts, 1, [&](int64_t begin, int64_t end) {
    SpansBackward<T> spans(args);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t part = task / heads;
      const int64_t head = task % heads;
      for (int64_t first = part * step; first < f.tokens; first += args.parts * step)
        spans.run(part, head / f.kv_heads, head % f.kv_heads, first);
    }
  });
}

}  // namespace

void spans_backward(const SpansBackwardArgs& args) {
  dispatch(args.forward.storage, [&](auto type) { run_parts<decltype(type)>(args); });
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
