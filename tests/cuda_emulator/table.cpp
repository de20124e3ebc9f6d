// The CUDA kernels under the emulator as a library: loaded into a program, it takes the place of the
// CPU's kernels, so that operators work on CPU tensors as they do on a GPU's, which the host does not
// read (operators.py).
#include <cstdlib>

#include "kernels/cuda/attend_launch.cuh"
#include "kernels/cuda/compress_launch.cuh"
#include "kernels/cuda/plan.cuh"
#include "kernels/cuda/rotary_kernel.cuh"
#include "kernels/cuda/spans_backward.cuh"
#include "ops/registry.h"

namespace ctx::test {
namespace {

// What a kernel asks for, filled with NaN.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) : bytes_(static_cast<char*>(std::malloc(bytes + 1))) {
    std::memset(bytes_, 0xff, bytes);
  }
  ~Workspace() { std::free(bytes_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* get() const { return bytes_; }

 private:
  char* bytes_;
};

void plan(const PlanArgs& args) { cuda::plan(args, nullptr); }
void advance(const AdvanceArgs& args) { cuda::advance(args, nullptr); }
void rotate(const RotateArgs& args) { cuda::rotate(args, nullptr); }
void write(const AppendArgs& pairs, const CompressArgs& groups) {
  cuda::write(pairs, groups, Workspace(cuda::compress_workspace(groups)).get(), nullptr);
}
void attend(const AttendArgs& args) {
  cuda::attend(args, Workspace(cuda::attend_workspace(args)).get(), nullptr);
}
void spans_forward(const SpansArgs& args) { cuda::spans_forward(args, nullptr); }
void spans_backward(const SpansBackwardArgs& args) {
  cuda::spans_backward(args, Workspace(cuda::backward_workspace(args)).get(), nullptr);
}

const Kernels kTable = {"emulated CUDA",
                        /*host_reads=*/false,
                        &plan,
                        &advance,
                        &rotate,
                        &write,
                        &attend,
                        &spans_forward,
                        &spans_backward};
const Kernels& chosen() { return kTable; }

[[maybe_unused]] const bool registered =
    (ops::register_kernels(c10::DeviceType::CPU, {kTable.name}, &chosen), true);

}  // namespace
}  // namespace ctx::test
