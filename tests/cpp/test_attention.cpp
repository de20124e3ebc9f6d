// compressive_attention: the numbers of streaming, and gradients against differences.
#include <c10/core/GradMode.h>
#include <torch/csrc/autograd/autograd.h>

#include "check.h"
#include "ctx/attention.h"
#include "streams.h"

namespace {

using at::Tensor;
using ctx::KVMemory;
using ctx::MemoryOptions;
using ctx::test::options;
using ctx::test::step;
using ctx::test::Tokens;

std::vector<Tensor> tensors(const KVMemory& memory) {
  return {memory.tensors().begin(), memory.tensors().end()};
}

// What the memory attends to, as a pure function of the tokens.
Tensor attend(const KVMemory& memory, const Tokens& x) {
  const MemoryOptions& o = memory.options();
  return ctx::compressive_attention(
      x.q, x.k, x.v, tensors(memory), o.compressor, o.compressed_bias, o.attention);
}

MemoryOptions wide(const char* compressor) {
  MemoryOptions made = options(compressor, at::kDouble);
  for (Tensor& parameter : made.compressor.parameters) {
    parameter = parameter.to(at::kDouble) + 0.1 * ctx::test::numbers(parameter.sizes(), 9);
  }
  made.compressed_bias = ctx::test::numbers({ctx::test::kHeads}, 8);
  return made;
}

void test_like_streaming() {
  for (const char* compressor : {"mean", "max", "conv", "dilated", "gated", "most_used"}) {
    KVMemory memory(wide(compressor));
    for (int64_t first = 0; first < 60; first += 20) {
      const Tokens x(first, 20, at::kDouble);
      const KVMemory before = memory.clone();
      const Tensor out = attend(memory, x);
      EXPECT(ctx::test::same(memory, before));
      EXPECT(at::allclose(out, step(memory, x), 1e-12, 1e-12));
    }
  }
}

// d loss / d x along a direction, by the graph and by a difference.
void test_gradients() {
  for (const char* compressor : {"mean", "conv", "dilated", "gated", "most_used"}) {
    MemoryOptions made = wide(compressor);
    KVMemory memory(made);
    step(memory, Tokens(0, 21, at::kDouble));
    const Tokens x(21, 25, at::kDouble);
    std::vector<Tensor> leaves = {x.q, x.k, x.v, *made.compressed_bias};
    const auto& parameters = made.compressor.parameters;
    leaves.insert(leaves.end(), parameters.begin(), parameters.end());
    const auto loss = [&](const std::vector<Tensor>& at) {
      ctx::Compressor used{made.compressor.name, {at.begin() + 4, at.end()}};
      const Tensor out = ctx::compressive_attention(
          at[0], at[1], at[2], tensors(memory), used, at[3], made.attention);
      return (out * ctx::test::numbers(out.sizes(), 7)).sum();
    };
    for (size_t i = 0; i < leaves.size(); ++i) {
      if (leaves[i].numel() == 0) continue;  // layers that this ratio does not need
      std::vector<Tensor> used;
      for (const Tensor& leaf : leaves) used.push_back(leaf.clone());
      used[i].requires_grad_();
      loss(used).backward();
      const Tensor way = ctx::test::numbers(leaves[i].sizes(), 6);
      const double slope = (used[i].grad() * way).sum().item<double>();
      constexpr double small = 1e-5;
      const c10::AutoGradMode no_grad(false);
      std::vector<Tensor> up = used, down = used;
      up[i] = leaves[i] + small * way;
      down[i] = leaves[i] - small * way;
      const double difference = (loss(up) - loss(down)).item<double>() / (2 * small);
      EXPECT(slope != 0.0 && std::abs(slope - difference) < 1e-6 * std::max(1.0, std::abs(slope)));
    }
  }
}

// The gradient of a gradient's square, by the graph and by a difference.
void test_second_derivatives() {
  for (const char* position : {"rotary", "relative", "alibi"}) {
    const MemoryOptions made = ctx::test::options_at(position, at::kDouble);
    KVMemory memory(made);
    step(memory, Tokens(0, 21, at::kDouble));
    const Tokens x(21, 9, at::kDouble);
    const auto penalty = [&](const Tensor& k) {
      const Tensor out = ctx::compressive_attention(
          x.q, k, x.v, tensors(memory), made.compressor, made.compressed_bias, made.attention);
      return torch::autograd::grad({out.sin().sum()}, {k}, {}, true, true)[0].square().sum();
    };
    const Tensor k = x.k.clone().requires_grad_();
    const Tensor way = ctx::test::numbers(k.sizes(), 6);
    const Tensor gradient = torch::autograd::grad({penalty(k)}, {k})[0];
    const double slope = (gradient * way).sum().item<double>();
    constexpr double small = 1e-5;
    const auto at = [&](double step) {
      return penalty((x.k + step * way).detach().requires_grad_()).item<double>();
    };
    const double difference = (at(small) - at(-small)) / (2 * small);
    EXPECT(slope != 0.0 && std::abs(slope - difference) < 1e-6 * std::max(1.0, std::abs(slope)));
  }
}

// A stream goes on before the backward of what attended to it.
void test_backward_after_the_memory_went_on() {
  const auto gradient = [](bool goes_on) {
    KVMemory memory(wide("conv"));
    step(memory, Tokens(0, 21, at::kDouble));
    Tokens x(21, 25, at::kDouble);
    x.q.requires_grad_();
    const Tensor out = attend(memory, x);
    if (goes_on) {
      const c10::AutoGradMode no_grad(false);
      step(memory, Tokens(21, 25, at::kDouble));
    }
    out.sum().backward();
    return x.q.grad();
  };
  EXPECT(at::equal(gradient(false), gradient(true)));
}

// A kernel that reads left of its groups: past the start, sinks, and what an earlier call brought.
void test_overlap() {
  MemoryOptions made = wide("conv");
  made.compressor = ctx::Compressor::make("conv",
                                          ctx::test::kKvHeads,
                                          2,
                                          ctx::test::kHeadDim,
                                          ctx::test::kValueDim,
                                          at::kDouble,
                                          /*kernel=*/7);
  for (Tensor& parameter : made.compressor.parameters)
    parameter = parameter + 0.1 * ctx::test::numbers(parameter.sizes(), 9);
  EXPECT(made.compressor.reads_left(2) == 5);
  KVMemory memory(made), whole(made);
  const Tensor expected = step(whole, Tokens(0, 60, at::kDouble));
  for (int64_t first = 0; first < 60; first += 20) {
    const Tokens x(first, 20, at::kDouble);
    const Tensor out = attend(memory, x);
    EXPECT(at::allclose(out, expected.narrow(2, first, 20), 1e-12, 1e-12));
    EXPECT(at::allclose(step(memory, x), out, 1e-12, 1e-12));
  }
  made.compressor.parameters[0] = made.compressor.parameters[0].narrow(1, 0, 6);
  EXPECT_THROWS(c10::ValueError, "ctx.KVMemory: value_weight must", KVMemory{made});
  EXPECT_THROWS(c10::ValueError,
                "ctx.Compressor.make: kernel must",
                ctx::Compressor::make("conv", 1, 4, 2, 2, {}, /*kernel=*/3));
}

// Other schemes: the same numbers as a stream's, and gradients reach all that relative positions
// are made of.
void test_positions() {
  for (const char* position : {"alibi", "relative", "none"}) {
    MemoryOptions made = ctx::test::options_at(position, at::kDouble);
    for (Tensor& parameter : made.compressor.parameters) parameter = parameter.to(at::kDouble);
    for (Tensor& operand : made.attention.relative) operand.requires_grad_();
    const Tokens x(0, 40, at::kDouble), first(0, 17, at::kDouble), second(17, 23, at::kDouble);
    KVMemory memory(made);
    const Tensor out = step(memory, x);
    memory.reset();
    step(memory, first);
    const Tensor again = ctx::compressive_attention(second.q,
                                                    second.k,
                                                    second.v,
                                                    tensors(memory),
                                                    made.compressor,
                                                    std::nullopt,
                                                    made.attention);
    EXPECT(!out.requires_grad() && at::allclose(again, out.narrow(2, 17, 23), 1e-12, 1e-12));
    if (made.attention.relative.empty()) continue;
    again.square().sum().backward();
    for (const Tensor& operand : made.attention.relative) {
      EXPECT(operand.grad().defined() && operand.grad().abs().sum().item<double>() > 0);
    }
  }
}

void test_constant_slots() {
  MemoryOptions made = wide("conv");
  for (Tensor& parameter : made.compressor.parameters) parameter.requires_grad_();
  const Tokens x(0, 40, at::kDouble);
  x.k.requires_grad_();
  const Tensor out = ctx::compressive_attention(
      x.q, x.k, x.v, {}, made.compressor, made.compressed_bias, made.attention, true);
  out.sum().backward();
  EXPECT(x.k.grad().defined() && !made.compressor.parameters[0].grad().defined());
}

void test_bad_input() {
  const MemoryOptions made = wide("conv");
  const Tokens x(0, 5, at::kDouble);
  const auto call = [&](const Tensor& q, const Tensor& k, const Tensor& v) {
    return ctx::compressive_attention(q, k, v, {}, made.compressor, std::nullopt, made.attention);
  };
  EXPECT_THROWS(
      c10::ValueError, "ctx.compressive_attention: q must be [B, H, T, D]", call(x.q[0], x.k, x.v));
  EXPECT_THROWS(c10::ValueError, "ctx.evicted_groups: v must", call(x.q, x.k, x.v.narrow(2, 0, 4)));
  EXPECT_THROWS(c10::TypeError, "ctx.evicted_groups: v must", call(x.q, x.k, x.v.to(at::kFloat)));
  EXPECT_THROWS(
      c10::ValueError, "ctx.compressive_attention: q must", call(x.q.narrow(2, 0, 3), x.k, x.v));
}

}  // namespace

int main() {
  test_like_streaming();
  test_gradients();
  test_second_derivatives();
  test_backward_after_the_memory_went_on();
  test_overlap();
  test_positions();
  test_constant_slots();
  test_bad_input();
  return ctx::test::status();
}
