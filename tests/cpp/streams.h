// One memory and one stream that the C++ tests and tests/test_cpp.py make alike.
#pragma once

#include <ATen/ATen.h>

#include <cstring>
#include <string>
#include <vector>

#include "ctx/ctx.h"

namespace ctx::test {

constexpr int64_t kBatch = 2, kHeads = 4, kKvHeads = 2, kHeadDim = 6, kValueDim = 4;

inline MemoryOptions options(const std::string& compressor = "conv",
                             at::ScalarType dtype = at::kFloat) {
  MemoryOptions made;
  made.attention.schedule = {5, 3, 2, 4, 1};
  made.attention.rotary_dim = 4;
  made.batch_size = kBatch;
  made.kv_heads = kKvHeads;
  made.head_dim = kHeadDim;
  made.value_dim = kValueDim;
  made.compressor = Compressor::make(compressor, kKvHeads, 2, kHeadDim, kValueDim);
  made.max_rewind = 7;
  made.dtype = dtype;
  return made;
}

// Numbers between -1 and 1 that look random and are exact in every language.
inline at::Tensor numbers(at::IntArrayRef sizes, int64_t salt) {
  const at::Tensor count = at::arange(c10::multiply_integers(sizes), at::kLong);
  return ((count * 7919 + salt * 104729) % 2003).to(at::kDouble).div(1001.5).sub(1).view(sizes);
}

// q, k, v of `tokens` tokens of every row, from token `first` on; token t is the same in any cut.
struct Tokens {
  at::Tensor q, k, v;

  Tokens(int64_t first, int64_t tokens, at::ScalarType dtype = at::kFloat, int64_t batch = kBatch) {
    constexpr int64_t longest = 100;
    const auto cut = [&](int64_t heads, int64_t width, int64_t salt) {
      return numbers({batch, heads, longest, width}, salt).to(dtype).narrow(2, first, tokens);
    };
    q = cut(kHeads, kHeadDim, 1), k = cut(kKvHeads, kHeadDim, 2), v = cut(kKvHeads, kValueDim, 3);
  }
};

inline at::Tensor step(KVMemory& memory, const Tokens& x) { return memory.step(x.q, x.k, x.v); }

// Equal bit for bit, the sign of zero included.
inline bool same(const at::Tensor& one, const at::Tensor& other) {
  if (one.sizes() != other.sizes() || one.scalar_type() != other.scalar_type()) return false;
  const at::Tensor a = one.contiguous(), b = other.contiguous();
  return a.nbytes() == 0 || std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

// The tensors of relative positions, 8 sines and cosines.
inline std::vector<at::Tensor> relative(at::ScalarType dtype = at::kFloat) {
  std::vector<at::Tensor> made;
  for (int64_t i = 0; i < 5; ++i) {
    const bool weight = i == 2 || i == 4;
    const at::Tensor x = numbers({kHeads, kHeadDim, weight ? 8 : 1}, 10 + i).to(dtype);
    made.push_back(weight ? x : x.squeeze(-1));
  }
  return made;
}

// Options with another position scheme: "rotary", "alibi", "relative" or "none".
inline MemoryOptions options_at(const std::string& position, at::ScalarType dtype = at::kFloat) {
  MemoryOptions made = options("conv", dtype);
  if (position != "rotary") made.attention.rotary_dim = 0;
  if (position == "alibi") made.attention.alibi_slopes = numbers({kHeads}, 9).abs().to(dtype);
  if (position == "relative") made.attention.relative = relative(dtype);
  return made;
}

// All tensors of two memories, bit for bit.
inline bool same(const KVMemory& one, const KVMemory& other) {
  for (size_t i = 0; i < one.tensors().size(); ++i) {
    if (!same(one.tensors()[i], other.tensors()[i])) return false;
  }
  return true;
}

}  // namespace ctx::test
