// Where gradients are summed over queries: the sums of each kv head in those of the call, and room for
// the sums of a part of the queries.
#pragma once

#include "kernels/cpu/lanes.h"
#include "ops/kernels.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

// Sums of the gradients of one kv head's keys, values and biases.
template <typename A>
struct HeadSums {
  A* keys[kRegions];              // [keys, key_width]
  A* values[kRegions];            // [keys, value_width]
  A* mass[kRegions] = {nullptr};  // [keys]; null: none
  A* bias = nullptr;              // [query heads of the kv head]; null: none
};

// The sums of some kv heads, apart from those of the call: room for one part of the queries.
template <typename A>
class PartSums {
 public:
  PartSums(const SpansBackwardArgs& args, int64_t heads) {
    const SpansArgs& f = args.forward;
    for (const Span& span : f.spans) size_ += (span.size - span.past.size) * (row_width(args) + 1);
    size_ += f.heads / f.kv_heads;
    numbers_ = scratch_.take(size_ * heads);
  }

  HeadSums<A> clear(const SpansBackwardArgs& args, int64_t head) {
    std::fill_n(numbers_ + head * size_, size_, A(0));
    return at(args, head);
  }

  HeadSums<A> at(const SpansBackwardArgs& args, int64_t head) const {
    HeadSums<A> sums;
    A* next = numbers_ + head * size_;
    const auto take = [&](int64_t count) { return next += count, next - count; };
    for (int i = 0; i < kRegions; ++i) {
      const int64_t keys = args.forward.spans[i].size - args.forward.spans[i].past.size;
      sums.keys[i] = take(keys * args.key_width), sums.values[i] = take(keys * args.value_width);
      if (args.grad_mass[i] != nullptr) sums.mass[i] = take(keys);
    }
    if (args.grad_bias != nullptr) sums.bias = next;
    return sums;
  }

 private:
  static int64_t row_width(const SpansBackwardArgs& args) {
    return args.key_width + args.value_width;
  }

  int64_t size_ = 0;  // numbers of one head
  Scratch<A> scratch_;
  A* numbers_;
};

// Where the sums of a kv head lie in those of the call.
template <typename A>
HeadSums<A> sums_of(const SpansBackwardArgs& args, int64_t head) {
  HeadSums<A> sums;
  for (int i = 0; i < kRegions; ++i) {
    const int64_t first = head * (args.forward.spans[i].size - args.forward.spans[i].past.size);
    sums.keys[i] = static_cast<A*>(args.grad_keys[i]) + first * args.key_width;
    sums.values[i] = static_cast<A*>(args.grad_values[i]) + first * args.value_width;
    if (args.grad_mass[i] != nullptr) sums.mass[i] = static_cast<A*>(args.grad_mass[i]) + first;
  }
  if (args.grad_bias != nullptr) {
    const int64_t q_per_kv = args.forward.heads / args.forward.kv_heads;
    sums.bias = static_cast<A*>(args.grad_bias) + head * q_per_kv;
  }
  return sums;
}

template <typename A>
void add_sums(const SpansBackwardArgs& args, const HeadSums<A>& part, const HeadSums<A>& to) {
  for (int i = 0; i < kRegions; ++i) {
    const int64_t keys = args.forward.spans[i].size - args.forward.spans[i].past.size;
    axpy(A(1), part.keys[i], to.keys[i], keys * args.key_width);
    axpy(A(1), part.values[i], to.values[i], keys * args.value_width);
    if (to.mass[i] != nullptr) axpy(A(1), part.mass[i], to.mass[i], keys);
  }
  if (to.bias != nullptr)
    axpy(A(1), part.bias, to.bias, args.forward.heads / args.forward.kv_heads);
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
