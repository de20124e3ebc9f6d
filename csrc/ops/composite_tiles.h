// How a call is cut into tiles, and what forward and backward share.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <limits>

#include "ops/composite.h"
#include "ops/derivatives.h"
#include "ops/finite.h"
#include "ops/rings.h"
#include "ops/rotary.h"
#include "ops/settings.h"

namespace ctx::ops {

inline Rotary sinusoids(int64_t width) { return {width, inverse_frequencies(width, 10000.0)}; }

// x with another number in place of minus infinity.
inline at::Tensor infinite_to(double number, const at::Tensor& x) {
  return x.masked_fill(x.detach().eq(-std::numeric_limits<double>::infinity()), number);
}

inline at::Tensor nan_where(const at::Tensor& mask, at::ScalarType type) {
  return at::zeros(mask.sizes(), mask.options().dtype(type))
      .masked_fill(mask, std::numeric_limits<double>::quiet_NaN());
}

// On the CPU a tile is one row and as many tokens as keep its scores in cache, with only the keys
// that they can see; rows run in parallel. Elsewhere positions are not known to the host, and one
// tile is everything.
template <typename F>
void Composite::for_each_tile(const F& run) const {
  if (batch_ == 0 || tokens_ == 0) return;
  if (!t_.is_cpu() || is_transformed()) {
    Tile all{{0, batch_}, {0, tokens_}, {}};
    for (int region = 0; region < kRegions; ++region) all.keys[region] = {0, size(region)};
    return run(all);
  }
  if (recorded_) {  // by this thread, which has the tape
    for (int64_t b = 0; b < batch_; ++b) walk_row(b, run);
    return;
  }
  // In a parallel region also where there is one row: torch's products then run on one thread each,
  // and their bits do not depend on how many there are.
  at::parallel_for(0, std::max<int64_t>(batch_, 2), 1, [&](int64_t begin, int64_t end) {
    at::AutoDispatchBelowADInplaceOrView below;  // worker threads do not inherit it
    for (int64_t b = begin; b < std::min(end, batch_); ++b) walk_row(b, run);
  });
}

template <typename F>
void Composite::walk_row(int64_t b, const F& run) const {
  const Schedule& s = clock_.schedule;
  const int64_t most = std::min(s.max_slots(), size(kSinks) + size(kCompressed) + size(kWindow));
  const int64_t step =
      std::clamp<int64_t>(kTileScores / (heads_ * std::max<int64_t>(most, 1)), 16, 256);
  const auto value = [b](const at::Tensor& x, int64_t i) {
    return x.const_data_ptr<int64_t>()[b * x.stride(0) + i * x.stride(1)];
  };
  for (int64_t begin = 0; begin < tokens_; begin += step) {
    Tile tile{{b, b + 1}, {begin, std::min(begin + step, tokens_)}, {}};
    for (int64_t i = begin; i < tile.tokens.end; ++i) {
      const int64_t t = value(t_, i);
      const Ranges seen = visible(s, t);
      for (int region = 0; region < kRegions; ++region) {
        if (seen[region].size() <= 0) continue;
        const int64_t first = value(first_[region], i);
        Range& keys = tile.keys[region];
        const bool none = keys.size() == 0;
        keys.begin =
            none ? seen[region].begin - first : std::min(keys.begin, seen[region].begin - first);
        keys.end = none ? seen[region].end - first : std::max(keys.end, seen[region].end - first);
      }
    }
    for (int region = 0; region < kRegions; ++region) {  // tokens before the stream see too much
      tile.keys[region].begin = std::clamp<int64_t>(tile.keys[region].begin, 0, size(region));
      tile.keys[region].end =
          std::clamp<int64_t>(tile.keys[region].end, tile.keys[region].begin, size(region));
    }
    run(tile);
  }
}

}  // namespace ctx::ops
