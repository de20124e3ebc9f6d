// The CPU kernels of a streamed memory, compiled into this program, against double loops: rotary
// with given frequencies, mass, capped logits, relative positions.
#define CTX_CPU_CAPABILITY DEFAULT
#include "check.h"
#include "kernel_reference.h"
#include "kernels/cpu/append.cpp"
#include "kernels/cpu/attend.cpp"
#include "kernels/cpu/choose.cpp"
#include "kernels/cpu/compress.cpp"
#include "kernels/cpu/rotary.cpp"

namespace ctx::test {
namespace {

template <typename T>
std::vector<T> as(const std::vector<double>& x) {
  return std::vector<T>(x.begin(), x.end());
}

template <typename T>
constexpr Storage kStorage = sizeof(T) == 8 ? Storage::kFloat64 : Storage::kFloat32;

// Two rows of a stream, the second begins three tokens later; `capacity` of the rings is for blocks of
// up to 8 tokens.
template <typename T>
class Stream {
 public:
  static constexpr int64_t kRows = 2, kTokens = 61, kLate = 3;

  explicit Stream(Law law, bool keys_rotated = false) : law_(std::move(law)) {
    const Schedule& s = law_.clock.schedule;
    const int64_t c = law_.kv_heads * kRows;
    window_ = s.window_capacity(int64_t{8}), slots_ = s.compressed_capacity(int64_t{8});
    const auto ring = [&](std::vector<T>& x, int64_t n, int64_t width) {
      x.assign(std::max<int64_t>(1, c * n * width), std::numeric_limits<T>::quiet_NaN());
      return x.data();
    };
    m_.clock = law_.clock, m_.rotary = law_.rotary(), m_.rotary.keys_rotated = keys_rotated;
    m_.storage = m_.compressed_storage = kStorage<T>;
    m_.batch = kRows, m_.kv_heads = law_.kv_heads;
    m_.head_dim = law_.head_dim, m_.value_dim = law_.value_dim;
    m_.window_capacity = window_, m_.compressed_capacity = slots_;
    m_.window_keys = ring(rings_[0], window_, law_.head_dim);
    m_.window_values = ring(rings_[1], window_, law_.value_dim);
    m_.compressed_keys = ring(rings_[2], slots_, law_.head_dim);
    m_.compressed_values = ring(rings_[3], slots_, law_.value_dim);
    m_.sink_keys = ring(rings_[4], s.sinks, law_.head_dim);
    m_.sink_values = ring(rings_[5], s.sinks, law_.value_dim);
    mass_.assign(c * slots_, std::numeric_limits<T>::quiet_NaN());
    m_.slot_mass = mass_.data();
    q_ = numbers(kRows * law_.heads * kTokens * law_.head_dim, 1);
    k_ = numbers(kRows * law_.kv_heads * kTokens * law_.head_dim, 2);
    v_ = numbers(kRows * law_.kv_heads * kTokens * law_.value_dim, 3);
    r_ = numbers(kRows * law_.heads * kTokens * law_.relative_dim + 1, 4);
    rc_ = numbers(kRows * law_.heads * kTokens * law_.relative_dim + 1, 5);
    gate_ = numbers(law_.kv_heads * law_.head_dim, 6);
    place_ = numbers(law_.kv_heads * s.ratio, 7);
  }

  // The largest difference of any output from double loops.
  double run(CompressorKind kind, int64_t block_tokens) {
    const std::vector<T> q = as<T>(q_), v = as<T>(v_), r = as<T>(r_), rc = as<T>(rc_);
    std::vector<T> k = as<T>(k_);
    if (m_.rotary.keys_rotated) {
      for (int64_t b = 0; b < kRows; ++b)
        for (int64_t h = 0; h < law_.kv_heads; ++h)
          for (int64_t i = 0; i < kTokens; ++i) {
            const int64_t at = ((b * law_.kv_heads + h) * kTokens + i) * law_.head_dim;
            const auto turned = law_.rotated(&k_[at], static_cast<double>(i - b * kLate));
            std::copy(turned.begin(), turned.end(), k.begin() + at);
          }
    }
    std::vector<T> out(kRows * law_.heads * kTokens * law_.value_dim);
    const std::vector<T> bias = as<T>(law_.bias), slopes = as<T>(law_.slopes);
    const std::vector<T> gate = as<T>(gate_), place = as<T>(place_);
    const auto strided = [&](const std::vector<T>& x, int64_t heads, int64_t width) {
      return Strided{const_cast<T*>(x.data()), heads * kTokens * width, kTokens * width, width};
    };
    AppendArgs append;
    append.memory = m_;
    append.keys = strided(k, law_.kv_heads, law_.head_dim);
    append.values = strided(v, law_.kv_heads, law_.value_dim);
    CompressArgs compress;
    compress.memory = m_, compress.kind = kind;
    if (kind == CompressorKind::kGated) {
      compress.parameters[0] = compress.parameters[2] = gate.data();
      compress.parameters[1] = compress.parameters[3] = place.data();
    }
    AttendArgs attend;
    attend.memory = m_, attend.heads = law_.heads, attend.scale = law_.scale;
    attend.logit_softcap = law_.softcap;
    attend.bias = bias.empty() ? nullptr : bias.data();
    attend.slopes = slopes.empty() ? nullptr : slopes.data();
    attend.queries = strided(q, law_.heads, law_.head_dim);
    attend.out = strided(out, law_.heads, law_.value_dim);
    attend.relative.dim = law_.relative_dim;
    attend.relative.queries = strided(r, law_.heads, law_.relative_dim);
    attend.relative.compressed = strided(rc, law_.heads, law_.relative_dim);
    attend.call_tokens = kTokens;
    const int64_t origin[kRows] = {0, -kLate};
    for (int64_t offset = 0; offset < kTokens; offset += block_tokens) {
      const Block block{origin, nullptr, offset, std::min(block_tokens, kTokens - offset)};
      append.block = compress.block = attend.block = block;
      cpu::DEFAULT::append(append);
      cpu::DEFAULT::compress(compress);
      cpu::DEFAULT::attend(attend);
    }
    return compare(kind, out);
  }

 private:
  double compare(CompressorKind kind, const std::vector<T>& out) const {
    double worst = 0;
    for (int64_t b = 0; b < kRows; ++b) {
      for (int64_t h = 0; h < law_.heads; ++h) {
        for (int64_t t = 0; t + b * kLate < kTokens; ++t) {
          const int64_t row = (b * law_.heads + h) * kTokens + t + b * kLate;
          std::vector<std::vector<double>> rows;
          rows.reserve(1000);
          const auto key = [&](int region, int64_t n) { return make(kind, b, h, region, n, rows); };
          const Attended expected = attend_one(law_,
                                               t,
                                               h,
                                               &q_[row * law_.head_dim],
                                               &r_[row * law_.relative_dim],
                                               &rc_[row * law_.relative_dim],
                                               key);
          for (int64_t d = 0; d < law_.value_dim; ++d) {
            const double error = std::abs(out[row * law_.value_dim + d] - expected.out[d]);
            worst = error <= worst ? worst : error;
          }
        }
      }
    }
    return worst;
  }

  const double* raw(
      const std::vector<double>& x, int64_t b, int64_t h, int64_t t, int64_t w) const {
    return &x[((b * law_.kv_heads + h / law_.q_per_kv()) * kTokens + t + b * kLate) * w];
  }

  Key make(CompressorKind kind,
           int64_t b,
           int64_t h,
           int region,
           int64_t n,
           std::vector<std::vector<double>>& rows) const {
    const double clock = key_clock(law_.clock, region, n);
    if (region != kCompressed) {
      rows.push_back(law_.rotated(raw(k_, b, h, n, law_.head_dim), clock));
      return {rows.back().data(), raw(v_, b, h, n, law_.value_dim), 0};
    }
    const int64_t c = law_.clock.schedule.ratio, first = law_.clock.schedule.first_token(n);
    std::vector<double> weights(c, 1.0 / static_cast<double>(c));
    if (kind == CompressorKind::kGated) {
      const int64_t kv = h / law_.q_per_kv();
      double total = 0;
      for (int64_t i = 0; i < c; ++i) {
        double s = place_[kv * c + i];
        for (int64_t d = 0; d < law_.head_dim; ++d)
          s += gate_[kv * law_.head_dim + d] * raw(k_, b, h, first + i, law_.head_dim)[d];
        total += weights[i] = std::exp(s);
      }
      for (double& w : weights) w /= total;
    }
    std::vector<double> slot(law_.head_dim, 0.0), value(law_.value_dim, 0.0);
    double mass = 0;
    for (int64_t i = 0; i < c; ++i) {
      mass -= weights[i] * std::log(weights[i]);
      for (int64_t d = 0; d < law_.head_dim; ++d)
        slot[d] += weights[i] * raw(k_, b, h, first + i, law_.head_dim)[d];
      for (int64_t d = 0; d < law_.value_dim; ++d)
        value[d] += weights[i] * raw(v_, b, h, first + i, law_.value_dim)[d];
    }
    rows.push_back(law_.rotated(slot.data(), clock));
    const double* rotated = rows.back().data();
    rows.push_back(value);
    return {rotated, rows.back().data(), mass};
  }

  Law law_;
  MemoryView m_;
  int64_t window_, slots_;
  std::vector<T> rings_[6];
  std::vector<T> mass_;
  std::vector<double> q_, k_, v_, r_, rc_, gate_, place_;
};

Law law(bool token_distance) {
  Law made;
  made.clock = {{7, 4, 3, 4, 2}, token_distance};
  made.inv_freq = {1.0, 0.3};
  made.bias = {0.1, -0.2, 0.3, 0.0};
  return made;
}

template <typename T>
void streams(double bound) {
  for (const bool token_distance : {false, true}) {
    for (const int64_t block : {1, 3, 8}) {
      for (const auto kind : {CompressorKind::kMean, CompressorKind::kGated}) {
        Law one = law(token_distance);
        one.attention_factor = 1.3;
        EXPECT(Stream<T>(one).run(kind, block) < bound);
        one.interleaved = true;
        EXPECT(Stream<T>(one, /*keys_rotated=*/true).run(kind, block) < bound);
        one.softcap = 1.5;
        one.slopes = {0.01, 0.02, 0.3, 0.04};
        EXPECT(Stream<T>(one).run(kind, block) < bound);
        one.inv_freq.clear();
        one.relative_dim = 10;
        EXPECT(Stream<T>(one).run(kind, block) < bound);
        one.clock.schedule = {150, 90, 3, 4, 0};
        EXPECT(Stream<T>(one).run(kind, block) < bound);
      }
    }
  }
}

// Rotating back undoes the rotation, the attention factor included.
void inverse() {
  Law one = law(false);
  one.attention_factor = 1.7;
  const std::vector<double> x = numbers(3 * one.head_dim, 1), positions = {0, 5, 1e6};
  std::vector<double> y(x.size());
  RotateArgs args;
  args.rotary = one.rotary();
  args.storage = Storage::kFloat64;
  args.batch = args.heads = 1, args.tokens = 3, args.head_dim = one.head_dim;
  args.positions = positions.data();
  args.in = {const_cast<double*>(x.data()), 0, 0, one.head_dim};
  args.out = {y.data(), 0, 0, one.head_dim};
  cpu::DEFAULT::rotate(args);
  const std::vector<double> expected = one.rotated(&x[one.head_dim], 5);
  for (int64_t d = 0; d < one.head_dim; ++d)
    EXPECT(std::abs(y[one.head_dim + d] - expected[d]) < 1e-14);
  args.in.data = y.data(), args.inverse = true;
  cpu::DEFAULT::rotate(args);
  for (size_t i = 0; i < x.size(); ++i) EXPECT(std::abs(y[i] - x[i]) < 1e-14);
}

}  // namespace
}  // namespace ctx::test

int main() {
  ctx::test::inverse();
  ctx::test::streams<double>(1e-12);
  ctx::test::streams<float>(1e-5);
  return ctx::test::status();
}
