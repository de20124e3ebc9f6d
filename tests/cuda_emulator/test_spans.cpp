// The differentiable path, forward and backward, against float64 loops.
//
//   test_spans [cases] [first case] [bug]
#include "kernels/cuda/attend_launch.cuh"
#include "kernels/cuda/spans_backward.cuh"
#include "spans_case.h"

namespace ctx::test {
namespace {

int64_t tiled_by_mma = 0;  // launches

// NaN is what NaN should be.
bool close(double got, double want, double bound) {
  return std::abs(got - want) <= bound || (got != got && want != want);
}

// Sums of gradients, [B, heads, n, width].
struct Sums {
  int64_t heads = 0, n = 0, width = 0;
  std::vector<double> numbers;
  void make(int64_t b, int64_t h, int64_t count, int64_t w) {
    heads = h, n = count, width = w;
    numbers.assign(size_t(b * h * count * w), 0.0);
  }
  double& at(int64_t b, int64_t h, int64_t i, int64_t d) {
    return numbers[((b * heads + h) * n + i) * width + d];
  }
};

class SpansTest {
 public:
  SpansTest(Random& random, const Wish& wish) : random_(random), c_(random, wish), w_(c_.w) {}

  void run() {
    if (random_.coin()) c_.spoil();
    forward();
    for (int64_t b = 0; b < w_.batch; ++b)
      for (int64_t h = 0; h < w_.heads(); ++h)
        for (int64_t i = 0; i < c_.tokens; ++i) check_forward(b, h, i);
    backward();
  }

  // Numbers that are anything: no kernel may touch what is not the call's (an ASan build sees it).
  void run_damaged() {
    constexpr int64_t kLarge = std::numeric_limits<int64_t>::max();
    const int64_t numbers[] = {kLarge, -kLarge - 1, kLarge / 3, -5, random_.between(0, kLarge / 2)};
    const auto damage = [&](Buffer<int64_t>& x) {
      for (size_t i = 0; i < x.size(); ++i)
        if (random_.coin()) x[i] = random_.of(numbers);
    };
    damage(c_.position);
    for (auto& span : c_.spans) damage(span.first), damage(span.past_first);
    damaged_ = true;
    forward();
    backward();
  }

 private:
  void forward() {
    const SpansArgs args = c_.args();
    in_order(random_);
    tiled_by_mma += cuda::fits_mma(cuda::attention_of(args));
    cuda::spans_forward(args, nullptr);
    c_.out.fetch(), c_.logsumexp.fetch(), c_.region_weights.fetch();
  }

  double error() const {
    return w_.storage == Storage::kFloat64   ? 1e-11
           : w_.storage == Storage::kFloat32 ? 2e-5
           : w_.storage == Storage::kFloat16 ? 3e-3
                                             : 2e-2;
  }
  double number(const Buffer<char>& x, int64_t i) const {
    return load_number(w_.arithmetic, &x[i * cuda::size_of(w_.arithmetic)]);
  }
  std::vector<double> z(bool compressed, int64_t b, int64_t h, int64_t i) {
    if (c_.law.relative_dim == 0) return {};
    return (compressed ? c_.law.compressed_relative : c_.law.relative).row(b, h, i);
  }

  struct Pair {
    int region;
    int64_t j;
    AttendedKey key;
    std::vector<double> query;
    double weight, slope;  // slope: of the cap
  };

  // What a query sees, with weights; returns the log-sum-exp.
  double pairs(int64_t b, int64_t h, int64_t i, std::vector<Pair>& found, double& steep) {
    const int64_t t = c_.position[b * c_.tokens + i];
    std::vector<double> scores;
    double largest = -std::numeric_limits<double>::infinity(), total = 0;
    for (int region = 0; region < kRegions; ++region) {
      const Range seen = c_.seen(b, region, i);
      if (seen.size() <= 0) continue;
      const auto query = w_.rotated(c_.q.row(b, h, i), double(query_clock(w_.clock, region, t)));
      for (int64_t j = seen.begin; j < seen.end; ++j) {
        Pair pair{region, j, c_.key(b, h / w_.q_per_kv, region, i, j), query, 0, 1};
        double s = 0, size = 0;
        for (int64_t d = 0; d < w_.head_dim; ++d)
          s += query[d] * pair.key.key[d], size += std::abs(query[d] * pair.key.key[d]);
        if (c_.law.relative_dim > 0)
          s += c_.law.relative_score(z(region == kCompressed, b, h, i), pair.key.distance);
        s *= c_.law.scale, steep = std::max(steep, size * c_.law.scale / 8);
        if (c_.law.softcap > 0) {
          const double bent = std::tanh(s / c_.law.softcap);
          s = c_.law.softcap * bent, pair.slope = 1 - bent * bent;
        }
        s += pair.key.mass;
        if (region == kCompressed) s += c_.law.per_head(c_.law.bias, h);
        s -= c_.law.per_head(c_.law.slopes, h) * pair.key.distance;
        scores.push_back(s), found.push_back(pair), largest = std::max(largest, s);
      }
    }
    for (const double s : scores) total += std::exp(s - largest);
    for (size_t k = 0; k < found.size(); ++k)
      found[k].weight = std::exp(scores[k] - largest) / total;
    return found.empty() ? largest : largest + std::log(total);
  }

  void check_forward(int64_t b, int64_t h, int64_t i) {
    std::vector<Pair> found;
    double steep = 1;
    const double logsumexp = pairs(b, h, i, found, steep);
    std::vector<double> out(w_.value_dim, 0.0);
    double weights[kRegions] = {0, 0, 0};
    for (const Pair& pair : found) {
      weights[pair.region] += pair.weight;
      for (int64_t d = 0; d < w_.value_dim; ++d) out[d] += pair.weight * pair.key.value[d];
    }
    for (int64_t d = 0; d < w_.value_dim; ++d)
      EXPECT(close(c_.out.get(b, h, i, d), out[d], error() * steep));
    const int64_t index = (b * w_.heads() + h) * c_.tokens + i;
    const double got = number(c_.logsumexp, index);
    EXPECT(found.empty() ? got == logsumexp : close(got, logsumexp, error() * (2 + steep)));
    for (int region = 0; region < kRegions && logsumexp == logsumexp; ++region)
      EXPECT(close(
          number(c_.region_weights, index * kRegions + region), weights[region], error() * steep));
  }

  void backward() {
    const int64_t b = w_.batch, h = w_.heads(), dim = c_.law.relative_dim;
    Rows grad_out, grad_q, grad_z, grad_zc;
    grad_out.make(random_, w_.storage, b, h, c_.tokens, w_.value_dim);
    grad_out.fill(random_, 1.0);
    grad_q.make(random_, w_.storage, b, h, c_.tokens, w_.head_dim);
    Buffer<char> grad_logsumexp(size_t(b * h * c_.tokens * cuda::size_of(w_.arithmetic)));
    for (int64_t k = 0; k < b * h * c_.tokens; ++k) {
      const bool none = random_.one_in(6);
      store_number(w_.arithmetic,
                   &grad_logsumexp[k * cuda::size_of(w_.arithmetic)],
                   none ? 0.0 : random_.number());
      for (int64_t d = 0; none && d < w_.value_dim; ++d)
        grad_out.set(k / c_.tokens / h, k / c_.tokens % h, k % c_.tokens, d, 0.0);
    }
    SpansBackwardArgs args;
    args.forward = c_.args();
    args.grad_out = grad_out.strided(), args.grad_logsumexp = grad_logsumexp.device();
    args.grad_queries = grad_q.strided();
    if (dim > 0) {
      grad_z.make(random_, w_.storage, b, h, c_.tokens, dim);
      grad_zc.make(random_, w_.storage, b, h, c_.tokens, dim);
      args.grad_relative = grad_z.strided(), args.grad_compressed_relative = grad_zc.strided();
    }
    const auto padded = [](int64_t width) { return (width + 15) / 16 * 16; };
    args.key_width = padded(w_.head_dim), args.value_width = padded(w_.value_dim);
    Buffer<char> grad_keys[kRegions], grad_values[kRegions], grad_mass[kRegions], grad_bias;
    const int64_t size = cuda::size_of(w_.arithmetic);
    for (int region = 0; region < kRegions; ++region) {
      const auto& s = c_.spans[region];
      const int64_t keys = b * w_.kv_heads * s.fresh * size;
      grad_keys[region].assign(size_t(keys * args.key_width), char{});
      grad_values[region].assign(size_t(keys * args.value_width), char{});
      args.grad_keys[region] = grad_keys[region].device();
      args.grad_values[region] = grad_values[region].device();
      if (s.mass.size() == 0) continue;
      grad_mass[region].assign(size_t(keys), char{});
      args.grad_mass[region] = grad_mass[region].device();
    }
    if (c_.law.bias.size() > 0) {
      grad_bias.assign(size_t(b * h * size), char{});
      args.grad_bias = grad_bias.device();
    }
    Buffer<char> workspace(cuda::backward_workspace(args), char(-1));
    in_order(random_);
    cuda::spans_backward(args, workspace.device(), nullptr);
    grad_q.fetch(), grad_z.fetch(), grad_zc.fetch(), grad_bias.fetch();
    if (damaged_) return;

    Sums q, zs, zcs, keys[kRegions], values[kRegions], mass[kRegions];
    std::vector<double> bias(size_t(b * h), 0.0);
    q.make(b, h, c_.tokens, w_.head_dim);
    zs.make(b, h, c_.tokens, dim), zcs.make(b, h, c_.tokens, dim);
    double steep = 1;
    for (int region = 0; region < kRegions; ++region) {
      const int64_t fresh = c_.spans[region].fresh;
      keys[region].make(b, w_.kv_heads, fresh, w_.head_dim);
      values[region].make(b, w_.kv_heads, fresh, w_.value_dim);
      mass[region].make(b, w_.kv_heads, fresh, 1);
    }
    for (int64_t bi = 0; bi < b; ++bi)
      for (int64_t hi = 0; hi < h; ++hi)
        for (int64_t i = 0; i < c_.tokens; ++i) {
          std::vector<Pair> found;
          const auto grad = grad_out.row(bi, hi, i);
          const double grad_of_sum = number(grad_logsumexp, (bi * h + hi) * c_.tokens + i);
          // A query whose outputs have no gradient takes part in nothing.
          if (grad_of_sum == 0 &&
              std::all_of(grad.begin(), grad.end(), [](double x) { return x == 0; }))
            continue;
          pairs(bi, hi, i, found, steep);
          const int64_t t = c_.position[bi * c_.tokens + i], kv = hi / w_.q_per_kv;
          double base = -grad_of_sum;
          for (int64_t d = 0; d < w_.value_dim; ++d) base += grad[d] * c_.out.get(bi, hi, i, d);
          for (const Pair& pair : found) {
            double by_weight = 0;
            for (int64_t d = 0; d < w_.value_dim; ++d) by_weight += grad[d] * pair.key.value[d];
            double ds = pair.weight * (by_weight - base);
            const int64_t fresh = pair.j - c_.spans[pair.region].past;
            if (fresh >= 0) mass[pair.region].at(bi, kv, fresh, 0) += ds;
            if (pair.region == kCompressed) bias[bi * h + hi] += ds;
            ds *= pair.slope * c_.law.scale;
            for (int64_t w = 0; w < dim / 2; ++w) {
              const double angle =
                  pair.key.distance * std::pow(10000.0, -2.0 * double(w) / double(dim));
              Sums& to = pair.region == kCompressed ? zcs : zs;
              to.at(bi, hi, i, w) += ds * std::sin(angle);
              to.at(bi, hi, i, dim / 2 + w) += ds * std::cos(angle);
            }
            // The transpose of a rotation is the rotation back, times the factor twice.
            auto back =
                w_.rotated(pair.key.key, double(query_clock(w_.clock, pair.region, t)), true);
            for (int64_t d = 0; d < w_.rotary_dim; ++d)
              back[d] *= w_.attention_factor * w_.attention_factor;
            for (int64_t d = 0; d < w_.head_dim; ++d) q.at(bi, hi, i, d) += ds * back[d];
            if (fresh < 0) continue;
            for (int64_t d = 0; d < w_.head_dim; ++d)
              keys[pair.region].at(bi, kv, fresh, d) += ds * pair.query[d];
            for (int64_t d = 0; d < w_.value_dim; ++d)
              values[pair.region].at(bi, kv, fresh, d) += pair.weight * grad[d];
          }
        }
    // Stored outputs and log-sum-exps are rounded, and gradients are sums of many.
    const double bound = error() * 12 * steep;
    const auto expect_rows = [&](Rows& got, Sums& want) {
      for (int64_t bi = 0; bi < b; ++bi)
        for (int64_t hi = 0; hi < h; ++hi)
          for (int64_t i = 0; i < c_.tokens; ++i)
            for (int64_t d = 0; d < want.width; ++d) {
              const double x = want.at(bi, hi, i, d);
              EXPECT(close(got.get(bi, hi, i, d), x, bound * (1 + std::abs(x))));
            }
    };
    expect_rows(grad_q, q);
    if (dim > 0) expect_rows(grad_z, zs), expect_rows(grad_zc, zcs);
    for (int region = 0; region < kRegions; ++region) {
      const auto expect_sums = [&](Buffer<char>& got, Sums& want, int64_t width) {
        got.fetch();
        for (size_t r = 0; r < want.numbers.size() / std::max<int64_t>(1, want.width); ++r)
          for (int64_t d = 0; d < want.width; ++d) {
            const double x = want.numbers[r * want.width + d];
            EXPECT(close(number(got, int64_t(r) * width + d), x, bound * (1 + std::abs(x))));
          }
      };
      expect_sums(grad_keys[region], keys[region], args.key_width);
      expect_sums(grad_values[region], values[region], args.value_width);
      if (grad_mass[region].size() > 0) expect_sums(grad_mass[region], mass[region], 1);
    }
    for (size_t k = 0; k < bias.size() && grad_bias.size() > 0; ++k)
      EXPECT(close(number(grad_bias, int64_t(k)), bias[k], bound * (1 + std::abs(bias[k]))));
  }

  Random& random_;
  SpansCase c_;
  World& w_;
  bool damaged_ = false;
};

}  // namespace
}  // namespace ctx::test

int main(int argc, char** argv) {
  using namespace ctx;
  using namespace ctx::test;
  const int failed = run_cases("spans", Asked(argc, argv, 120), [](Random& random, int64_t i) {
    Wish wish{.small = i % 3 != 0, .kind = 0};
    if (!wish.small) {
      wish.storage = static_cast<int>(i / 3 % 2 == 0 ? Storage::kBFloat16 : Storage::kFloat16);
      wish.q_per_kv = 1 + i % 8;
    }
    SpansTest(random, wish).run();
    if (i % 5 == 0) SpansTest(random, wish).run_damaged();
  });
  std::printf("%lld launches by mma\n", static_cast<long long>(tiled_by_mma));
  return failed;
}
