// Rows of keys or values into shared memory, by asynchronous copies of the widest pieces that the
// addresses allow. Rows that no query sees, and what lies behind a row's end, become zero: what was
// never written, be it NaN, reaches no product.
#pragma once

#include "kernels/cuda/attention.cuh"

namespace ctx::cuda {

constexpr int kCoreThreads = 128;

// How rows of `bytes` lie in shared memory: `stride` apart, a multiple of 16 that sends the first
// pieces of neighbouring rows to other banks (quads of threads read 64 bytes of a row at once).
struct CoreLayout {
  int64_t bytes, stride;
  CTX_HOST_DEVICE explicit CoreLayout(int64_t row_bytes) : bytes(row_bytes) {
    const int64_t whole = (row_bytes + 15) / 16 * 16;
    stride = whole + (64 + 128 - whole % 128) % 128;
  }
};

// The widest piece that rows may be copied by: 16, 8, 4, or 0 bytes (then by single bytes).
CTX_DEVICE int piece_of(const Strided& rows, const char* first, int64_t bytes) {
  const auto low = static_cast<uint64_t>(reinterpret_cast<uintptr_t>(first)) |
                   static_cast<uint64_t>(rows.token) | static_cast<uint64_t>(bytes);
  return low % 16 == 0 ? 16 : low % 8 == 0 ? 8 : low % 4 == 0 ? 4 : 0;
}

// Calls run(row, piece) for all pieces of some rows, shared out over kThreads threads; a thread keeps
// its piece where the numbers allow it.
template <int kThreads, typename F>
CTX_DEVICE void for_pieces(int rows, int pieces, const F& run) {
  if (pieces == 0) return;
  const int first = threadIdx.x / pieces, piece = threadIdx.x % pieces;
  if (kThreads % pieces == 0) {
    CTX_ROLLED for (int j = first; j < rows; j += kThreads / pieces) run(j, piece);
  } else {
    CTX_ROLLED for (int task = threadIdx.x; task < rows * pieces; task += kThreads)
        run(task / pieces, task % pieces);
  }
}

// Rows of `count` keys from x on; for all threads of a block. The caller commits. `nowhere` is an address
// as aligned as the rows, for pieces that are not read.
template <int kPiece, typename F>
CTX_DEVICE void copy_pieces(const PartView& part,
                            int64_t x,
                            int count,
                            int64_t bytes,
                            char* to,
                            int64_t stride,
                            const char* nowhere,
                            const F& row) {
  for_pieces<kCoreThreads>(count, static_cast<int>(bytes / kPiece), [&](int j, int c) {
    const bool there = x + j < part.part.size && part.in_hull(x + j);
    copy_async<kPiece>(to + j * stride + c * kPiece,
                       there ? row(x + j) + c * kPiece : nowhere,
                       there ? kPiece : 0);
  });
}

template <typename F>
CTX_DEVICE void copy_rows(const PartView& part,
                          int64_t x,
                          int count,
                          int piece,
                          int64_t bytes,
                          char* to,
                          int64_t stride,
                          const char* nowhere,
                          const F& row) {
  if (piece == 16) return copy_pieces<16>(part, x, count, bytes, to, stride, nowhere, row);
  if (piece == 8) return copy_pieces<8>(part, x, count, bytes, to, stride, nowhere, row);
  if (piece == 4) return copy_pieces<4>(part, x, count, bytes, to, stride, nowhere, row);
  for (int64_t task = threadIdx.x; task < count * bytes; task += blockDim.x) {
    const int64_t j = task / bytes, c = task % bytes;
    const bool there = x + j < part.part.size && part.in_hull(x + j);
    to[j * stride + c] = there ? row(x + j)[c] : char{0};
  }
}

// Zeros behind the ends of `count` rows, once: copies do not write there.
CTX_DEVICE void clear_tails(char* to, int64_t count, int64_t bytes, int64_t stride) {
  const int64_t tail = stride - bytes;
  for (int64_t task = threadIdx.x; task < count * tail; task += blockDim.x)
    to[task / tail * stride + bytes + task % tail] = char{0};
}

}  // namespace ctx::cuda
