// Random arguments of the differentiable path: three spans, each with a past in a ring or without, and
// queries at any positions. What a query sees of a span follows from its position and the number of
// the span's first key in its stream, whatever both are.
#pragma once

#include "attend_reference.h"

namespace ctx::test {

class SpansCase {
 public:
  SpansCase(Random& random, const Wish& wish)
      : random_(random), aligned_(!wish.small && !random.one_in(4)), w(random, wish) {
    w.kind = CompressorKind::kMean;
    law.make(random, w, wish.small);
    tokens = random.between(1, random.coin() ? 5 : 24);
    position.assign(size_t(w.batch * tokens), 0);
    for (size_t i = 0; i < position.size(); ++i)
      position[i] = random.one_in(8) ? -1 : random.between(0, 40);
    const auto make = [&](Rows& x, int64_t heads, int64_t n, int64_t width) {
      x.make(random_, w.storage, w.batch, heads, n, width);
      x.fill(random_, 1.0);
    };
    make(q, w.heads(), tokens, w.head_dim), make(out, w.heads(), tokens, w.value_dim);
    if (law.relative_dim > 0) {
      make(law.relative, w.heads(), tokens, law.relative_dim);
      make(law.compressed_relative, w.heads(), tokens, law.relative_dim);
    }
    for (int region = 0; region < kRegions; ++region) make_span(region);
    const size_t rows = w.batch * w.heads() * tokens;
    logsumexp.assign(rows * cuda::size_of(w.arithmetic), char{});
    region_weights.assign(rows * kRegions * cuda::size_of(w.arithmetic), char{});
  }

  struct SpanData {
    int64_t past = 0, fresh = 0;
    Ring ring[2];
    WideNumbers ring_mass;
    Rows rows[2];
    WideNumbers mass;  // of the fresh keys
    Buffer<int64_t> past_first, first;
  };

  SpansArgs args() {
    SpansArgs a;
    a.clock = w.clock, a.rotary = w.rotary(), a.storage = w.storage;
    a.batch = w.batch, a.heads = w.heads(), a.kv_heads = w.kv_heads, a.tokens = tokens;
    a.head_dim = w.head_dim, a.value_dim = w.value_dim;
    a.scale = law.scale, a.logit_softcap = law.softcap;
    a.bias = law.bias.size() > 0 ? law.bias.device() : nullptr;
    a.slopes = law.slopes.size() > 0 ? law.slopes.device() : nullptr;
    a.position = position.device();
    a.queries = q.strided(), a.out = out.strided();
    a.relative.dim = law.relative_dim;
    if (law.relative_dim > 0) {
      a.relative.queries = law.relative.strided();
      a.relative.compressed = law.compressed_relative.strided();
    }
    for (int region = 0; region < kRegions; ++region) {
      SpanData& s = spans[region];
      Span& span = a.spans[region];
      span.size = s.past + s.fresh;
      span.first = s.first.device();
      span.keys = s.rows[0].strided(), span.values = s.rows[1].strided();
      span.mass = s.mass.size() > 0 ? s.mass.device() : nullptr;
      span.past.size = s.past, span.past.capacity = s.ring[0].capacity;
      span.past.storage = s.ring[0].storage;
      span.past.keys = s.ring[0].bytes.device(), span.past.values = s.ring[1].bytes.device();
      span.past.first = s.past_first.device();
      span.past.mass = s.ring_mass.size() > 0 ? s.ring_mass.device() : nullptr;
    }
    a.logsumexp = logsumexp.device();
    a.region_weights = region_weights.device();
    return a;
  }

  // Key j of a span, for token i.
  AttendedKey key(int64_t b, int64_t kv, int region, int64_t i, int64_t j) {
    SpanData& s = spans[region];
    AttendedKey made;
    for (int side = 0; side < 2; ++side) {
      std::vector<double>& to = side == 0 ? made.key : made.value;
      if (j >= s.past) {
        to = s.rows[side].row(b, kv, j - s.past);
        continue;
      }
      const Ring& ring = s.ring[side];
      for (int64_t d = 0; d < ring.width; ++d) to.push_back(ring.get(b, kv, entry(s, b, j), d));
    }
    const int64_t head = b * w.kv_heads + kv;
    if (j < s.past) {
      if (s.ring_mass.size() > 0)
        made.mass = s.ring_mass[head * s.ring[0].capacity + entry(s, b, j)];
    } else if (s.mass.size() > 0) {
      made.mass = s.mass[head * s.fresh + j - s.past];
    }
    const int64_t t = position[b * tokens + i], number = s.first[b * tokens + i] + j;
    made.distance = double(query_clock(w.clock, region, t)) - key_clock(w.clock, region, number);
    return made;
  }

  // Some keys and values become NaN: nothing, to the queries that do not see them.
  void spoil() {
    for (SpanData& s : spans) {
      for (int64_t times = random_.between(0, 2); times > 0 && s.fresh > 0; --times) {
        const int64_t b = random_.between(0, w.batch - 1), h = random_.between(0, w.kv_heads - 1);
        Rows& rows = s.rows[random_.between(0, 1)];
        rows.set(b, h, random_.between(0, s.fresh - 1), 0, std::nan(""));
      }
    }
  }

  // What token i sees of a span.
  Range seen(int64_t b, int region, int64_t i) {
    const int64_t t = position[b * tokens + i], size = spans[region].past + spans[region].fresh;
    if (t < 0) return {};
    const Range numbers = visible(w.clock.schedule, t)[region];
    const int64_t first = spans[region].first[b * tokens + i];
    const int64_t begin = std::clamp<int64_t>(numbers.begin - first, 0, size);
    return {begin, std::clamp<int64_t>(numbers.end - first, begin, size)};
  }

 private:
  Random& random_;
  bool aligned_;

 public:
  World w;
  ScoreLaw law;
  int64_t tokens;
  Buffer<int64_t> position;
  Rows q, out;
  SpanData spans[kRegions];
  Buffer<char> logsumexp, region_weights;

 private:
  static int64_t entry(const SpanData& s, int64_t b, int64_t j) {
    return (s.past_first[b] + j) % s.ring[0].capacity;
  }

  void make_span(int region) {
    SpanData& s = spans[region];
    s.fresh = random_.one_in(5) ? 0 : random_.between(1, region == kWindow ? 70 : 40);
    if (random_.coin()) s.past = random_.between(1, 20);
    const Storage stored = region == kCompressed ? w.compressed_storage : w.storage;
    for (int side = 0; side < 2; ++side) {
      const int64_t width = side == 0 ? w.head_dim : w.value_dim;
      s.rows[side].make(random_, w.storage, w.batch, w.kv_heads, s.fresh, width, aligned_);
      s.rows[side].fill(random_, 1.0);
      Ring& ring = s.ring[side];
      const int64_t capacity = s.past == 0 ? 0
                               : side == 0 ? s.past + random_.between(0, 4)
                                           : s.ring[0].capacity;
      ring.make(stored, w.batch, w.kv_heads, capacity, width);
      for (int64_t r = 0; r < w.batch * w.kv_heads * capacity; ++r) {
        char* row = ring.bytes.host() + r * ring.row_bytes();
        for (int64_t d = 0; d < width; ++d) {
          if (stored == Storage::kInt8) {
            row[d] = static_cast<char>(random_.between(-127, 127));
          } else {
            store_number(stored, row + d * cuda::size_of(stored), random_.number());
          }
        }
        if (stored == Storage::kInt8)
          store_number(Storage::kFloat32, row + width, (0.5 + random_.number() / 3) / 127);
      }
    }
    s.past_first.assign(w.batch, 0);
    for (int64_t b = 0; b < w.batch; ++b) s.past_first[b] = random_.between(0, 50);
    s.first.assign(size_t(w.batch * tokens), 0);
    for (size_t i = 0; i < s.first.size(); ++i) {
      const int64_t t = position[i] < 0 ? 0 : position[i];
      s.first[i] = visible(w.clock.schedule, t)[region].begin - random_.between(-3, 30);
    }
    if (region != kCompressed || !random_.coin()) return;
    s.ring_mass.assign(w.arithmetic, size_t(w.batch * w.kv_heads * s.ring[0].capacity), 0.0);
    for (size_t i = 0; i < s.ring_mass.size(); ++i) s.ring_mass.set(i, random_.number());
    s.mass.assign(w.arithmetic, size_t(w.batch * w.kv_heads * s.fresh), 0.0);
    for (size_t i = 0; i < s.mass.size(); ++i) s.mass.set(i, random_.number());
  }
};

}  // namespace ctx::test
