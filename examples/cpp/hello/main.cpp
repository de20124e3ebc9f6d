// One stream, a thousand tokens, constant memory, and a number that can be checked by hand. From the
// repository's folder, with ctx installed:
//
//   cmake -S examples/cpp/hello -B build/hello -DCMAKE_PREFIX_PATH="$(python -m ctx --cmake-prefix-path)" && cmake --build build/hello && build/hello/hello
#include <ATen/ATen.h>
#include <ctx/ctx.h>

#include <cstdio>

int main() {
  ctx::MemoryOptions options;  // one row, one head; window, slots, tokens per slot, segment, sinks
  options.attention.schedule = {8, 4, 2, 2, 1};
  options.head_dim = 4;
  ctx::KVMemory memory(options);

  const at::Tensor zero = at::zeros({1, 1, 1, 4});  // all keys are alike: the output is a mean
  at::Tensor out;
  for (int t = 0; t < 1000; ++t) out = memory.step(zero, zero, at::full_like(zero, t));

  // Token 999 sees token 0 (the sink), four slots, each the mean of two of the tokens 981 ... 988, and
  // the tokens 989 ... 999: (0 + 981.5 + 983.5 + 985.5 + 987.5 + 11 * 994) / 16 = 929.5.
  const double mean = out[0][0][0][0].item<double>();
  std::printf("%lld tokens in %lld bytes; the last one sees a mean of %.1f\n",
              static_cast<long long>(memory.seen()[0].item<int64_t>()),
              static_cast<long long>(memory.nbytes()),
              mean);
  return mean == 929.5 ? 0 : 1;
}
