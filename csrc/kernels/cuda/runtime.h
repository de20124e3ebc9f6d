// What the kernels need to know of the application they run in: the stream that work is queued on, and
// memory for as long as the work lasts. The operators' layer sets both before the first launch; without
// that the legacy default stream and cudaMallocAsync are used.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/kernels.h"

namespace ctx::cuda {

struct Runtime {
  // The calling thread's current stream of a device.
  cudaStream_t (*stream)(int device) = nullptr;
  // `bytes` of memory of a device, aligned to 16, for work that is queued on `stream` until release()
  // is called; both null or neither. A caching allocator keeps it capturable in a CUDA graph.
  void* (*allocate)(int device, int64_t bytes, cudaStream_t stream) = nullptr;
  void (*release)(int device, void* memory, cudaStream_t stream) = nullptr;
};

// Not safe to call while another thread launches.
void set_runtime(const Runtime& runtime);

// A launch's surroundings: makes a device the current one, and finds its stream and a workspace.
class Launching {
 public:
  Launching(int device, int64_t workspace_bytes);
  ~Launching();
  Launching(const Launching&) = delete;
  Launching& operator=(const Launching&) = delete;

  cudaStream_t stream() const { return stream_; }
  void* workspace() const { return workspace_; }

 private:
  int device_;
  int before_ = 0;
  cudaStream_t stream_ = nullptr;
  void* workspace_ = nullptr;
};

}  // namespace ctx::cuda
