// Enters the CUDA kernels into the registry, on torch's streams and with torch's memory.
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>

#include "kernels/cuda/runtime.h"
#include "kernels/cuda/table.h"
#include "ops/registry.h"

namespace ctx::cuda {
namespace {

c10::DeviceIndex index_of(int device) { return static_cast<c10::DeviceIndex>(device); }

// From torch's allocator, so that a CUDA graph that is being captured holds it.
void* allocate(int /*device*/, int64_t bytes, cudaStream_t stream) {
  return c10::cuda::CUDACachingAllocator::raw_alloc_with_stream(bytes, stream);
}
void release(int /*device*/, void* memory, cudaStream_t /*stream*/) {
  c10::cuda::CUDACachingAllocator::raw_delete(memory);
}
cudaStream_t stream_of(int device) {
  return c10::cuda::getCurrentCUDAStream(index_of(device)).stream();
}

const Kernels& chosen() {
  static const bool ready = (set_runtime({&stream_of, &allocate, &release}), true);
  static_cast<void>(ready);
  return kTable;
}

[[maybe_unused]] const bool registered =
    (ops::register_kernels(c10::DeviceType::CUDA, {kTable.name}, &chosen), true);

}  // namespace
}  // namespace ctx::cuda
