// Row operations over the states of several layers on one clock, without a KVMemory around them.
#include <algorithm>

#include "check.h"
#include "streams.h"

namespace {

using at::Tensor;
using ctx::KVMemory;
using ctx::LayerShape;
using ctx::test::kBatch;
using ctx::test::numbers;
using ctx::test::options;
using ctx::test::same;
using ctx::test::Tokens;
namespace rows = ctx::rows;
using rows::State;

constexpr const char* kWhere = "test";
constexpr size_t kRings = 9;

LayerShape shape(int64_t compressed = 3) {
  const auto made = options();
  LayerShape layer{
      made.attention.schedule, made.kv_heads, made.head_dim, made.value_dim, made.max_rewind};
  layer.schedule.compressed = compressed;
  return layer;
}

const std::vector<LayerShape>& shapes() {
  static const std::vector<LayerShape> made{shape(), shape(4)};
  return made;
}

// Two layers of different sizes that hold 61 tokens of two rows.
State state() {
  State made;
  for (const LayerShape& layer : shapes()) {
    auto chosen = options("mean");
    chosen.attention.schedule.compressed = layer.schedule.compressed;
    KVMemory memory(chosen);
    ctx::test::step(memory, Tokens(0, 61));
    const auto& tensors = memory.tensors();
    if (!made.empty()) made.resize(kRings);
    made.insert(made.end(), tensors.begin(), tensors.end());
  }
  return made;
}

bool same_state(const State& one, const State& other) {
  return one.size() == other.size() &&
         std::equal(one.begin(), one.end(), other.begin(), [](const Tensor& a, const Tensor& b) {
           return same(a, b);
         });
}

Tensor integers(std::initializer_list<int64_t> values) {
  return at::tensor(at::ArrayRef<int64_t>(values.begin(), values.size()));
}

State clone(const State& held) { return rows::to(held, {}, {}, {}, kWhere); }

// Names, dtypes and sizes say the same as tensors do.
void test_layout() {
  EXPECT(rows::names().size() == kRings + 2 && rows::names().back() == "rewindable");
  for (const at::ScalarType slots : rows::slot_types(at::kBFloat16)) {
    const State made = rows::empty(shape(), 3, at::kBFloat16, slots, at::kCPU);
    const auto types = rows::types(at::kBFloat16, slots);
    const auto sizes = shape().sizes(3, slots);
    for (size_t i = 0; i < made.size(); ++i) {
      EXPECT(made[i].scalar_type() == types[i] && made[i].eq(0).all().item<bool>());
      EXPECT(made[i].sizes() == at::IntArrayRef(sizes[i]));
    }
    rows::check(made, {shape()}, kWhere);
  }
  EXPECT(rows::slot_types(at::kDouble) == std::vector<at::ScalarType>{at::kDouble});
}

void test_check() {
  const State held = state();
  rows::check(held, shapes(), kWhere);
  const auto refused = [&](size_t place, const Tensor& x) {
    State wrong = held;
    wrong[place] = x;
    rows::check(wrong, shapes(), kWhere);
  };
  EXPECT_THROWS(
      c10::ValueError, "test: memory must be 20 tensors", rows::check({held[0]}, shapes(), kWhere));
  EXPECT_THROWS(c10::ValueError,
                "test: memory[1]: window_keys must be [2, 2, 17, 6], got [1, 2, 17, 6]",
                refused(kRings, held[kRings].narrow(0, 0, 1)));
  EXPECT_THROWS(c10::TypeError,
                "test: memory[0]: window_values must be float32, got float64",
                refused(1, held[1].to(at::kDouble)));
  EXPECT_THROWS(c10::TypeError,
                "test: memory[0]: seen must be int64, got int32",
                refused(2 * kRings, held[2 * kRings].to(at::kInt)));
  EXPECT_THROWS(c10::ValueError,
                "test: memory[0]: window_values must be on cpu, got meta",
                refused(1, held[1].to(at::kMeta)));
  EXPECT_THROWS(c10::ValueError,
                "test: memory[0]: seen must be contiguous, got strides (0,)",
                refused(2 * kRings, held[2 * kRings].narrow(0, 0, 1).expand({kBatch})));
  EXPECT_THROWS(c10::ValueError,
                "test: memory must have tensors of its own for every layer, got window_keys of "
                "layer 0 as window_keys of layer 1",
                refused(kRings, held[0]));
}

void test_check_clock() {
  const auto refused = [](std::initializer_list<int64_t> seen,
                          std::initializer_list<int64_t> back) {
    rows::check_clock(integers(seen), integers(back), 7, kWhere);
  };
  refused({0, 61}, {0, 7});
  EXPECT_THROWS(c10::ValueError, "test: seen must be between 0 and", refused({0, -1}, {0, 0}));
  EXPECT_THROWS(c10::ValueError, "test: rewindable must be between 0 and 3", refused({3}, {4}));
  EXPECT_THROWS(c10::ValueError, "test: rewindable must be between 0 and 7", refused({9}, {8}));
  EXPECT_THROWS(
      c10::ValueError, "test: memory must be what a call left", refused({9}, {rows::kOpen}));
}

void test_reset_and_rewind() {
  const State held = clone(state());
  const Tensor &seen = held[2 * kRings], &back = held[2 * kRings + 1];
  rows::rewind(held, integers({0, 5}), kWhere);
  EXPECT(same(seen, integers({61, 56})) && same(back, integers({7, 2})));
  EXPECT_THROWS(c10::ValueError,
                "test: tokens must be between 0 and what row 1 can take back = 2, got 3",
                rows::rewind(held, integers({0, 3}), kWhere));
  EXPECT_THROWS(
      c10::ValueError, "test: tokens must be [B] = [2]", rows::rewind(held, integers({0}), kWhere));
  EXPECT_THROWS(c10::IndexError,
                "test: rows must be between 0 and B - 1 = 1, got 2",
                rows::reset(seen, back, integers({0, 2}), kWhere));
  rows::rewind(held, back, kWhere);  // the memory's own counter
  EXPECT(same(seen, integers({54, 54})) && same(back, integers({0, 0})));
  rows::reset(seen, back, integers({1}), kWhere);
  EXPECT(same(seen, integers({54, 0})));
  rows::reset(seen, back, integers({1, 0}).to(at::kBool), kWhere);
  EXPECT(same(seen, integers({0, 0})));
  State counted = held;
  counted[kRings + 6] = at::zeros({kBatch, 2, 17});
  EXPECT_THROWS(c10::ValueError,
                "test: compressor must be one whose slots follow from the tokens alone",
                rows::rewind(counted, integers({0, 0}), kWhere));
}

void test_select_and_merge() {
  const State held = state();
  const State second = rows::select(held, integers({1}), kWhere);
  EXPECT(same_state(second, rows::select(held, integers({0, 1}).to(at::kBool), kWhere)));
  State both = rows::select(held, integers({0}), kWhere);
  both.insert(both.end(), second.begin(), second.end());
  EXPECT(same_state(rows::merge(both, 2, kWhere), held));
  EXPECT_THROWS(c10::ValueError,
                "test: rows must be at least one",
                rows::select(held, integers({0, 0}).to(at::kBool), kWhere));
  State other = held;
  const State wide = rows::to(held, at::kDouble, {}, {}, kWhere);
  other.insert(other.end(), wide.begin(), wide.end());
  EXPECT_THROWS(c10::ValueError,
                "test: window_keys must be [B, 2, 17, 6] torch.float32 on cpu, got [B, 2, 17, 6] "
                "torch.float64 on cpu",
                rows::merge(other, 2, kWhere));
  EXPECT_THROWS(c10::ValueError, "test: window_keys must be", rows::copy(held, wide, kWhere));
  EXPECT_THROWS(c10::ValueError, "test: memories must be at least one", rows::merge({}, 0, kWhere));
}

void test_to() {
  const State held = state();
  const State copied = clone(held);
  EXPECT(same_state(copied, held) && copied[0].data_ptr() != held[0].data_ptr());
  const State narrow = rows::to(held, at::kBFloat16, at::kFloat, {}, kWhere);
  EXPECT(narrow[0].scalar_type() == at::kBFloat16 && narrow[2].scalar_type() == at::kFloat);
  const State half = rows::to(narrow, at::kHalf, {}, {}, kWhere);  // slots stay as they are
  EXPECT(half[0].scalar_type() == at::kHalf && same(half[2], held[2]));
  const State wide = rows::to(half, at::kDouble, {}, {}, kWhere);
  EXPECT(wide[2].scalar_type() == at::kDouble && wide[6].scalar_type() == at::kDouble);
  EXPECT(rows::to(held, {}, {}, at::kMeta, kWhere)[2 * kRings].is_meta());
  EXPECT_THROWS(
      c10::TypeError, "test: dtype must be float32", rows::to(held, at::kInt, {}, {}, kWhere));
  State into = clone(held);
  for (const Tensor& x : into) x.zero_();
  rows::copy(into, held, kWhere);
  EXPECT(same_state(into, held));
}

// A layer of four slots becomes what one of three held from the start.
void test_resized() {
  const State held = state();
  const State made = rows::resized(held, shapes(), {shape(), shape(3)}, kWhere);
  for (size_t i = 0; i < kRings; ++i)
    EXPECT(same(made[i], held[i]) && same(made[kRings + i], held[i]));
  EXPECT(same(made[2 * kRings], held[2 * kRings]));
  EXPECT(same(made[2 * kRings + 1], held[2 * kRings + 1]));
  EXPECT_THROWS(c10::ValueError,
                "test: compressed must be at most 3 in row 0",
                rows::resized(held, shapes(), {shape(9), shape(4)}, kWhere));
  LayerShape other = shape(4);
  other.schedule.ratio = 3;
  EXPECT_THROWS(c10::ValueError,
                "test: ratio must stay as it is = 2, got 3",
                rows::resized(held, shapes(), {shape(), other}, kWhere));
}

// What is made in inference mode can be used outside of it, and written in both.
void test_inference_mode() {
  State made;
  {
    const c10::InferenceMode inference;
    made = rows::empty(shape(), kBatch, at::kFloat, at::kFloat, at::kCPU);
    const State copied = rows::select(clone(made), integers({0, 1}), kWhere);
    for (const State& one : {made, copied})
      EXPECT(
          std::none_of(one.begin(), one.end(), [](const Tensor& x) { return x.is_inference(); }));
  }
  const State kept = [] {
    const c10::InferenceMode inference;
    return State{at::zeros({kBatch}, at::kLong), at::zeros({kBatch}, at::kLong)};
  }();
  rows::reset(kept[0], kept[1], {}, kWhere);
}

}  // namespace

int main() {
  test_layout();
  test_check();
  test_check_clock();
  test_reset_and_rewind();
  test_select_and_merge();
  test_to();
  test_resized();
  test_inference_mode();
  return ctx::test::status();
}
