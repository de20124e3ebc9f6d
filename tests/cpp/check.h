// What the C++ tests need: checks that say where they failed, and an exit status that counts them.
//
// A test is a plain program: functions that EXPECT, and a main that calls them and returns
// ctx::test::status(). A failed check does not end the program. Threads may check at the same time.
#pragma once

#include <atomic>
#include <cstdio>
#include <string>

namespace ctx::test {

inline std::atomic<int> checks = 0;
inline std::atomic<int> failures = 0;

inline void expect(bool holds, const char* file, int line, const std::string& what) {
  ++checks;
  if (holds) return;
  // The first ones say what is wrong; a loop may fail a million times.
  if (++failures <= 20) std::fprintf(stderr, "%s:%d: %s\n", file, line, what.c_str());
}

// What main returns: 0 where every check held.
inline int status() {
  std::printf("%d checks, %d failed\n", checks.load(), failures.load());
  return failures == 0 && checks > 0 ? 0 : 1;
}

}  // namespace ctx::test

#define EXPECT(...) ::ctx::test::expect(bool(__VA_ARGS__), __FILE__, __LINE__, #__VA_ARGS__)

// The statement throws an error of c10 of this very type, whose message begins so.
#define EXPECT_THROWS(type, begin, ...)                                                          \
  do {                                                                                           \
    std::string thrown = "nothing";                                                              \
    bool expected = false;                                                                       \
    try {                                                                                        \
      __VA_ARGS__;                                                                               \
    } catch (const type& error) {                                                                \
      thrown = error.what_without_backtrace();                                                   \
      expected = thrown.rfind(begin, 0) == 0;                                                    \
    } catch (const std::exception& error) {                                                      \
      thrown = std::string("another type: ") + error.what();                                     \
    }                                                                                            \
    ::ctx::test::expect(                                                                         \
        expected,                                                                                \
        __FILE__,                                                                                \
        __LINE__,                                                                                \
        std::string(#__VA_ARGS__) + " must throw " #type ": " + (begin) + "..., got " + thrown); \
  } while (false)
