// KVMemory through its C++ API: streams cut at will, rows, rewind, copies, and bad input.
#include <limits>

#include "check.h"
#include "ctx/memory.h"
#include "streams.h"

namespace {

using at::Tensor;
using ctx::KVMemory;
using ctx::test::kBatch;
using ctx::test::options;
using ctx::test::same;
using ctx::test::step;
using ctx::test::Tokens;

constexpr double kClose = 2e-6;  // of one computation cut differently

bool close(const Tensor& one, const Tensor& other) {
  return one.sizes() == other.sizes() && at::allclose(one, other, kClose, kClose);
}

Tensor integers(std::initializer_list<int64_t> values) {
  return at::tensor(at::ArrayRef<int64_t>(values.begin(), values.size()));
}

void test_cuts() {
  for (const char* compressor : {"mean", "max", "conv", "dilated", "gated"}) {
    KVMemory whole(options(compressor)), cut(options(compressor)), halves(options(compressor));
    const Tensor expected = step(whole, Tokens(0, 61));
    for (int64_t t = 0; t < 61; t += 3) {
      const int64_t n = std::min<int64_t>(3, 61 - t);
      const Tensor out = step(cut, Tokens(t, n));
      EXPECT(close(out, expected.narrow(2, t, n)));
      const Tokens x(t, n);
      halves.append(x.k, x.v);
      EXPECT(same(halves.attend(x.q), out));
    }
    EXPECT(same(whole.seen(), cut.seen()) && same(whole.rewindable(), cut.rewindable()));
    EXPECT(same(halves, cut));
    EXPECT(same(cut.seen(), integers({61, 61})));
  }
}

// Slots that are tokens: however a stream is cut; and what such a memory cannot do.
void test_most_used() {
  KVMemory whole(options("most_used")), cut(options("most_used"));
  const Tensor expected = step(whole, Tokens(0, 61));
  for (int64_t t = 0; t < 61; t += 3) {
    const int64_t n = std::min<int64_t>(3, 61 - t);
    EXPECT(close(step(cut, Tokens(t, n)), expected.narrow(2, t, n)));
  }
  const Tensor& usage = cut.tensors()[6];
  const Tensor& positions = cut.tensors()[7];
  EXPECT(same(positions, whole.tensors()[7]) && usage.gt(0).any().item<bool>());
  const Tensor slots = positions.narrow(2, 0, 3).to(at::kDouble);
  EXPECT(slots.ge(1).all().item<bool>() && slots.lt(61).all().item<bool>());
  const KVMemory before = cut.clone();
  const Tokens x(61, 3);
  EXPECT_THROWS(c10::ValueError,
                "ctx.KVMemory.append: compressor must be one that needs no queries",
                cut.append(x.k, x.v));
  EXPECT_THROWS(c10::ValueError, "ctx.KVMemory.rewind: compressor must", cut.rewind(1));
  EXPECT(cut.attend(Tokens(58, 3).q).sizes() == at::IntArrayRef({kBatch, 4, 3, 4}));
  EXPECT(same(cut, before));
}

void test_types() {
  for (at::ScalarType dtype : {at::kDouble, at::kBFloat16, at::kHalf}) {
    KVMemory memory(options("mean", dtype));
    const Tensor out = step(memory, Tokens(0, 30, dtype));
    EXPECT(out.scalar_type() == dtype && at::isfinite(out).all().item<bool>());
    EXPECT(memory.to(at::kFloat, at::kCPU).tensors()[0].scalar_type() == at::kFloat);
  }
}

void test_lengths() {
  KVMemory ragged(options()), first(options()), second(options());
  const Tokens x(0, 20);
  const Tensor out = ragged.step(x.q, x.k, x.v, integers({20, 13}));
  EXPECT(same(ragged.seen(), integers({20, 13})));
  EXPECT(close(out[0], step(first, x)[0]));
  EXPECT(close(out[1].narrow(1, 0, 13), step(second, Tokens(0, 13))[1]));
  EXPECT(out[1].narrow(1, 13, 7).eq(0).all().item<bool>());
}

void test_reset_at() {
  KVMemory packed(options()), fresh(options());
  const Tokens x(0, 20);
  Tensor reset_at = at::zeros({kBatch, 20}, at::kBool);
  reset_at[1][8] = true;
  const Tensor out = packed.step(x.q, x.k, x.v, std::nullopt, reset_at);
  EXPECT(same(packed.seen(), integers({20, 12})));
  EXPECT(close(out[1].narrow(1, 8, 12), step(fresh, Tokens(8, 12))[1]));
}

void test_reset() {
  KVMemory memory(options()), fresh(options());
  step(memory, Tokens(0, 33));
  memory.reset(integers({1}));
  EXPECT(same(memory.seen(), integers({33, 0})));
  EXPECT(close(step(memory, Tokens(0, 9))[1], step(fresh, Tokens(0, 9))[1]));
  memory.reset(integers({1, 0}).to(at::kBool));
  EXPECT(same(memory.seen(), integers({0, 9})));
  memory.reset();
  EXPECT(same(memory.seen(), integers({0, 0})) && same(memory.rewindable(), integers({0, 0})));
}

void test_rewind() {
  KVMemory memory(options());
  step(memory, Tokens(0, 30));
  const Tensor once = step(memory, Tokens(30, 7));
  memory.rewind(7);
  EXPECT(same(memory.seen(), integers({30, 30})));
  EXPECT(same(step(memory, Tokens(30, 7)), once));
  memory.rewind(integers({0, 2}));
  EXPECT(same(memory.seen(), integers({37, 35})) && same(memory.rewindable(), integers({7, 5})));
  EXPECT_THROWS(c10::ValueError,
                "ctx.KVMemory.rewind: tokens must be between 0 and what row 1 can take back = 5",
                memory.rewind(6));
  EXPECT_THROWS(c10::ValueError, "ctx.KVMemory.rewind: tokens must", memory.rewind(-1));
  EXPECT(same(memory.seen(), integers({37, 35})));
}

void test_select_merge_clone() {
  KVMemory memory(options());
  const Tokens x(0, 27);
  memory.step(x.q, x.k, x.v, integers({27, 14}));
  KVMemory swapped = memory.select(integers({1, 0, 1}));
  EXPECT(same(swapped.seen(), integers({14, 27, 14})) && swapped.options().batch_size == 3);
  KVMemory first = memory.select(integers({0}));
  KVMemory second = memory.select(integers({0, 1}).to(at::kBool));
  KVMemory merged = KVMemory::merge({&first, &second});
  EXPECT(same(merged, memory) && merged.options().batch_size == kBatch);
  KVMemory copy = memory.clone();
  const Tensor out = step(memory, Tokens(27, 9));
  EXPECT(same(out, step(merged, Tokens(27, 9))));
  EXPECT(!same(memory, copy) && same(copy.seen(), integers({27, 14})));
  EXPECT(same(out, step(copy, Tokens(27, 9))) && same(memory, copy));
  KVMemory moved = std::move(copy);
  EXPECT(same(memory, moved));
}

void test_positions() {
  const Tokens x(0, 40), late(36, 4);
  for (const char* position : {"rotary", "alibi", "relative", "none"}) {
    const ctx::MemoryOptions made = ctx::test::options_at(position);
    EXPECT(made.attention.position() == position);
    KVMemory whole(made), cut(made);
    const auto [out, region_weights] = whole.step_with_region_weights(x.q, x.k, x.v);
    EXPECT(region_weights.sizes() == at::IntArrayRef({kBatch, ctx::test::kHeads, 40, 3}));
    EXPECT(close(region_weights.sum(-1), at::ones_like(region_weights.select(-1, 0))));
    for (int64_t t = 0; t < 40; t += 4) {
      EXPECT(close(step(cut, Tokens(t, 4)), out.narrow(2, t, 4)));
    }
    const auto [again, same_weights] = cut.attend_with_region_weights(late.q);
    EXPECT(close(again, out.narrow(2, 36, 4)) &&
           close(same_weights, region_weights.narrow(2, 36, 4)));
    KVMemory copy = cut.clone();
    EXPECT(same(step(cut, Tokens(40, 3)), step(copy, Tokens(40, 3))));
    for (const char* other : {"rotary", "alibi", "relative", "none"}) {
      if (std::string(other) == position) continue;
      KVMemory foreign(ctx::test::options_at(other));
      EXPECT_THROWS(c10::ValueError,
                    "ctx.KVMemory.load_state_dict: position must be",
                    foreign.load_state_dict(whole.state_dict()));
      EXPECT_THROWS(c10::ValueError,
                    "ctx.KVMemory.merge: memories must have one position",
                    KVMemory::merge({&whole, &foreign}));
    }
  }
  KVMemory memory(ctx::test::options_at("relative"));
  std::vector<Tensor> changed = ctx::test::relative();
  changed[1] = changed[1] + 1;
  const Tensor before = step(memory, Tokens(0, 9));
  memory.reset();
  memory.set_relative(changed);
  EXPECT(!close(step(memory, Tokens(0, 9)), before));
  EXPECT_THROWS(c10::ValueError,
                "ctx.KVMemory.set_relative: relative must",
                KVMemory(options()).set_relative({}));
}

// A bias that takes the place of another, and one that is written to.
void test_compressed_bias() {
  const auto after = [](const auto& change) {
    ctx::MemoryOptions made = options();
    made.compressed_bias = at::zeros({ctx::test::kHeads});
    KVMemory memory(made);
    change(memory, *made.compressed_bias);
    return step(memory, Tokens(0, 40));
  };
  const Tensor closed = at::full({ctx::test::kHeads}, -3.0);
  const Tensor replaced =
      after([&](KVMemory& memory, Tensor&) { memory.set_compressed_bias(closed); });
  EXPECT(same(replaced, after([&](KVMemory&, Tensor& bias) { bias.fill_(-3.0); })));
  EXPECT(!close(replaced, after([](KVMemory&, Tensor&) {})));
  KVMemory memory(options());
  EXPECT_THROWS(c10::ValueError,
                "ctx.KVMemory: compressed_bias must be",
                memory.set_compressed_bias(at::zeros({3})));
}

// Tokens that lie in the memory's own rings are read as they were before the call.
void test_own_rings() {
  KVMemory memory(options("mean")), other(options("mean"));
  step(memory, Tokens(0, 20)), step(other, Tokens(0, 20));
  const Tokens x(20, 5);
  const Tensor k = memory.tensors()[0].narrow(2, 2, 5), v = memory.tensors()[1].narrow(2, 2, 5);
  const Tensor expected = other.step(x.q, k.clone(), v.clone());
  EXPECT(same(memory.step(x.q, k, v), expected) && same(memory, other));
}

void test_bad_options() {
  const auto make = [](const auto& change) {
    ctx::MemoryOptions changed = options();
    change(changed);
    KVMemory memory(changed);
  };
  using Options = ctx::MemoryOptions&;
  EXPECT_THROWS(
      c10::ValueError, "ctx.KVMemory: batch_size must", make([](Options o) { o.batch_size = 0; }));
  EXPECT_THROWS(
      c10::ValueError, "ctx.KVMemory: max_rewind must", make([](Options o) { o.max_rewind = -1; }));
  EXPECT_THROWS(c10::ValueError, "ctx.AttentionSettings: distance must", make([](Options o) {
                  o.attention.distance = "far";
                }));
  EXPECT_THROWS(c10::ValueError, "ctx.AttentionSettings: rotary_dim must", make([](Options o) {
                  o.attention.rotary_dim = 3;
                }));
  EXPECT_THROWS(c10::ValueError, "ctx.AttentionSettings: scale must", make([](Options o) {
                  o.attention.scale = std::numeric_limits<double>::quiet_NaN();
                }));
  EXPECT_THROWS(c10::ValueError,
                "ctx.AttentionSettings: position must be one of",
                make([](Options o) { o.attention.relative = ctx::test::relative(); }));
  EXPECT_THROWS(c10::ValueError,
                "ctx.AttentionSettings: position must be one of",
                make([](Options o) { o.attention.alibi_slopes = at::ones({4}); }));
  const auto place = [&](const char* position, const auto& change) {
    ctx::MemoryOptions changed = ctx::test::options_at(position);
    change(changed);
    KVMemory memory(changed);
  };
  EXPECT_THROWS(c10::ValueError,
                "ctx.KVMemory: alibi_slopes must be finite",
                place("alibi", [](Options o) { o.attention.alibi_slopes->div_(0); }));
  EXPECT_THROWS(c10::ValueError,
                "ctx.KVMemory: alibi_slopes must be [H]",
                place("alibi", [](Options o) { o.attention.alibi_slopes = at::ones({3}); }));
  EXPECT_THROWS(
      c10::TypeError,
      "ctx.KVMemory: alibi_slopes must be floating point",
      place("alibi", [](Options o) { o.attention.alibi_slopes = at::ones({4}, at::kLong); }));
  EXPECT_THROWS(c10::ValueError,
                "ctx.KVMemory: relative must be 0 or 5 tensors, got 4",
                place("relative", [](Options o) { o.attention.relative.pop_back(); }));
  EXPECT_THROWS(
      c10::ValueError,
      "ctx.KVMemory: relative position_weight must be [H, D, P] with an even P",
      place("relative", [](Options o) { o.attention.relative[2] = at::ones({4, 6, 7}); }));
  EXPECT_THROWS(c10::ValueError,
                "ctx.KVMemory: relative key_bias must be [H, D], H a multiple of 2",
                place("relative", [](Options o) { o.attention.relative[0] = Tensor(); }));
  EXPECT_THROWS(c10::ValueError, "ctx.Schedule: ratio must", make([](Options o) {
                  o.attention.schedule.ratio = 0;
                }));
  EXPECT_THROWS(c10::ValueError, "ctx.KVMemory: key_weight must", make([](Options o) {
                  o.compressor.parameters[0] = at::zeros({1});
                }));
  EXPECT_THROWS(c10::ValueError, "ctx.KVMemory: compressed_bias must", make([](Options o) {
                  o.compressed_bias = at::zeros({3});
                }));
  EXPECT_THROWS(
      c10::TypeError, "ctx.KVMemory: dtype must", make([](Options o) { o.dtype = at::kLong; }));
  EXPECT_THROWS(c10::ValueError, "ctx: device must", make([](Options o) {
                  o.device = at::kMeta;
                  for (Tensor& x : o.compressor.parameters) x = x.to(at::kMeta);
                }));
}

// Nothing is written before an error.
void test_bad_calls() {
  KVMemory memory(options());
  step(memory, Tokens(0, 30));
  const KVMemory before = memory.clone();
  const Tokens x(30, 3);
  EXPECT_THROWS(c10::ValueError, "ctx.KVMemory.step: q must", memory.step(x.q[0], x.k, x.v));
  EXPECT_THROWS(c10::ValueError, "ctx.KVMemory.step: k must", memory.step(x.q, x.q, x.v));
  EXPECT_THROWS(
      c10::TypeError, "ctx.KVMemory.step: v must", memory.step(x.q, x.k, x.v.to(at::kDouble)));
  EXPECT_THROWS(c10::ValueError,
                "ctx.KVMemory.step: lengths must",
                memory.step(x.q, x.k, x.v, integers({3, 4})));
  EXPECT_THROWS(c10::TypeError,
                "ctx.KVMemory.append: reset_at must",
                memory.append(x.k, x.v, std::nullopt, integers({0, 0})));
  EXPECT_THROWS(c10::ValueError, "ctx.KVMemory.attend: q must", memory.attend(Tokens(0, 8).q));
  EXPECT_THROWS(c10::IndexError, "ctx.KVMemory.reset: rows must", memory.reset(integers({2})));
  EXPECT_THROWS(c10::IndexError, "ctx.KVMemory.select: rows must", memory.select(integers({-1})));
  EXPECT_THROWS(c10::TypeError, "ctx.KVMemory.select: rows must", memory.select(at::zeros({1})));
  EXPECT_THROWS(
      c10::ValueError, "ctx.KVMemory.select: rows must", memory.select(at::zeros({0}, at::kLong)));
  EXPECT_THROWS(
      c10::ValueError, "ctx.KVMemory.merge: memories must be at least one", KVMemory::merge({}));
  ctx::MemoryOptions changed = options();
  changed.attention.schedule.sinks = 2;
  const KVMemory other(changed);
  EXPECT_THROWS(c10::ValueError,
                "ctx.KVMemory.merge: memories must have one sinks",
                KVMemory::merge({&memory, &other}));
  EXPECT_THROWS(
      c10::ValueError, "ctx.KVMemory: compressor \"conv\" must", memory.set_parameters({}));
  EXPECT(same(memory, before));
}

}  // namespace

int main() {
  test_cuts();
  test_most_used();
  test_types();
  test_lengths();
  test_reset_at();
  test_reset();
  test_rewind();
  test_select_merge_clone();
  test_positions();
  test_compressed_bias();
  test_own_rings();
  test_bad_options();
  test_bad_calls();
  return ctx::test::status();
}
