#include "kernels/cuda/intrinsics.cuh"
#include "kernels/cuda/runtime.h"

namespace ctx::cuda {
namespace {

Runtime& current() {
  static Runtime one;
  return one;
}

}  // namespace

void set_runtime(const Runtime& runtime) { current() = runtime; }

Launching::Launching(int device, int64_t workspace_bytes) : device_(device) {
  check(cudaGetDevice(&before_), "cudaGetDevice");
  if (before_ != device_) check(cudaSetDevice(device_), "cudaSetDevice");
  const Runtime& runtime = current();
  if (runtime.stream != nullptr) stream_ = runtime.stream(device_);
  if (workspace_bytes == 0) return;
  if (runtime.allocate != nullptr) {
    workspace_ = runtime.allocate(device_, workspace_bytes, stream_);
  } else {
    check(cudaMallocAsync(&workspace_, workspace_bytes, stream_), "workspace");
  }
}

Launching::~Launching() {
  if (workspace_ != nullptr) {
    const Runtime& runtime = current();
    if (runtime.allocate != nullptr) {
      runtime.release(device_, workspace_, stream_);
    } else {
      cudaFreeAsync(workspace_, stream_);
    }
  }
  if (before_ != device_) cudaSetDevice(before_);
}

}  // namespace ctx::cuda
