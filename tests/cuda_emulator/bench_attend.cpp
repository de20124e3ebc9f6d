// Decode steps on a GPU: time and bandwidth of attention over full rings, beside the device's own copy.
// Under the emulator it says that there is nothing to measure.
//
//   bench_attend
#include <cstdio>

#include "device.h"
#include "kernels/cuda/attend_launch.cuh"

#if defined(__CUDACC__)
namespace ctx::test {
namespace {

struct Shape {
  const char* name;
  Storage storage, slots;
  int64_t batch, heads, kv_heads, dim, keys, tokens;
};

template <typename F>
double microseconds(const F& run) {
  cudaEvent_t begin, end;
  cudaEventCreate(&begin), cudaEventCreate(&end);
  for (int i = 0; i < 5; ++i) run();
  constexpr int kTimes = 50;
  cudaEventRecord(begin, nullptr);
  for (int i = 0; i < kTimes; ++i) run();
  cudaEventRecord(end, nullptr);
  cuda::check(cudaEventSynchronize(end), "a measured kernel");
  float milliseconds = 0;
  cudaEventElapsedTime(&milliseconds, begin, end);
  cudaEventDestroy(begin), cudaEventDestroy(end);
  return 1000.0 * static_cast<double>(milliseconds) / kTimes;
}

char* zeros(int64_t bytes) {
  char* memory = nullptr;
  cuda::check(cudaMalloc(&memory, bytes), "cudaMalloc");
  cuda::check(cudaMemset(memory, 0, bytes), "cudaMemset");
  return memory;
}

void measure(const Shape& s) {
  AttendArgs args;
  MemoryView& m = args.memory;
  const int64_t half = s.keys / 2;  // slots, and as many window tokens
  m.clock.schedule = {half - 4, half, 4, 4, 0, 0};
  m.storage = s.storage, m.compressed_storage = s.slots;
  m.batch = s.batch, m.kv_heads = s.kv_heads, m.head_dim = m.value_dim = s.dim;
  m.window_capacity = half + 8 + s.tokens, m.compressed_capacity = half + 2 + s.tokens;
  const int64_t window =
      s.batch * s.kv_heads * m.window_capacity * cuda::row_bytes(s.storage, s.dim);
  const int64_t slots =
      s.batch * s.kv_heads * m.compressed_capacity * cuda::row_bytes(s.slots, s.dim);
  std::vector<char*> owned;
  const auto own = [&](int64_t bytes) { return owned.emplace_back(zeros(bytes)); };
  m.window_keys = own(window), m.window_values = own(window);
  m.compressed_keys = own(slots), m.compressed_values = own(slots);
  m.rotary.dim = s.dim, m.rotary.inv_freq = reinterpret_cast<double*>(own(s.dim / 2 * 8));
  std::vector<int64_t> origin(s.batch, 64 * s.keys);
  char* origins = own(s.batch * 8);
  cudaMemcpy(origins, origin.data(), s.batch * 8, cudaMemcpyHostToDevice);
  args.block = {reinterpret_cast<int64_t*>(origins), nullptr, 0, s.tokens};
  args.heads = s.heads, args.scale = 0.1, args.call_tokens = s.tokens;
  const int64_t row = s.dim * cuda::size_of(s.storage);
  const int64_t rows = s.batch * s.heads * s.tokens;
  args.queries = {own(rows * row), s.heads * s.tokens * s.dim, s.tokens * s.dim, s.dim};
  args.out = {own(rows * row), s.heads * s.tokens * s.dim, s.tokens * s.dim, s.dim};
  char* workspace = own(cuda::attend_workspace(args) + 16);
  const double time = microseconds([&] { cuda::attend(args, workspace, nullptr); });
  const double bytes =
      2.0 * static_cast<double>(s.batch * s.kv_heads * half) *
      static_cast<double>(cuda::row_bytes(s.storage, s.dim) + cuda::row_bytes(s.slots, s.dim));
  std::printf("%-28s %9.1f us %9.1f MB %8.0f GB/s  %s\n",
              s.name,
              time,
              bytes / 1e6,
              bytes / time / 1e3,
              cuda::fits_mma(cuda::attention_of(args)) ? "mma" : "core");
  for (char* memory : owned) cudaFree(memory);
}

void copy_bandwidth() {
  constexpr int64_t kBytes = int64_t{1} << 30;
  char *from = zeros(kBytes), *to = zeros(kBytes);
  const double time =
      microseconds([&] { cudaMemcpyAsync(to, from, kBytes, cudaMemcpyDeviceToDevice, nullptr); });
  std::printf("%-28s %9.1f us %9.1f MB %8.0f GB/s (both ways)\n",
              "copy",
              time,
              kBytes / 1e6,
              2.0 * kBytes / time / 1e3);
  cudaFree(from), cudaFree(to);
}

}  // namespace
}  // namespace ctx::test

int main() {
  using namespace ctx;
  using namespace ctx::test;
  constexpr Storage kB = Storage::kBFloat16, kF = Storage::kFloat32, kI = Storage::kInt8;
  copy_bandwidth();
  const Shape shapes[] = {
      {"bf16 G4 B1 4k", kB, kB, 1, 32, 8, 128, 4096, 1},
      {"bf16 G4 B16 4k", kB, kB, 16, 32, 8, 128, 4096, 1},
      {"bf16 G4 B64 4k", kB, kB, 64, 32, 8, 128, 4096, 1},
      {"bf16 G8 B64 4k", kB, kB, 64, 64, 8, 128, 4096, 1},
      {"bf16 G4 B64 4k int8 slots", kB, kI, 64, 32, 8, 128, 4096, 1},
      {"bf16 G1 B16 4k", kB, kB, 16, 32, 32, 128, 4096, 1},
      {"f32 G1 B8 4k", kF, kF, 8, 32, 32, 128, 4096, 1},
      {"f32 G4 B32 4k", kF, kF, 32, 32, 8, 128, 4096, 1},
      {"bf16 G3 D64 B256 1k (Smol)", kB, kB, 256, 9, 3, 64, 1024, 1},
      {"bf16 G4 B1 512", kB, kB, 1, 32, 8, 128, 512, 1},
      {"bf16 G4 prefill 2k x 4k", kB, kB, 1, 32, 8, 128, 4096, 2048},
  };
  for (const Shape& shape : shapes) measure(shape);
}
#else
int main() { std::printf("bench_attend: needs a GPU\n"); }
#endif
