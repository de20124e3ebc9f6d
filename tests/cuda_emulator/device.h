// Where the tests' kernels run: under the emulator (g++ -include emulator.h), or on a GPU where nvcc
// compiles these files. A
// Buffer has a copy on the host and one on the device, of exactly its size.
#pragma once

#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "kernels/cuda/numbers.cuh"

namespace ctx::test {

template <typename T>
class Buffer {
 public:
  explicit Buffer(size_t size = 0, T value = T{}) : host_(size, value) {}
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { release(); }

  void assign(size_t size, T value) {
    release();
    host_ = std::vector<T>(size, value);
  }
  size_t size() const { return host_.size(); }
  T& operator[](size_t i) { return host_[i]; }
  const T& operator[](size_t i) const { return host_[i]; }
  T* host() { return host_.data(); }

#if defined(__CUDACC__)
  // The device's copy, as the host's is now.
  T* device() {
    if (device_ == nullptr && size() > 0)
      cuda::check(cudaMalloc(&device_, size() * sizeof(T)), "cudaMalloc");
    if (size() > 0)
      cuda::check(cudaMemcpy(device_, host(), size() * sizeof(T), cudaMemcpyHostToDevice), "copy");
    return device_;
  }
  void fetch() {
    if (device_ != nullptr)
      cuda::check(cudaMemcpy(host(), device_, size() * sizeof(T), cudaMemcpyDeviceToHost), "copy");
  }

 private:
  void release() {
    if (device_ != nullptr) cudaFree(device_);
    device_ = nullptr;
  }
  T* device_ = nullptr;
#else
  T* device() { return size() == 0 ? nullptr : host_.data(); }
  void fetch() {}

 private:
  void release() {}
#endif
  std::vector<T> host_;
};

// Bytes of numbers of a storage, read and written as float64.
inline double load_number(Storage storage, const char* place) {
  switch (storage) {
    case Storage::kFloat64: {
      double x;
      std::memcpy(&x, place, 8);
      return x;
    }
    case Storage::kFloat32: {
      float x;
      std::memcpy(&x, place, 4);
      return static_cast<double>(x);
    }
    case Storage::kInt8:
      return static_cast<double>(static_cast<int8_t>(*place));
    default: {
      uint16_t bits;
      std::memcpy(&bits, place, 2);
      return static_cast<double>(storage == Storage::kBFloat16 ? cuda::BFloat16::float_of_bits(bits)
                                                               : cuda::Half::float_of_bits(bits));
    }
  }
}

inline void store_number(Storage storage, char* place, double number) {
  if (storage == Storage::kFloat64) {
    std::memcpy(place, &number, 8);
    return;
  }
  const auto x = static_cast<float>(number);
  if (storage == Storage::kFloat32) {
    std::memcpy(place, &x, 4);
    return;
  }
  const uint16_t bits =
      storage == Storage::kBFloat16 ? cuda::BFloat16::bits_of(x) : cuda::Half::bits_of(x);
  std::memcpy(place, &bits, 2);
}

// Bound of |got - expected| after rounding to a storage; `arithmetic`: bound of what came before.
inline double rounding(Storage storage, double expected, double arithmetic) {
  const double relative = storage == Storage::kBFloat16  ? 1.0 / 250
                          : storage == Storage::kFloat16 ? 1.0 / 2000
                          : storage == Storage::kFloat32 ? 2e-7
                                                         : 4e-16;
  return arithmetic + relative * std::abs(expected) + (storage == Storage::kFloat16 ? 1e-7 : 0);
}
inline double arithmetic_error(Storage storage) {
  return storage == Storage::kFloat64 ? 1e-12 : 4e-6;
}

// Any tensor of rows that a test gives to a kernel, [B, heads, T, width]; every row is `width` numbers
// and perhaps some more, which hold NaN.
class Rows {
 public:
  Rows() = default;
  // `aligned`: rows lie together, aligned as allocations are.
  void make(Random& random,
            Storage storage,
            int64_t b,
            int64_t heads,
            int64_t t,
            int64_t width,
            bool aligned = false) {
    storage_ = storage, heads_ = heads, tokens_ = t, width_ = width;
    step_ = width + (aligned || random.coin() ? 0 : random.between(0, 9));
    lead_ = aligned || random.coin() ? 0 : random.between(0, 3);
    const double nan = std::numeric_limits<double>::quiet_NaN();
    bytes_.assign(size_t(lead_ + b * heads * t * step_) * cuda::size_of(storage), char{});
    for (size_t i = 0; i < bytes_.size() / cuda::size_of(storage); ++i)
      store_number(storage, bytes_.host() + i * cuda::size_of(storage), nan);
  }
  void fill(Random& random, double scale) {
    for (int64_t r = 0; r < rows(); ++r)
      for (int64_t d = 0; d < width_; ++d)
        store_number(storage_, at(r, d), scale * random.number());
  }
  int64_t rows() const {
    return (static_cast<int64_t>(bytes_.size()) / cuda::size_of(storage_) - lead_) /
           (step_ > 0 ? step_ : 1);
  }
  double get(int64_t b, int64_t h, int64_t t, int64_t d) {
    return load_number(storage_, at((b * heads_ + h) * tokens_ + t, d));
  }
  void set(int64_t b, int64_t h, int64_t t, int64_t d, double x) {
    store_number(storage_, at((b * heads_ + h) * tokens_ + t, d), x);
  }
  std::vector<double> row(int64_t b, int64_t h, int64_t t) {
    std::vector<double> numbers(width_);
    for (int64_t d = 0; d < width_; ++d) numbers[d] = get(b, h, t, d);
    return numbers;
  }
  Strided strided() {
    return {bytes_.device() + lead_ * cuda::size_of(storage_),
            heads_ * tokens_ * step_,
            tokens_ * step_,
            step_};
  }
  void fetch() { bytes_.fetch(); }

 private:
  char* at(int64_t r, int64_t d) {
    return bytes_.host() + (lead_ + r * step_ + d) * cuda::size_of(storage_);
  }
  Storage storage_ = Storage::kFloat32;
  int64_t heads_ = 0, tokens_ = 0, width_ = 0, step_ = 0, lead_ = 0;
  Buffer<char> bytes_;
};

// What a test program is asked for: [cases] [first case] [bug that is planted].
struct Asked {
  int64_t cases, first;
  Asked(int argc, char** argv, int64_t usual)
      : cases(argc > 1 ? std::atoll(argv[1]) : usual), first(argc > 2 ? std::atoll(argv[2]) : 0) {
#if defined(CTX_PLANTED_BUGS)
    cuda::planted_bug = argc > 3 ? std::atoi(argv[3]) : cuda::kNoBug;
#endif
  }
};

// Runs test(random, number of the case) for every case; what a program returns.
template <typename F>
int run_cases(const char* name, const Asked& asked, const F& test) {
  for (int64_t i = asked.first; i < asked.first + asked.cases && failures <= 20; ++i) {
    const int before = failures;
    Random random(i);
    try {
      test(random, i);
    } catch (const std::exception& error) {
      ++failures;
      std::printf("%s\n", error.what());
    }
    if (failures > before) std::printf("case %lld\n", static_cast<long long>(i));
  }
  return finish(name, asked.cases);
}

inline void in_order(Random& random) {
#if !defined(__CUDACC__)
  constexpr emulator::Order kOrders[] = {
      emulator::Order::kAscending, emulator::Order::kDescending, emulator::Order::kRandom};
  emulator::settings = {random.of(kOrders), static_cast<uint64_t>(random.between(0, 1000))};
#else
  (void)random;
#endif
}

}  // namespace ctx::test
