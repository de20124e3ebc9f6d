// The emulator itself: what it computes, and what it must find.
#include <vector>

#include "check.h"
#include "emulator.h"

namespace ctx::test {
namespace {

using emulator::Order;

// The error that a kernel ends with, or nothing.
template <typename Kernel>
std::string error_of(unsigned threads, size_t shared, const Kernel& kernel) {
  try {
    emulator::run(1, threads, shared, kernel);
  } catch (const emulator::Error& error) {
    return error.what();
  }
  return "";
}

template <typename F>
void in_every_order(const F& run) {
  for (const Order order : {Order::kAscending, Order::kDescending, Order::kRandom}) {
    for (uint64_t seed = 0; seed < (order == Order::kRandom ? 5 : 1); ++seed) {
      emulator::settings = {order, seed};
      run();
    }
  }
  emulator::settings = {};
}

// Every thread reads what its neighbours on both sides wrote.
int wrong_neighbours(bool barrier) {
  std::vector<int> out(256, 0);
  emulator::run(2, 128, 128 * sizeof(int), [&] {
    auto* numbers = reinterpret_cast<int*>(cuda::shared_memory());
    const int i = static_cast<int>(threadIdx.x);
    numbers[i] = i;
    if (barrier) __syncthreads();
    out[blockIdx.x * 128 + i] = numbers[(i + 1) % 128] + numbers[(i + 127) % 128];
  });
  int wrong = 0;
  for (int i = 0; i < 256; ++i) wrong += out[i] != (i % 128 + 1) % 128 + (i % 128 + 127) % 128;
  return wrong;
}

// Half of the block waits at each.
void two_barriers() {
  if (threadIdx.x < 32) __syncthreads();
  if (threadIdx.x >= 32) __syncthreads();
}

void barriers() {
  in_every_order([] {
    EXPECT(wrong_neighbours(true) == 0);
    EXPECT(wrong_neighbours(false) > 0);
  });
  const auto has = [](const std::string& said, const char* part) {
    return said.find(part) != std::string::npos;
  };
  in_every_order([&] {
    EXPECT(has(error_of(64, 0, [] { two_barriers(); }), "divergent barrier"));
    EXPECT(has(error_of(64,
                        0,
                        [] {
                          if (threadIdx.x == 3) return;
                          __syncthreads();
                        }),
               "divergent barrier"));
    EXPECT(has(error_of(32,
                        0,
                        [] {
                          if (threadIdx.x < 16) __syncwarp();
                        }),
               "divergent barrier"));
    EXPECT(has(error_of(32, 0, [] { __shfl_sync(1u << (threadIdx.x % 32), 1, 5); }),
               "outside the mask"));
    EXPECT(has(error_of(16, 0, [] { __syncwarp(); }), "does not have"));
    EXPECT(has(error_of(1025, 0, [] {}), "1 to 1024 threads"));
    EXPECT(has(error_of(32, 300 << 10, [] {}), "227 KiB"));
  });
}

void warps() {
  in_every_order([] {
    std::vector<int> sums(96), votes(96);
    emulator::run(1, 96, 0, [&] {
      int sum = static_cast<int>(threadIdx.x);
      for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bits);
      sums[threadIdx.x] = sum;
      votes[threadIdx.x] =
          static_cast<int>(__ballot_sync(0xffffffffu, threadIdx.x % 3 == 0) & 0xffff);
    });
    for (int i = 0; i < 96; ++i) {
      EXPECT(sums[i] == 31 * 16 + i / 32 * 32 * 32);
      EXPECT((votes[i] & 1) == (i / 32 * 32 % 3 == 0));
    }
    EXPECT(error_of(128, 0, [] {
             EXPECT(__syncthreads_or(threadIdx.x == 77) == 1);
             EXPECT(__syncthreads_or(0) == 0);
             EXPECT(__syncthreads_count(threadIdx.x < 5) == 5);
           }).empty());
    int total = 0;
    emulator::run(dim3(2, 3), 32, 0, [&] { atomicAdd(&total, static_cast<int>(blockIdx.y)); });
    EXPECT(total == 32 * 2 * (0 + 1 + 2));
  });
}

// Shared memory that was not written is NaN, of either kind; and new in every block.
void poison() {
  std::vector<float> out(4);
  emulator::run(2, 1, 64, [&] {
    __shared__ float fixed;
    auto* numbers = reinterpret_cast<float*>(cuda::shared_memory());
    out[2 * blockIdx.x] = numbers[3];
    out[2 * blockIdx.x + 1] = fixed;
    numbers[3] = fixed = 1;
  });
  for (const float x : out) EXPECT(x != x);
}

// A copy is not there before it is waited for; what lies beyond `filled` is zero.
void copies() {
  alignas(16) static const int from[8] = {1, 2, 3, 4, 5, 6, 7, 8};
  EXPECT(error_of(1, 64, [] {
           auto* to = reinterpret_cast<int*>(cuda::shared_memory());
           cuda::copy_async<16>(to, from);
           cuda::commit_copies();
           cuda::copy_async<16>(to + 4, from + 4, 8);
           cuda::commit_copies();
           cuda::wait_copies<2>();
           EXPECT(to[0] == -1);
           cuda::wait_copies<1>();
           EXPECT(to[0] == 1 && to[3] == 4 && to[4] == -1);
           cuda::wait_copies<0>();
           EXPECT(to[4] == 5 && to[5] == 6 && to[6] == 0 && to[7] == 0);
         }).empty());
}

struct Small {  // 16-bit numbers that are small integers
  static float float_of_bits(uint16_t bits) { return static_cast<float>(bits); }
};

// a b + d by fragments out of shared memory, against three loops.
void tiles() {
  in_every_order([] {
    float d[16][8];
    uint16_t a[16][16], b[16][8];
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < 16; ++k) a[i][k] = static_cast<uint16_t>((i * 7 + k * 3) % 11);
      for (int j = 0; j < 8; ++j) b[i][j] = static_cast<uint16_t>((i * 5 + j) % 7);
    }
    emulator::run(1, 32, 1024, [&] {
      const int lane = static_cast<int>(threadIdx.x);
      auto* left = reinterpret_cast<uint16_t*>(cuda::shared_memory());
      auto* right = left + 256;  // [16, 8], beside it the same once more
      for (int i = lane; i < 256; i += 32) {
        left[i] = a[i / 16][i % 16];
        right[i] = b[i / 16][i % 8];
      }
      __syncwarp();
      uint32_t x[4], y[4];
      cuda::load_matrices<false>(x, left + lane % 16 * 16 + lane / 16 * 8);
      cuda::load_matrices<true>(y, right + lane % 16 * 16 + lane / 16 * 8);
      float sum[4] = {1, 1, 1, 1}, twin[4] = {0, 0, 0, 0};
      cuda::multiply_tile<Small>(sum, x, y[0], y[1]);
      cuda::multiply_tile<Small>(twin, x, y[2], y[3]);
      for (int e = 0; e < 4; ++e) {
        EXPECT(sum[e] == twin[e] + 1);
        d[lane / 4 + e / 2 * 8][lane % 4 * 2 + e % 2] = sum[e];
      }
    });
    for (int i = 0; i < 16; ++i) {
      for (int j = 0; j < 8; ++j) {
        float sum = 1;
        for (int k = 0; k < 16; ++k) sum += static_cast<float>(a[i][k] * b[k][j]);
        EXPECT(d[i][j] == sum);
      }
    }
  });
}

}  // namespace
}  // namespace ctx::test

int main() {
  ctx::test::barriers();
  ctx::test::warps();
  ctx::test::poison();
  ctx::test::copies();
  ctx::test::tiles();
  return ctx::test::finish("emulator", 1);
}
