// What a decode step reads of the memory and writes beside it, counted from the kernels' own copies, against
// the least there is: every pair that the query sees, once.
//
//   test_bytes
#include "device.h"
#include "kernels/cuda/attend_launch.cuh"

namespace ctx::test {
namespace {

struct Shape {
  const char* name;
  Storage storage, slots;
  int64_t q_per_kv, dim, pairs;
};

void count(const Shape& s) {
  AttendArgs args;
  MemoryView& m = args.memory;
  const int64_t half = s.pairs / 2;  // slots, and as many window tokens
  m.clock.schedule = {half - 1, half, 4, 1, 0, 0};
  m.storage = s.storage, m.compressed_storage = s.slots;
  m.batch = 1, m.kv_heads = 1, m.head_dim = m.value_dim = s.dim;
  m.window_capacity = m.clock.schedule.window_capacity(int64_t{64});
  m.compressed_capacity = m.clock.schedule.compressed_capacity(int64_t{64});
  Buffer<char> window[2], slots[2];
  for (int side = 0; side < 2; ++side) {
    window[side].assign(m.window_capacity * cuda::row_bytes(s.storage, s.dim), char{});
    slots[side].assign(m.compressed_capacity * cuda::row_bytes(s.slots, s.dim), char{});
  }
  m.window_keys = window[0].device(), m.window_values = window[1].device();
  m.compressed_keys = slots[0].device(), m.compressed_values = slots[1].device();
  Buffer<double> frequencies(s.dim / 2, 0.5);
  m.rotary.dim = s.dim, m.rotary.inv_freq = frequencies.device();
  Buffer<int64_t> origin(1, 64 * s.pairs);
  args.block = {origin.device(), nullptr, 0, 1};
  args.heads = s.q_per_kv, args.scale = 0.1, args.call_tokens = 1;
  Buffer<char> q(s.q_per_kv * s.dim * 8), out(s.q_per_kv * s.dim * 8);
  args.queries = {q.device(), s.q_per_kv * s.dim, s.dim, s.dim};
  args.out = {out.device(), s.q_per_kv * s.dim, s.dim, s.dim};
  Buffer<char> workspace(cuda::attend_workspace(args));
  cuda::Attention a = cuda::attention_of(args);
  cuda::set_splits(a, 0);
  emulator::copied_bytes = 0;
  cuda::attend(args, workspace.device(), nullptr);
  const Ranges seen = visible(m.clock.schedule, origin[0]);
  const double least = 2.0 * double(seen[kWindow].size() * cuda::row_bytes(s.storage, s.dim) +
                                    seen[kCompressed].size() * cuda::row_bytes(s.slots, s.dim));
  const double partial = 2.0 * double(cuda::partial_bytes(a));  // written, and read by the merge
  const double moved = double(emulator::copied_bytes) + partial;
  std::printf("%-22s %-4s %5lld pairs  read %9.0f  partial sums %7.0f  of %9.0f bytes: %.3f\n",
              s.name,
              cuda::fits_mma(cuda::attention_of(args)) ? "mma" : "core",
              static_cast<long long>(seen[kWindow].size() + seen[kCompressed].size()),
              double(emulator::copied_bytes),
              partial,
              least,
              moved / least);
  EXPECT(double(emulator::copied_bytes) >= least);  // counted at all
  EXPECT(moved <= 1.05 * least);
}

}  // namespace
}  // namespace ctx::test

int main() {
  using namespace ctx;
  using namespace ctx::test;
  constexpr Storage kB = Storage::kBFloat16, kF = Storage::kFloat32, kI = Storage::kInt8;
  const Shape shapes[] = {
      {"float32, 1 head", kF, kF, 1, 64, 4096},
      {"float32, 4 heads", kF, kF, 4, 128, 4096},
      {"bfloat16, 1 head", kB, kB, 1, 128, 4096},
      {"bfloat16, 4 heads", kB, kB, 4, 64, 4096},
      {"bfloat16, 4 heads", kB, kB, 4, 128, 4096},
      {"bfloat16, 8 heads", kB, kB, 8, 128, 8192},
      {"int8 slots, 4 heads", kB, kI, 4, 128, 8192},
  };
  for (const Shape& shape : shapes) count(shape);
  return finish("bytes", static_cast<long long>(std::size(shapes)));
}
