// The plan of a call, a block for each row of it; and the clock after the call, a thread for each row.
#pragma once

#include "kernels/cuda/numbers.cuh"
#include "ops/plan_layout.h"

namespace ctx::cuda {

constexpr int kPlanThreads = 128;

__global__ void __launch_bounds__(kPlanThreads) plan_kernel(const __grid_constant__ PlanArgs args) {
  const PlanRow row(args, blockIdx.x);
  const auto part = [&](int64_t thread, int64_t size) { return thread * size / kPlanThreads; };
  const int64_t begin = part(threadIdx.x, args.tokens), end = part(threadIdx.x + 1, args.tokens);
  // Where the stream starts that each thread's tokens leave behind; far below zero: the one before's.
  constexpr int64_t kNone = -Schedule::kLastPosition - 1;
  auto* starts = reinterpret_cast<int64_t*>(shared_memory());
  starts[threadIdx.x] = row.last_start(begin, end, kNone);
  __syncthreads();
  int64_t start = row.carried_start();
  for (int i = threadIdx.x - 1; i >= 0; --i) {
    if (starts[i] == kNone) continue;
    start = starts[i];
    break;
  }
  if (threadIdx.x == 0) row.fill_header();
  row.fill_tokens(begin, end, start);
  __syncthreads();  // groups look at where their tokens' streams start
  row.fill_groups(part(threadIdx.x, args.groups), part(threadIdx.x + 1, args.groups));
}

inline void plan(const PlanArgs& args, cudaStream_t stream) {
  launch(&plan_kernel,
         grid_of(args.batch),
         kPlanThreads,
         kPlanThreads * sizeof(int64_t),
         stream,
         args);
}

__global__ void __launch_bounds__(kPlanThreads)
    advance_kernel(const __grid_constant__ AdvanceArgs args) {
  const int64_t b = static_cast<int64_t>(blockIdx.x) * kPlanThreads + threadIdx.x;
  if (b < args.batch) advance_row(args, b);
}

inline void advance(const AdvanceArgs& args, cudaStream_t stream) {
  launch(&advance_kernel,
         grid_of((args.batch + kPlanThreads - 1) / kPlanThreads),
         kPlanThreads,
         0,
         stream,
         args);
}

}  // namespace ctx::cuda
