// A model trained in Python continues a text, byte by byte, without Python. Reads a package that
// `python -m ctx export RUN --out model.pt2` wrote and the prompt on stdin, and writes the likeliest
// bytes to stdout: those of `model.generate(prompt, bytes, temperature=0)`. From the repository's
// folder, with ctx installed:
//
//   cmake -S examples/cpp/stream -B build/stream -DCMAKE_PREFIX_PATH="$(python -m ctx --cmake-prefix-path)" && cmake --build build/stream && build/stream/stream model.pt2 2000 < README.md
#include <ATen/ATen.h>
#include <ctx/ctx.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <iostream>
#include <iterator>
#include <sstream>
#include <stdexcept>

namespace {

using at::Tensor;
using Clock = std::chrono::steady_clock;

constexpr size_t kMostAtOnce = 256;  // of a prompt: a long one is read at constant memory

// An empty memory for so many streams: zeros of the dtypes and sizes that a package names, as
// "float32 Bx4x104x16 ... int64 B".
ctx::rows::State empty_memory(const std::string& described, int64_t rows) {
  ctx::rows::State state;
  std::istringstream words(described);
  for (std::string dtype, sizes; words >> dtype >> sizes;) {
    std::vector<int64_t> shape{rows};
    std::istringstream numbers(sizes.substr(1));
    for (int64_t size; numbers.ignore() >> size;) shape.push_back(size);
    state.push_back(at::zeros(shape, c10::getStringToDtypeMap().at(dtype)));
  }
  return state;
}

// One stream of bytes.
class Stream {
 public:
  explicit Stream(const std::string& path) : package_(path) {
    auto about = package_.get_metadata();
    if (about["ctx_format"] != "1" || about["ctx_vocab_size"] != "256")
      throw std::invalid_argument(path + " must be a package of `python -m ctx export`, of bytes");
    memory_ = empty_memory(about["ctx_state"], 1);
  }

  // Reads bytes, and returns the one that is likeliest to come next.
  char next(const char* bytes, size_t count) {
    const auto n = static_cast<int64_t>(count);
    Tensor tokens = at::empty({1, n}, at::kLong);
    for (int64_t i = 0; i < n; ++i)
      tokens.data_ptr<int64_t>()[i] = static_cast<unsigned char>(bytes[i]);
    std::vector<Tensor> inputs{tokens, at::full({1}, n, at::kLong)};
    inputs.insert(inputs.end(), memory_.begin(), memory_.end());  // written in place
    return static_cast<char>(package_.run(inputs)[0].argmax(-1).item<int64_t>());
  }

 private:
  torch::inductor::AOTIModelPackageLoader package_;
  ctx::rows::State memory_;
};

void run(const std::string& path, int64_t bytes) {
  ctx::init();  // the package's operators
  Stream stream(path);
  const std::string prompt{std::istreambuf_iterator<char>(std::cin), {}};
  if (prompt.empty())
    throw std::invalid_argument("the prompt on stdin must have at least one byte");
  char byte = 0;
  for (size_t i = 0; i < prompt.size(); i += kMostAtOnce)
    byte = stream.next(&prompt[i], std::min(kMostAtOnce, prompt.size() - i));
  const auto begin = Clock::now();
  auto shown = begin;
  for (int64_t i = 1; i <= bytes; ++i) {
    std::putchar(byte), std::fflush(stdout);
    const auto now = Clock::now();
    if (i == bytes || now - shown > std::chrono::seconds(1)) {
      const double seconds = std::chrono::duration<double>(now - begin).count();
      std::fprintf(stderr,
                   "\r%lld of %lld bytes, %.0f tokens/s",
                   (long long)i,
                   (long long)bytes,
                   double(i - 1) / seconds);
      shown = now;
    }
    if (i < bytes) byte = stream.next(&byte, 1);
  }
  std::fputc('\n', stderr);
}

}  // namespace

int main(int argc, char** argv) {
  const int64_t bytes = argc == 3 ? std::atoll(argv[2]) : 0;
  if (bytes < 1) {
    std::fprintf(stderr, "usage: %s PACKAGE BYTES < PROMPT\n", argv[0]);
    return 2;
  }
  try {
    run(argv[1], bytes);
  } catch (const c10::Error& error) {  // torch's, as where there is no such package
    std::fprintf(stderr, "%s: %s\n", argv[1], error.what_without_backtrace());
    return 1;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
