// Attention of a memory against float64 loops over what its rings hold, for random laws, sizes, types,
// positions and ragged calls, in splits of several lengths.
//
//   test_attend [cases] [first case] [bug]
#include "attend_reference.h"
#include "kernels/cuda/append.cuh"
#include "kernels/cuda/attend_launch.cuh"
#include "kernels/cuda/compress_launch.cuh"

namespace ctx::test {
namespace {

int64_t tiled_by_mma = 0;  // launches

class AttendTest {
 public:
  AttendTest(Random& random, const Wish& wish) : random_(random), w_(random, wish) {
    law_.make(random, w_, wish.small);
  }

  void run() {
    const int64_t calls = random_.between(3, 8);
    for (int64_t call = 0; call < calls; ++call) {
      w_.next_call();
      make_inputs();
      const bool usage = w_.kind == CompressorKind::kMostUsed;
      const std::vector<int64_t> cuts = usage ? w_.cuts() : std::vector<int64_t>{0, w_.tokens};
      for (size_t i = 0; i + 1 < cuts.size(); ++i) run_block(w_.block(cuts[i], cuts[i + 1]));
      w_.end_call();
    }
  }

  // Counters that are anything: no kernel may touch what is not its memory's (an ASan build sees it).
  void run_damaged() {
    damaged_ = true;
    for (int64_t call = 0; call < 4; ++call) {
      w_.next_call();
      make_inputs();
      constexpr int64_t kLarge = std::numeric_limits<int64_t>::max();
      for (int64_t b = 0; b < w_.batch; ++b) {
        const int64_t numbers[] = {
            kLarge, -kLarge - 1, kLarge / 3, -5, random_.between(0, kLarge / 2)};
        w_.origin[b] = random_.of(numbers);
        if (random_.coin()) w_.lengths[b] = random_.of(numbers);
      }
      w_.ragged = random_.coin();
      run_kernels(w_.block(0, w_.tokens));
    }
  }

 private:
  void make_inputs() {
    const auto make = [&](Rows& x, int64_t heads, int64_t width) {
      x.make(random_, w_.storage, w_.batch, heads, w_.tokens, width);
      x.fill(random_, 1.0);
    };
    make(k_, w_.kv_heads, w_.head_dim), make(v_, w_.kv_heads, w_.value_dim);
    make(q_, w_.heads(), w_.head_dim), make(out_, w_.heads(), w_.value_dim);
    if (law_.relative_dim > 0) {
      make(law_.relative, w_.heads(), law_.relative_dim);
      make(law_.compressed_relative, w_.heads(), law_.relative_dim);
    }
    // Padding is not a number.
    for (int64_t b = 0; b < w_.batch; ++b)
      for (int64_t i = w_.lengths[b]; i < w_.tokens; ++i) {
        for (int64_t h = 0; h < w_.kv_heads; ++h)
          k_.set(b, h, i, 0, std::nan("")), v_.set(b, h, i, 0, std::nan(""));
        for (int64_t h = 0; h < w_.heads(); ++h) q_.set(b, h, i, 0, std::nan(""));
      }
    weights_.assign(size_t(w_.batch * w_.heads() * w_.tokens * kRegions * 8), char{});
  }

  void run_block(const Block& block) {
    const auto usage = run_kernels(block);
    for (int64_t b = 0; b < w_.batch; ++b) check_row(block, b, usage);
  }

  // Returns the usage before attention.
  std::vector<double> run_kernels(const Block& block) {
    AppendArgs append;
    append.memory = w_.view(), append.block = block;
    append.keys = k_.strided(), append.values = v_.strided();
    cuda::append(append, nullptr);
    CompressArgs compress;
    w_.fetch();
    compress.memory = w_.view(), compress.block = block, compress.kind = w_.kind;
    compress.wide_parameters = w_.wide_parameters;
    for (int i = 0; i < 6; ++i)
      compress.parameters[i] = w_.parameters[i].size() > 0 ? w_.parameters[i].device() : nullptr;
    Buffer<char> workspace(cuda::compress_workspace(compress));
    cuda::compress(compress, workspace.device(), nullptr);
    w_.fetch();
    auto usage = usage_numbers();
    attend(block);
    return usage;
  }

  void attend(const Block& block) {
    AttendArgs args;
    args.memory = w_.view(), args.block = block, args.heads = w_.heads();
    args.scale = law_.scale, args.logit_softcap = law_.softcap;
    args.bias = law_.bias.size() > 0 ? law_.bias.device() : nullptr;
    args.slopes = law_.slopes.size() > 0 ? law_.slopes.device() : nullptr;
    args.queries = q_.strided(), args.out = out_.strided();
    args.relative.dim = law_.relative_dim;
    if (law_.relative_dim > 0) {
      args.relative.queries = law_.relative.strided();
      args.relative.compressed = law_.compressed_relative.strided();
    }
    args.call_tokens = w_.tokens;
    asks_weights_ = random_.coin();
    if (asks_weights_) args.region_weights = weights_.device();
    args.count_usage = w_.kind == CompressorKind::kMostUsed;
    constexpr int64_t kLengths[] = {0, 4, 8, 32, 64};
    const int64_t length = random_.of(kLengths);
    Buffer<char> workspace(cuda::attend_workspace(args, length), char(-1));
    tiled_by_mma += cuda::fits_mma(cuda::attention_of(args));
    in_order(random_);
    cuda::attend(args, workspace.device(), nullptr, length);
    w_.fetch(), out_.fetch(), weights_.fetch();
    if (!damaged_) attend_alone(args, length);
  }

  // A row by itself gets the same bits; and, of a step of few tokens, a token by itself.
  void attend_alone(AttendArgs args, int64_t length) {
    const int64_t b = random_.between(0, w_.batch - 1);
    Rows alone;
    alone.make(random_, w_.storage, 1, w_.heads(), w_.tokens, w_.value_dim);
    const auto ring = [&](void*& data, int region, int side) {
      const Ring& r = w_.ring(region, side);
      data = static_cast<char*>(data) + w_.held[b] * r.heads * r.capacity * r.row_bytes();
    };
    MemoryView& m = args.memory;
    ring(m.sink_keys, kSinks, 0), ring(m.sink_values, kSinks, 1);
    ring(m.compressed_keys, kCompressed, 0), ring(m.compressed_values, kCompressed, 1);
    ring(m.window_keys, kWindow, 0), ring(m.window_values, kWindow, 1);
    const int64_t slots = w_.held[b] * m.kv_heads * m.compressed_capacity;
    if (m.slot_mass != nullptr)
      m.slot_mass = static_cast<char*>(m.slot_mass) + slots * cuda::size_of(w_.arithmetic);
    if (m.slot_positions != nullptr) m.slot_positions += slots;
    const auto row = [&](Strided& x) {
      if (x.data != nullptr)
        x.data = static_cast<char*>(x.data) + b * x.batch * cuda::size_of(w_.storage);
    };
    row(args.queries), row(args.relative.queries), row(args.relative.compressed);
    if (cuda::has_few_queries(cuda::attention_of(args)) && random_.coin()) {
      args.block.offset += random_.between(0, args.block.tokens - 1);
      args.block.tokens = 1;
    }
    m.batch = 1;
    args.block.origin += b, args.block.rows = nullptr;
    if (args.block.lengths != nullptr) args.block.lengths += b;
    args.out = alone.strided(), args.region_weights = nullptr, args.count_usage = false;
    Buffer<char> workspace(cuda::attend_workspace(args, length), char(-1));
    in_order(random_);
    cuda::attend(args, workspace.device(), nullptr, length);
    alone.fetch();
    for (int64_t h = 0; h < w_.heads(); ++h)
      for (int64_t i = args.block.offset; i < args.block.offset + args.block.tokens; ++i)
        for (int64_t d = 0; d < w_.value_dim; ++d) {
          const double got = alone.get(0, h, i, d), want = out_.get(b, h, i, d);
          EXPECT(got == want || (got != got && want != want));
        }
  }

  std::vector<double> usage_numbers() {
    std::vector<double> numbers;
    const int64_t size = cuda::size_of(w_.arithmetic);
    for (size_t i = 0; i < w_.usage.size() / size; ++i)
      numbers.push_back(load_number(w_.arithmetic, &w_.usage[i * size]));
    return numbers;
  }

  AttendedKey key(int64_t b, int64_t kv, int region, int64_t t, int64_t n) {
    AttendedKey made;
    const int64_t e = w_.entry(region, n);
    for (int64_t d = 0; d < w_.head_dim; ++d)
      made.key.push_back(w_.ring(region, 0).get(b, kv, e, d));
    for (int64_t d = 0; d < w_.value_dim; ++d)
      made.value.push_back(w_.ring(region, 1).get(b, kv, e, d));
    made.distance = double(query_clock(w_.clock, region, t)) - key_clock(w_.clock, region, n);
    if (region != kCompressed) return made;
    const int64_t slot = (w_.held[b] * w_.kv_heads + kv) * w_.ring(kCompressed, 0).capacity + e;
    if (w_.has_mass) made.mass = w_.mass[slot];
    if (w_.kind == CompressorKind::kMostUsed && w_.clock.token_distance)
      made.distance = double(t - w_.slot_positions[slot]);
    return made;
  }

  void check_row(const Block& block, int64_t b, std::vector<double> usage) {
    const Storage s = w_.storage;
    // mma rounds rotated queries and weights to the storage's type.
    const double error = s == Storage::kFloat64   ? 1e-11
                         : s == Storage::kFloat32 ? 2e-5
                         : s == Storage::kFloat16 ? 3e-3
                                                  : 2e-2;
    for (int64_t i = block.offset; i < block.offset + block.tokens; ++i) {
      const int64_t t = i < w_.lengths[b] ? w_.origin[b] + i : -1;
      for (int64_t h = 0; h < w_.heads(); ++h) {
        const int64_t kv = h / w_.q_per_kv;
        const auto z = law_.relative_dim > 0 ? law_.relative.row(b, h, i) : std::vector<double>{};
        const auto zc =
            law_.relative_dim > 0 ? law_.compressed_relative.row(b, h, i) : std::vector<double>{};
        const Attended expected =
            attend_one(w_, law_, t, h, q_.row(b, h, i), z, zc, [&](int region, int64_t n) {
              return key(b, kv, region, t, n);
            });
        for (int64_t d = 0; d < w_.value_dim; ++d)
          EXPECT(std::abs(out_.get(b, h, i, d) - expected.out[d]) <=
                 error * expected.size * expected.steep);
        for (int region = 0; region < kRegions && asks_weights_; ++region) {
          const int64_t at = ((b * w_.heads() + h) * w_.tokens + i) * kRegions + region;
          const double got =
              load_number(w_.arithmetic, &weights_[at * cuda::size_of(w_.arithmetic)]);
          EXPECT(std::abs(got - expected.weights[region]) <= error * expected.steep);
        }
        if (usage.empty() || t < 0) continue;
        const int64_t first = visible(w_.clock.schedule, t)[kWindow].begin;
        for (size_t j = 0; j < expected.window.size(); ++j)
          usage[(w_.held[b] * w_.kv_heads + kv) * w_.ring(kWindow, 0).capacity +
                w_.entry(kWindow, first + int64_t(j))] += expected.window[j] / double(w_.q_per_kv);
      }
    }
    const auto got = usage_numbers();
    const size_t row = usage.size() / w_.memory_rows;
    for (size_t j = w_.held[b] * row; j < (w_.held[b] + 1) * row; ++j)
      EXPECT(std::abs(got[j] - usage[j]) <= error * double(block.tokens) || usage[j] != usage[j]);
  }

  Random& random_;
  World w_;
  ScoreLaw law_;
  Rows q_, k_, v_, out_;
  Buffer<char> weights_;
  bool asks_weights_ = false, damaged_ = false;
};

}  // namespace
}  // namespace ctx::test

int main(int argc, char** argv) {
  using namespace ctx;
  using namespace ctx::test;
  const int failed = run_cases("attend", Asked(argc, argv, 120), [](Random& random, int64_t i) {
    Wish wish{.small = i % 3 != 0, .kind = static_cast<int>(i % 6)};
    if (!wish.small) {
      wish.storage = static_cast<int>(i / 3 % 2 == 0 ? Storage::kBFloat16 : Storage::kFloat16);
      wish.q_per_kv = 1 + i % 8;
    }
    AttendTest(random, wish).run();
    if (i % 5 == 0) AttendTest(random, wish).run_damaged();
  });
  std::printf("%lld launches by mma\n", static_cast<long long>(tiled_by_mma));
  return failed;
}
