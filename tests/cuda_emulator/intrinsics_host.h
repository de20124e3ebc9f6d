// What CUDA offers to a thread, for the emulator: indices, barriers, shuffles, votes, atomics; and the
// host versions of what csrc/kernels/cuda/intrinsics.cuh has for a device: asynchronous copies, ldmatrix
// and mma.sync, lane by lane as the PTX manual lays their fragments out.
#pragma once

#include <cmath>

#define threadIdx (::ctx::emulator::machine().current().index)
#define blockIdx (::ctx::emulator::machine().block_index())
#define blockDim (::ctx::emulator::machine().block_size())
#define gridDim (::ctx::emulator::machine().grid_size())

inline int __syncthreads_count(int predicate,
                               ctx::emulator::Site site = ctx::emulator::Site::current()) {
  int sum = predicate != 0;
  ctx::emulator::machine().block_barrier(&sum, site);
  return sum;
}
inline int __syncthreads_or(int predicate,
                            ctx::emulator::Site site = ctx::emulator::Site::current()) {
  return __syncthreads_count(predicate, site) != 0;
}
inline void __syncthreads(ctx::emulator::Site site = ctx::emulator::Site::current()) {
  __syncthreads_count(0, site);
}

inline void __syncwarp(unsigned mask = 0xffffffffu,
                       ctx::emulator::Site site = ctx::emulator::Site::current()) {
  int nothing = 0;
  ctx::emulator::machine().warp_operation(mask, &nothing, site, [](void* const*) {});
}

inline unsigned __ballot_sync(unsigned mask,
                              int predicate,
                              ctx::emulator::Site site = ctx::emulator::Site::current()) {
  unsigned vote = predicate != 0;
  ctx::emulator::machine().warp_operation(mask, &vote, site, [](void* const* votes) {
    unsigned all = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (votes[lane] != nullptr) all |= *static_cast<unsigned*>(votes[lane]) << lane;
    for (int lane = 0; lane < 32; ++lane)
      if (votes[lane] != nullptr) *static_cast<unsigned*>(votes[lane]) = all;
  });
  return vote;
}
inline int __any_sync(unsigned mask,
                      int predicate,
                      ctx::emulator::Site site = ctx::emulator::Site::current()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask,
                      int predicate,
                      ctx::emulator::Site site = ctx::emulator::Site::current()) {
  return __ballot_sync(mask, predicate, site) == mask;
}

namespace ctx::emulator {

template <typename T>
T shuffle(unsigned mask, T value, int source, const Site& site) {
  struct Operand {
    T value;
    int source;
    T result;
  } mine{value, source, value};
  machine().warp_operation(mask, &mine, site, [&](void* const* operands) {
    for (int lane = 0; lane < 32; ++lane) {
      if (operands[lane] == nullptr) continue;
      auto* one = static_cast<Operand*>(operands[lane]);
      if (operands[one->source & 31] == nullptr)
        throw Error(name_of(site) + ": a shuffle from a lane outside the mask");
      one->result = static_cast<Operand*>(operands[one->source & 31])->value;
    }
  });
  return mine.result;
}
inline int lane() { return static_cast<int>(machine().current().linear % 32); }

}  // namespace ctx::emulator

template <typename T>
T __shfl_sync(unsigned mask,
              T value,
              int source,
              ctx::emulator::Site site = ctx::emulator::Site::current()) {
  return ctx::emulator::shuffle(mask, value, source, site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask,
                  T value,
                  int bits,
                  ctx::emulator::Site site = ctx::emulator::Site::current()) {
  return ctx::emulator::shuffle(mask, value, ctx::emulator::lane() ^ bits, site);
}
template <typename T>
T __shfl_down_sync(unsigned mask,
                   T value,
                   int by,
                   ctx::emulator::Site site = ctx::emulator::Site::current()) {
  const int source = ctx::emulator::lane() + by;
  return ctx::emulator::shuffle(mask, value, source < 32 ? source : ctx::emulator::lane(), site);
}

template <typename T>
T atomicAdd(T* place, T value) {
  const T before = *place;
  *place = before + value;
  return before;
}
template <typename T>
T atomicMax(T* place, T value) {
  const T before = *place;
  *place = before < value ? value : before;
  return before;
}

namespace ctx::cuda {

inline char* shared_memory() { return emulator::machine().shared(); }

// Queued until it is waited for; `filled` bytes are copied and the rest is zero.
template <int kBytes>
inline void copy_async(void* to, const void* from, int filled = kBytes) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16);
  if (reinterpret_cast<uintptr_t>(to) % kBytes != 0 ||
      (filled > 0 && reinterpret_cast<uintptr_t>(from) % kBytes != 0))
    throw emulator::Error("an asynchronous copy between addresses that are not aligned");
  emulator::copied_bytes += filled;
  emulator::machine().current().open.push_back({to, from, kBytes, filled});
}
inline void commit_copies() {
  emulator::Thread& me = emulator::machine().current();
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}
// All groups but the last kLeft are complete.
template <int kLeft>
inline void wait_copies() {
  emulator::Thread& me = emulator::machine().current();
  while (me.groups.size() > kLeft) {
    for (const emulator::Copy& copy : me.groups.front()) {
      std::memcpy(copy.to, copy.from, copy.filled);
      std::memset(static_cast<char*>(copy.to) + copy.filled, 0, copy.bytes - copy.filled);
    }
    me.groups.erase(me.groups.begin());
  }
}

// Four 8 x 8 matrices of 16-bit numbers: lanes 8 i ... 8 i + 7 give the rows of matrix i; lane l gets
// elements 2 (l % 4), + 1 of row l / 4 of each (kTransposed: of column l / 4).
template <bool kTransposed>
inline void load_matrices(uint32_t (&to)[4],
                          const void* row,
                          emulator::Site site = emulator::Site::current()) {
  struct Operand {
    const void* row;
    uint32_t result[4];
  } mine{row, {}};
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0)
    throw emulator::Error("ldmatrix needs rows that are aligned to 16 bytes");
  emulator::machine().warp_operation(0xffffffffu, &mine, site, [](void* const* operands) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* one = static_cast<Operand*>(operands[lane]);
      for (int i = 0; i < 4; ++i) {
        uint16_t pair[2];
        for (int e = 0; e < 2; ++e) {
          const int line = kTransposed ? lane % 4 * 2 + e : lane / 4;
          const int column = kTransposed ? lane / 4 : lane % 4 * 2 + e;
          const auto* source = static_cast<Operand*>(operands[8 * i + line])->row;
          pair[e] = static_cast<const uint16_t*>(source)[column];
        }
        std::memcpy(&one->result[i], pair, 4);
      }
    }
  });
  for (int i = 0; i < 4; ++i) to[i] = mine.result[i];
}

// d [16, 8] += a [16, 16] b [16, 8], as mma.sync.m16n8k16.row.col with float32 sums; T tells what the
// 16-bit numbers are (float_of_bits).
template <typename T>
inline void multiply_tile(float (&d)[4],
                          const uint32_t (&a)[4],
                          uint32_t b0,
                          uint32_t b1,
                          emulator::Site site = emulator::Site::current()) {
  struct Operand {
    float* d;
    uint32_t a[4];
    uint32_t b[2];
  } mine{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  emulator::machine().warp_operation(0xffffffffu, &mine, site, [](void* const* operands) {
    float left[16][16], right[16][8], sum[16][8];
    const auto half = [](uint32_t pair, int e) {
      return T::float_of_bits(static_cast<uint16_t>(pair >> (16 * e)));
    };
    for (int lane = 0; lane < 32; ++lane) {
      const auto* one = static_cast<Operand*>(operands[lane]);
      const int group = lane / 4, pair = lane % 4 * 2;
      for (int e = 0; e < 2; ++e) {
        left[group][pair + e] = half(one->a[0], e);
        left[group + 8][pair + e] = half(one->a[1], e);
        left[group][pair + 8 + e] = half(one->a[2], e);
        left[group + 8][pair + 8 + e] = half(one->a[3], e);
        right[pair + e][group] = half(one->b[0], e);
        right[pair + 8 + e][group] = half(one->b[1], e);
        sum[group][pair + e] = one->d[e];
        sum[group + 8][pair + e] = one->d[2 + e];
      }
    }
    for (int i = 0; i < 16; ++i)
      for (int j = 0; j < 8; ++j)
        for (int k = 0; k < 16; ++k) sum[i][j] += left[i][k] * right[k][j];
    for (int lane = 0; lane < 32; ++lane) {
      const auto* one = static_cast<Operand*>(operands[lane]);
      for (int e = 0; e < 2; ++e) {
        one->d[e] = sum[lane / 4][lane % 4 * 2 + e];
        one->d[2 + e] = sum[lane / 4 + 8][lane % 4 * 2 + e];
      }
    }
  });
}

}  // namespace ctx::cuda
