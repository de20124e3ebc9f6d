// The kernels that write a memory (append, compress, choose) and rotate, against float64 loops, for random
// laws, sizes, types and ragged calls: what must be written is, and nothing else changes.
//
//   test_memory [cases] [first case] [bug]
#include "kernels/cuda/append.cuh"
#include "kernels/cuda/compress_launch.cuh"
#include "kernels/cuda/rotary_kernel.cuh"
#include "slots_reference.h"

namespace ctx::test {
namespace {

class MemoryTest {
 public:
  MemoryTest(Random& random, int kind) : random_(random), w_(random, Wish{.kind = kind}) {
    k_scale_ = random.coin() ? 1.0 : 3.0;
  }

  void run() {
    const int64_t calls = random_.between(3, 8);
    for (int64_t call = 0; call < calls; ++call) {
      w_.next_call();
      k_.make(random_, w_.storage, w_.batch, w_.kv_heads, w_.tokens, w_.head_dim);
      v_.make(random_, w_.storage, w_.batch, w_.kv_heads, w_.tokens, w_.value_dim);
      k_.fill(random_, k_scale_), v_.fill(random_, 1.0);
      const std::vector<int64_t> cuts =
          w_.kind == CompressorKind::kMostUsed ? w_.cuts() : std::vector<int64_t>{0, w_.tokens};
      for (size_t i = 0; i + 1 < cuts.size(); ++i) run_block(cuts[i], cuts[i + 1]);
      w_.end_call();
    }
  }

 private:
  void run_block(int64_t begin, int64_t end) {
    begin_ = begin, end_ = end;
    in_order(random_);
    remember();
    AppendArgs append;
    append.memory = w_.view(), append.block = w_.block(begin, end);
    append.keys = k_.strided(), append.values = v_.strided();
    cuda::append(append, nullptr);
    w_.fetch();
    check_append();
    invent_usage();
    remember();
    CompressArgs compress;
    compress.memory = w_.view(), compress.block = w_.block(begin, end);
    compress.kind = w_.kind, compress.wide_parameters = w_.wide_parameters;
    for (int i = 0; i < 6; ++i)
      compress.parameters[i] = w_.parameters[i].size() > 0 ? w_.parameters[i].device() : nullptr;
    give_slots(compress);
    Buffer<char> workspace(cuda::compress_workspace(compress));
    in_order(random_);
    cuda::compress(compress, workspace.device(), nullptr);
    w_.fetch();
    given_chosen_.fetch(), given_positions_.fetch();
    check_compress();
  }

  void remember() {
    for (int i = 0; i < 6; ++i)
      before_[i].assign(w_.rings[i].bytes.host(),
                        w_.rings[i].bytes.host() + w_.rings[i].bytes.size());
    mass_before_.clear();
    for (size_t i = 0; i < w_.mass.size(); ++i) mass_before_.push_back(w_.mass[i]);
    touched_.assign(6, {});
    for (int i = 0; i < 6; ++i)
      touched_[i].assign(w_.memory_rows * w_.kv_heads * w_.rings[i].capacity, false);
  }

  // Row `entry` of head h of a ring must be `expected`, and is accounted for.
  void expect_row(int region,
                  int side,
                  int64_t b,
                  int64_t h,
                  int64_t entry,
                  const std::vector<double>& expected,
                  double error) {
    const Ring& ring = w_.ring(region, side);
    touched_[2 * region + side][(w_.held[b] * w_.kv_heads + h) * ring.capacity + entry] = true;
    double largest = 0;
    for (const double x : expected) largest = std::max(largest, std::abs(x));
    if (ring.storage == Storage::kInt8) {
      const double scale = load_number(Storage::kFloat32, ring.row(b, h, entry) + ring.width);
      EXPECT(std::abs(scale - largest / 127) <= 1e-5 * largest + error);
    }
    for (int64_t d = 0; d < ring.width; ++d) {
      const double bound = ring.storage == Storage::kInt8
                               ? error + 0.502 * largest / 127
                               : rounding(ring.storage, expected[d], error * (1 + largest));
      EXPECT(std::abs(ring.get(b, h, entry, d) - expected[d]) <= bound);
    }
  }

  void expect_nothing_else() {
    for (int i = 0; i < 6; ++i) {
      const Ring& ring = w_.rings[i];
      for (size_t r = 0; r < touched_[i].size(); ++r) {
        const size_t bytes = ring.row_bytes();
        EXPECT(touched_[i][r] ||
               std::memcmp(&ring.bytes[r * bytes], before_[i].data() + r * bytes, bytes) == 0);
      }
    }
  }

  void check_append() {
    for (int64_t b = 0; b < w_.batch; ++b) {
      for (int64_t i = begin_; i < std::min(end_, w_.lengths[b]); ++i) {
        const int64_t t = w_.origin[b] + i;
        if (t < 0) continue;
        const int region = t < w_.clock.schedule.sinks ? kSinks : kWindow;
        for (int64_t h = 0; h < w_.kv_heads; ++h) {
          std::vector<double> key = k_.row(b, h, i);
          if (!w_.keys_rotated) key = w_.rotated(key, static_cast<double>(t));
          const int64_t entry = w_.entry(region, t);
          expect_row(region, 0, b, h, entry, key, arithmetic_error(w_.storage));
          expect_row(region, 1, b, h, entry, v_.row(b, h, i), 0);
          if (w_.kind == CompressorKind::kMostUsed && region == kWindow)
            EXPECT(used(b, h, entry) == 0.0);
        }
      }
    }
    expect_nothing_else();
  }

  char* usage(int64_t b, int64_t h, int64_t entry) {
    return &w_.usage[((w_.held[b] * w_.kv_heads + h) * w_.ring(kWindow, 0).capacity + entry) *
                     cuda::size_of(w_.arithmetic)];
  }
  double used(int64_t b, int64_t h, int64_t entry) {
    return load_number(w_.arithmetic, usage(b, h, entry));
  }

  // As attention would have counted; with equals, and one that is not a number.
  void invent_usage() {
    if (w_.kind != CompressorKind::kMostUsed) return;
    for (int64_t b = 0; b < w_.batch; ++b)
      for (int64_t h = 0; h < w_.kv_heads; ++h)
        for (int64_t i = 0; i < w_.ring(kWindow, 0).capacity; ++i)
          store_number(w_.arithmetic,
                       usage(b, h, i),
                       random_.one_in(20) ? std::nan("") : double(random_.between(0, 6)) / 8);
  }

  void give_slots(CompressArgs& args) {
    const int64_t blocks = 3 + (w_.headroom + w_.clock.schedule.segment) / w_.clock.schedule.ratio;
    args.slots = blocks;
    slot_block_.assign(w_.batch, 0);
    for (int64_t b = 0; b < w_.batch; ++b) {
      const int64_t first = w_.clock.schedule.groups(w_.origin[b] + begin_ - 1);
      slot_block_[b] = w_.clock.schedule.block_of(-w_.origin[b], first) - random_.between(0, 1);
    }
    args.slot_block = slot_block_.device();
    const size_t all = w_.batch * w_.kv_heads * blocks;
    given_chosen_.assign(all, -9), given_positions_.assign(all, -9);
    if (w_.kind == CompressorKind::kMostUsed && random_.coin()) {
      args.chosen = given_chosen_.device();
      args.chosen_positions = given_positions_.device();
    }
    if (w_.kind != CompressorKind::kGiven) return;
    given_keys_.make(random_, w_.arithmetic, w_.batch, w_.kv_heads, blocks, w_.head_dim);
    given_values_.make(random_, w_.arithmetic, w_.batch, w_.kv_heads, blocks, w_.value_dim);
    given_keys_.fill(random_, 2.0), given_values_.fill(random_, 2.0);
    args.slot_keys = given_keys_.strided(), args.slot_values = given_values_.strided();
    given_mass_.assign(w_.arithmetic, all, 0.0);
    for (size_t i = 0; i < all; ++i) given_mass_.set(i, random_.number());
    gives_mass_ = random_.coin();
    if (gives_mass_) args.given_mass = given_mass_.device();
  }

  void check_compress() {
    const Schedule& s = w_.clock.schedule;
    const int64_t capacity = w_.ring(kCompressed, 0).capacity;
    for (int64_t b = 0; b < w_.batch; ++b) {
      const int64_t count = std::min(end_, w_.lengths[b]) - begin_;
      if (count <= 0) continue;
      const int64_t begun = s.groups(w_.origin[b] + begin_ - 1);
      const int64_t last = s.groups(w_.origin[b] + begin_ + count - 1);
      for (int64_t h = 0; h < w_.kv_heads; ++h) {
        if (w_.kind == CompressorKind::kMostUsed && begun < last) check_chosen(b, h, begun, last);
        for (int64_t g = std::max(begun, last - capacity); g < last; ++g)
          if (w_.kind != CompressorKind::kMostUsed) expect_slot(b, h, g, made(b, h, g));
      }
    }
    for (size_t i = 0; i < mass_before_.size(); ++i)
      EXPECT(!w_.has_mass || touched_[2 * kCompressed][i] || w_.mass[i] == mass_before_[i] ||
             (std::isnan(w_.mass[i]) && std::isnan(mass_before_[i])));
    expect_nothing_else();
  }

  Slot made(int64_t b, int64_t h, int64_t g) {
    if (w_.kind != CompressorKind::kGiven) return SlotsReference(w_).make(b, h, g);
    Slot slot;
    slot.mass = std::log(static_cast<double>(w_.clock.schedule.ratio));
    const int64_t place = w_.clock.schedule.block_of(-w_.origin[b], g) - slot_block_[b];
    slot.key = given_keys_.row(b, h, place), slot.value = given_values_.row(b, h, place);
    const int64_t blocks = static_cast<int64_t>(given_mass_.size()) / w_.batch / w_.kv_heads;
    if (gives_mass_) slot.mass = given_mass_[(b * w_.kv_heads + h) * blocks + place];
    return slot;
  }

  void expect_slot(int64_t b, int64_t h, int64_t g, const Slot& slot) {
    const int64_t entry = w_.entry(kCompressed, g);
    const double error = 8 * arithmetic_error(w_.storage);
    expect_row(kCompressed, 0, b, h, entry, w_.rotated(slot.key, w_.clock.group_key(g)), error);
    expect_row(kCompressed, 1, b, h, entry, slot.value, error);
    if (!w_.has_mass) return;
    const double mass =
        w_.mass[(w_.held[b] * w_.kv_heads + h) * w_.ring(kCompressed, 0).capacity + entry];
    EXPECT(std::abs(mass - slot.mass) < error);
  }

  void check_chosen(int64_t b, int64_t h, int64_t begun, int64_t last) {
    const Schedule& s = w_.clock.schedule;
    const int64_t c = s.ratio, capacity = w_.ring(kCompressed, 0).capacity;
    std::vector<std::pair<double, int64_t>> order;  // most used first, of equals the earlier
    for (int64_t t = s.first_token(begun); t < s.first_token(last); ++t) {
      const double value = used(b, h, w_.entry(kWindow, t));
      order.emplace_back(value == value ? -value : std::numeric_limits<double>::infinity(), t);
    }
    std::sort(order.begin(), order.end());
    std::vector<int64_t> stay;
    for (int64_t i = 0; i < last - begun; ++i) stay.push_back(order[i].second);
    std::sort(stay.begin(), stay.end());
    for (int64_t g = begun; g < last; ++g) {
      const int64_t t = stay[g - begun];
      check_reported(b, h, g, t, c);
      if (last - g > capacity) continue;
      Slot slot;
      const int64_t from = w_.entry(kWindow, t), entry = w_.entry(kCompressed, g);
      for (int64_t d = 0; d < w_.head_dim; ++d)
        slot.key.push_back(w_.ring(kWindow, 0).get(b, h, from, d));
      for (int64_t d = 0; d < w_.value_dim; ++d)
        slot.value.push_back(w_.ring(kWindow, 1).get(b, h, from, d));
      if (!w_.clock.token_distance)
        slot.key = w_.rotated(w_.rotated(slot.key, double(t), true), double(g));
      const double error = 4 * arithmetic_error(w_.storage);
      expect_row(kCompressed, 0, b, h, entry, slot.key, error);
      expect_row(kCompressed, 1, b, h, entry, slot.value, error);
      const int64_t place = (w_.held[b] * w_.kv_heads + h) * capacity + entry;
      EXPECT(w_.slot_positions[place] == t);
      EXPECT(!w_.has_mass || w_.mass[place] == 0.0);
    }
  }

  void check_reported(int64_t b, int64_t h, int64_t g, int64_t t, int64_t c) {
    const Schedule& s = w_.clock.schedule;
    const int64_t blocks = static_cast<int64_t>(given_chosen_.size()) / w_.batch / w_.kv_heads;
    const int64_t place = s.block_of(-w_.origin[b], g) - slot_block_[b];
    if (place < 0 || place >= blocks) return;
    const int64_t at = (b * w_.kv_heads + h) * blocks + place;
    if (given_chosen_[at] == -9) return;  // not asked for
    const int64_t group = s.block_of(-w_.origin[b], (t - s.sinks) / c) - slot_block_[b];
    EXPECT(given_chosen_[at] == group * c + (t - s.sinks) % c);
    EXPECT(given_positions_[at] == t);
  }

  Random& random_;
  World w_;
  double k_scale_;
  int64_t begin_ = 0, end_ = 0;
  Rows k_, v_, given_keys_, given_values_;
  WideNumbers given_mass_;
  Buffer<int64_t> slot_block_, given_chosen_, given_positions_;
  bool gives_mass_ = false;
  std::vector<char> before_[6];
  std::vector<double> mass_before_;
  std::vector<std::vector<bool>> touched_;
};

void rotate_case(Random& random) {
  World w(random, Wish{});
  const int64_t tokens = random.between(1, 6), heads = w.kv_heads;
  Rows in, out;
  in.make(random, w.storage, w.batch, heads, tokens, w.head_dim);
  out.make(random, w.storage, w.batch, heads, tokens, w.head_dim);
  in.fill(random, 1.0);
  Buffer<double> positions(size_t(w.batch * tokens), 0.0);
  for (size_t i = 0; i < positions.size(); ++i)
    positions[i] = static_cast<double>(random.between(0, 1 << 20)) / 2;
  RotateArgs args;
  args.rotary = w.rotary(), args.inverse = random.coin(), args.storage = w.storage;
  args.batch = w.batch, args.heads = heads, args.tokens = tokens, args.head_dim = w.head_dim;
  args.positions = positions.device(), args.in = in.strided(), args.out = out.strided();
  in_order(random);
  cuda::rotate(args, nullptr);
  out.fetch();
  for (int64_t b = 0; b < w.batch; ++b)
    for (int64_t h = 0; h < heads; ++h)
      for (int64_t t = 0; t < tokens; ++t) {
        const auto expected = w.rotated(in.row(b, h, t), positions[b * tokens + t], args.inverse);
        for (int64_t d = 0; d < w.head_dim; ++d)
          EXPECT(std::abs(out.get(b, h, t, d) - expected[d]) <=
                 rounding(w.storage, expected[d], w.storage == Storage::kFloat64 ? 1e-9 : 1e-6));
      }
}

}  // namespace
}  // namespace ctx::test

int main(int argc, char** argv) {
  using namespace ctx::test;
  return run_cases("memory", Asked(argc, argv, 210), [](Random& random, int64_t i) {
    rotate_case(random);
    MemoryTest(random, static_cast<int>(i % 7)).run();
  });
}
