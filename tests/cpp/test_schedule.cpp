// The law against a queue that is moved by hand, for every small schedule; schedule.h alone, no
// torch.
#include <algorithm>
#include <deque>
#include <vector>

#include "check.h"
#include "ctx/schedule.h"

namespace {

using ctx::Clock;
using ctx::Schedule;

constexpr int64_t kTokens = 60;

// What a query sees, kept as the paper tells it: lists whose oldest entries leave.
struct Lists {
  std::deque<int64_t> window;
  std::deque<int64_t> compressed;  // numbers of groups
  int64_t sinks = 0;
  int64_t groups = 0;

  void feed(const Schedule& s, int64_t t) {
    if (t % s.segment == 0) {
      while (static_cast<int64_t>(window.size()) >= s.window + s.ratio) {
        window.erase(window.begin(), window.begin() + s.ratio);
        compressed.push_back(groups++);
        if (static_cast<int64_t>(compressed.size()) > s.compressed) compressed.pop_front();
      }
    }
    t < s.sinks ? void(++sinks) : window.push_back(t);
  }
};

void test_what_is_seen(const Schedule& s) {
  Lists lists;
  for (int64_t t = 0; t < kTokens; ++t) {
    lists.feed(s, t);
    EXPECT(s.groups(t) == lists.groups);
    EXPECT(s.visible_sinks(t) == lists.sinks);
    EXPECT(s.slots(t) == static_cast<int64_t>(lists.compressed.size()));
    EXPECT(lists.compressed.empty() || lists.compressed.front() == s.groups(t) - s.slots(t));
    EXPECT(t < s.sinks || s.window_begin(t) == lists.window.front());
    EXPECT(s.window_begin(t) == s.first_token(s.groups(t)));
    EXPECT(static_cast<int64_t>(lists.window.size()) <= s.max_window());
    EXPECT(lists.sinks + s.slots(t) + static_cast<int64_t>(lists.window.size()) <= s.max_slots());
    // At least the window that was asked for, and as far back as the memory reaches.
    EXPECT(s.window_begin(t) <= std::max(s.sinks, t - s.window));
    const int64_t oldest = s.first_token(s.groups(t) - s.slots(t));
    EXPECT(oldest <= std::max(s.sinks, t + s.sinks - s.reach()));
  }
}

// Distances of what a query sees, newest first, count 0, 1, 2, ... without a gap.
void test_slot_distances(const Schedule& s) {
  const Clock clock{s};
  for (int64_t t = 0; t < kTokens; ++t) {
    int64_t distance = 0;
    for (int64_t j = t; j >= s.window_begin(t); --j) EXPECT(t - j == distance++);
    if (t < s.sinks) {
      for (int64_t j = t; j >= 0; --j) EXPECT(clock.sink_query(t) - j == t - j);
      continue;
    }
    for (int64_t g = s.groups(t) - 1; g >= s.groups(t) - s.slots(t); --g) {
      EXPECT(clock.group_query(t) - clock.group_key(g) == static_cast<double>(distance++));
    }
    for (int64_t j = s.sinks - 1; j >= 0; --j) EXPECT(clock.sink_query(t) - j == distance++);
    EXPECT(distance <= s.max_slots());
  }
}

void test_token_distances(const Schedule& s) {
  const Clock clock{s, true};
  for (int64_t t = 0; t < kTokens; ++t) {
    EXPECT(clock.group_query(t) == t && clock.sink_query(t) == t);
    for (int64_t g = s.groups(t) - s.slots(t); g < s.groups(t); ++g) {
      double sum = 0;
      for (int64_t i = 0; i < s.ratio; ++i) sum += static_cast<double>(s.first_token(g) + i);
      EXPECT(clock.group_key(g) * static_cast<double>(s.ratio) == sum);
    }
  }
}

// The rings hold what a query needs once `max_rewind` tokens more have been written, whether they
// come after it or are taken back.
void test_rings(const Schedule& s) {
  for (int64_t max_rewind : {1, 2, 3, 7}) {
    const int64_t window = s.window_capacity(max_rewind);
    const int64_t compressed = s.compressed_capacity(max_rewind);
    EXPECT(s.compressed > 0 || compressed == 0);
    for (int64_t t = 0; t + max_rewind < kTokens; ++t) {
      const int64_t newest = t + max_rewind - 1;
      EXPECT(newest + 1 - s.window_begin(t) <= window);
      if (s.compressed > 0) {
        EXPECT(s.groups(newest) - (s.groups(t) - s.slots(t)) <= compressed);
      }
      EXPECT(s.groups(newest + 1) - s.groups(t) <= s.max_new_groups(max_rewind));
    }
  }
}

void test_large_numbers() {
  constexpr int64_t most = Schedule::kLimit;
  constexpr Schedule s{most, most, most, most, most};
  constexpr int64_t t = (int64_t{1} << 62) - 1;
  static_assert(s.groups(t) == (most * (t / most) - 2 * most) / most);
  static_assert(s.window_begin(t) > 0 && s.window_begin(t) <= t && s.reach() > 0 &&
                s.max_slots() > 0);
  static_assert(s.window_capacity(most) > 0 && s.compressed_capacity(most) > 0);
  EXPECT(s.slots(t) == most);
}

}  // namespace

int main() {
  for (int64_t window : {0, 1, 3, 8}) {
    for (int64_t compressed : {0, 1, 4}) {
      for (int64_t ratio : {1, 2, 3, 5}) {
        for (int64_t segment : {1, 2, 3, 4, 7, 16}) {
          for (int64_t sinks : {0, 1, 3}) {
            const Schedule s{window, compressed, ratio, segment, sinks};
            test_what_is_seen(s);
            test_slot_distances(s);
            test_token_distances(s);
            test_rings(s);
          }
        }
      }
    }
  }
  test_large_numbers();
  return ctx::test::status();
}
