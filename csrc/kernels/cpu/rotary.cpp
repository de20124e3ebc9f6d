// Rotary position for whole tensors. Tokens are walked position by position, so that rows at the
// same position share a table of sines and cosines, which cost more than the rotation.
#include "kernels/cpu/rotary.h"

#include <ATen/Parallel.h>

#include "kernels/cpu/dispatch.h"
#include "kernels/cpu/table.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {
namespace {

template <typename T>
void rotate_tokens(const RotateArgs& args, int64_t begin, int64_t end) {
  using A = Acc<T>;
  std::vector<A> scratch(args.rotary.dim + args.head_dim);
  RotaryTable<A> table;
  const auto rotation = args.inverse ? Rotation::kBack : Rotation::kTo;
  A* buffer = scratch.data() + args.rotary.dim;
  for (int64_t t = begin; t < end; ++t) {
    for (int64_t b = 0; b < args.batch; ++b) {
      const double position = args.positions[b * args.tokens + t];
      if (b == 0 || position != args.positions[(b - 1) * args.tokens + t]) {
        table = make_rotary_table(args.rotary, position, scratch.data());
      }
      for (int64_t h = 0; h < args.heads; ++h) {
        load_row(row<T>(args.in, b, h, t), buffer, args.head_dim);
        rotate_row(args.rotary, table, rotation, buffer);
        store_row(buffer, row<T>(args.out, b, h, t), args.head_dim);
      }
    }
  }
}

}  // namespace

void rotate(const RotateArgs& args) {
  const int64_t work = args.batch * args.heads * args.head_dim + 4 * args.rotary.dim;
  dispatch(args.storage, [&](auto type) {
    at::parallel_for(0, args.tokens, grain(work), [&](int64_t begin, int64_t end) {
      rotate_tokens<decltype(type)>(args, begin, end);
    });
  });
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
