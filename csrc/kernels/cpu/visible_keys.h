// Which keys of each span the queries of a block see, one query per vector lane.
#pragma once

#include <algorithm>
#include <vector>

#include "kernels/cpu/lanes.h"
#include "ops/kernels.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

template <typename A>
class VisibleKeys {
 public:
  using Integer = LaneInteger<A>;

  explicit VisibleKeys(int64_t most_lanes)
      : most_lanes_(most_lanes), numbers_(kRegions * 2 * most_lanes) {}

  // Begins a span of `size` keys: no lane sees any, until set().
  void clear(int64_t span, int64_t size) {
    std::fill_n(begins(span), 2 * most_lanes_, Integer(0));
    by_some_[span] = {}, by_all_[span] = {0, size};
  }

  // What a lane sees. Lanes that are not set are there to fill vectors, and count for nothing.
  void set(int64_t span, int64_t lane, Range keys) {
    begins(span)[lane] = static_cast<Integer>(keys.begin);
    begins(span)[lane + most_lanes_] = static_cast<Integer>(keys.end);
    Range& some = by_some_[span];
    Range& all = by_all_[span];
    if (keys.size() > 0) {
      const bool none = some.size() == 0;
      some.begin = none ? keys.begin : std::min(some.begin, keys.begin);
      some.end = none ? keys.end : std::max(some.end, keys.end);
    }
    all.begin = std::max(all.begin, keys.begin);
    all.end = std::min(all.end, keys.end);
  }

  Range of(int64_t span, int64_t lane) const {
    const Integer* begin = begins(span) + lane;
    return {begin[0], begin[most_lanes_]};
  }
  const Range& by_some(int64_t span) const { return by_some_[span]; }
  const Range& by_all(int64_t span) const { return by_all_[span]; }

  // The lanes of the vector at `v` that see a key: all bits set.
  struct Seers {
    typename VectorOf<Integer>::type begin, end;
    auto of(Integer key) const { return (key >= begin) & (key < end); }
  };
  Seers seers(int64_t span, int64_t v) const {
    const Integer* begin = begins(span) + v;
    return {load_integers<A>(begin), load_integers<A>(begin + most_lanes_)};
  }

 private:
  Integer* begins(int64_t span) { return numbers_.data() + span * 2 * most_lanes_; }
  const Integer* begins(int64_t span) const { return numbers_.data() + span * 2 * most_lanes_; }

  int64_t most_lanes_;
  std::vector<Integer> numbers_;  // [spans, 2, lanes]: the first key, and the one behind the last
  Range by_some_[kRegions];       // from the first key that some query sees to the last
  Range by_all_[kRegions];        // keys that all queries see
};

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
