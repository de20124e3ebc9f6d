// What the tests of this folder share: expectations that count, random numbers, and a way to run one test
// by name.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <random>
#include <string>

namespace ctx::test {

inline int failures = 0;
inline int checks = 0;

#define EXPECT(condition)                                                 \
  do {                                                                    \
    ++ctx::test::checks;                                                  \
    if (!(condition)) {                                                   \
      ++ctx::test::failures;                                              \
      std::printf("%s:%d: not so: %s\n", __FILE__, __LINE__, #condition); \
    }                                                                     \
  } while (false)

// Random choices that are the same on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed * 0x9E3779B97F4A7C15u + 1) {}
  int64_t between(int64_t low, int64_t high) {  // both inclusive
    return low + static_cast<int64_t>(engine_() % static_cast<uint64_t>(high - low + 1));
  }
  bool coin() { return engine_() >> 17 & 1; }
  bool one_in(int64_t n) { return between(1, n) == 1; }
  double number() { return static_cast<double>(between(-10000, 10000)) / 10000.0; }
  template <typename T, size_t N>
  T of(const T (&items)[N]) {
    return items[between(0, N - 1)];
  }

 private:
  std::mt19937_64 engine_;
};

inline int finish(const char* name, int64_t cases) {
  std::printf("%s: %lld cases, %d checks, %d failures\n",
              name,
              static_cast<long long>(cases),
              checks,
              failures);
  return failures == 0 ? 0 : 1;
}

}  // namespace ctx::test
