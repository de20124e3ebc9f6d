// One attention for memories and for the differentiable path: three regions, each of one or two parts
// whose rows lie in a ring or in a tensor of the call, and what every query sees of them. The two tilings
// (attend_core.cuh, attend_mma.cuh) and the backward read all of it from here.
#pragma once

#include "kernels/cuda/rotary.cuh"

namespace ctx::cuda {

// Keys that are stored alike. Key x of a part, 0 <= x < size, has a base number, from which a query
// gets the key's number in its own stream by adding its shift (TokenView).
struct Part {
  enum Kind : int {
    kRing,  // the ring of a memory: key x is entry x, its base number the newest one of that entry
    kPast,  // the keys of a span that lie in a ring: base number x
    kFresh  // the keys of a span that are the call's: base number x + `before`
  };
  Kind kind;
  int region;
  Storage storage;
  int64_t size;
  int64_t before;          // keys of the span before this part
  int64_t capacity;        // of the ring
  const int64_t* first;    // kPast: the number of key 0, [B]
  const int64_t* rows;     // kPast: the row of the ring, [B]; null: the same
  Strided keys, values;    // strides count bytes
  const void* ring_mass;   // [B, Hkv, capacity] in the arithmetic's type; null: none
  const void* fresh_mass;  // [B, Hkv, size] in the arithmetic's type; null: none
};

struct Attention {
  Clock clock;
  Rotary rotary;
  Storage storage;
  int64_t batch, heads, kv_heads, tokens, head_dim, value_dim;
  double scale, softcap;
  const void *bias, *slopes;
  Strided queries, out;
  RelativeQueries relative;
  Block block;                     // of a memory's call; else
  const int64_t* position;         // [B, T]
  const int64_t* first[kRegions];  // [B, T]: number of key 0 of each span; null: 0
  const int64_t* slot_positions;   // [B, Hkv, capacity] of the compressed ring; null: none
  int parts;
  Part part[2 * kRegions];
  void* logsumexp;       // [B, H, T] in the arithmetic's type; null: not asked for
  void* region_weights;  // [B, H, call_tokens, 3], of token `offset` on; null: not asked for
  int64_t call_tokens, offset;
  int64_t split_length;  // keys of a part that a block takes; 0: all parts
  int64_t splits;
  void* workspace;  // partial sums: [B, H, T, splits, value_dim + 1 + regions]

  CTX_HOST_DEVICE int64_t q_per_kv() const { return heads / kv_heads; }
};

// What the query of a token sees: base numbers low ... high - 1 of every region.
struct TokenView {
  int64_t t;  // negative: the token is none, and sees nothing
  int64_t low[kRegions], high[kRegions], shift[kRegions];
  double clock[kRegions];  // where its query is rotated to; of fill_views() only
};

// The position of token i of the call; negative: it is none.
CTX_DEVICE int64_t token_position(const Attention& a, int64_t b, int64_t i) {
  if (a.position != nullptr)
    return clamped(a.position[b * a.tokens + i], -1, Schedule::kLastPosition / 2);
  const BlockRow row(a.block, b);
  return row.has(i) ? row.first + i : -1;
}

CTX_DEVICE_CALL TokenView token_view(const Attention& a, int64_t b, int64_t i) {
  constexpr int64_t kLast = Schedule::kLastPosition / 2;
  TokenView view;
  view.t = token_position(a, b, i);
  const Ranges seen = view.t < 0 ? Ranges{} : visible(a.clock.schedule, view.t);
  for (int region = 0; region < kRegions; ++region) {
    view.shift[region] =
        a.first[region] == nullptr ? 0 : clamped(a.first[region][b * a.tokens + i], -kLast, kLast);
    view.low[region] = seen[region].begin - view.shift[region];
    view.high[region] = seen[region].end - view.shift[region];
  }
  return view;
}

// Where the query of a token is rotated to for a region.
CTX_DEVICE_CALL double query_position(const Attention& a, int region, int64_t t) {
  if (CTX_PLANTED(kWrongClock) && region == kCompressed) region = kWindow;
  return static_cast<double>(query_clock(a.clock, region, t));
}

// The views of `count` tokens from `first` on, by four warps; the first one makes what is seen, and
// the others a clock each. Ends with a barrier.
CTX_DEVICE void fill_views(
    const Attention& a, int64_t b, int64_t first, int count, TokenView* views) {
  const int warp = threadIdx.x / 32;
  for (int j = threadIdx.x % 32; j < count; j += 32) {
    const int64_t i = first + j;
    if (warp == 0) {
      TokenView view = {};
      view.t = -1;
      if (i < a.tokens) view = token_view(a, b, i);
      views[j].t = view.t;
      for (int region = 0; region < kRegions; ++region) {
        views[j].low[region] = view.low[region], views[j].high[region] = view.high[region];
        views[j].shift[region] = view.shift[region];
      }
    } else {
      const int64_t t = i < a.tokens ? token_position(a, b, i) : -1;
      views[j].clock[warp - 1] = t < 0 ? 0.0 : query_position(a, warp - 1, t);
    }
  }
  __syncthreads();
}

// Base numbers that some of `count` tokens see, from the first to the last.
CTX_DEVICE_CALL Range hull_of(const TokenView* views, int64_t count, int region) {
  Range hull;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t low = views[i].low[region], high = views[i].high[region];
    if (high <= low) continue;
    const bool none = hull.size() == 0;
    hull.begin = none || low < hull.begin ? low : hull.begin;
    hull.end = none || high > hull.end ? high : hull.end;
  }
  return hull;
}

// A part for one row and kv head, and the queries that see `hull` of its region. Places of keys are
// 32-bit numbers: rings and spans have fewer than 2^31 keys (attention_of() sees to it).
struct PartView {
  const Part& part;
  Range hull;  // what of it the part can hold
  int seen;    // its size
  int first;   // kPast: entry of key 0; kRing: entry of the newest key; kFresh, kPast: see offset()
  int shift;
  int capacity, size;
  Part::Kind kind;
  const char *keys, *values;
  int64_t key_stride, value_stride;  // in bytes
  int64_t head;                      // of [B, Hkv], in a ring of its [rows, Hkv]

  CTX_DEVICE PartView(const Attention& a, const Part& p, int64_t b, int64_t kv, Range range)
      : part(p),
        hull(range),
        first(0),
        shift(0),
        capacity(static_cast<int>(p.capacity)),
        size(static_cast<int>(p.size)),
        kind(p.kind),
        key_stride(p.keys.token),
        value_stride(p.values.token) {
    const int64_t held = held_row(a, p, b);
    head = held * a.kv_heads + kv;
    if (p.kind == Part::kRing) {
      const int64_t low = hull.end - p.capacity;
      hull.begin = hull.begin < low ? low : hull.begin;
      first = static_cast<int>(place_in_ring(hull.end - 1, p.capacity));
    } else {
      hull.begin = clamped(hull.begin, p.before, p.before + p.size);
      hull.end = clamped(hull.end, hull.begin, p.before + p.size);
      shift = static_cast<int>(p.before - hull.begin);
      if (p.kind == Part::kPast) first = static_cast<int>(place_in_ring(p.first[b], p.capacity));
    }
    seen = static_cast<int>(hull.size());
    keys = static_cast<const char*>(p.keys.data) + held * p.keys.batch + kv * p.keys.head;
    values = static_cast<const char*>(p.values.data) + held * p.values.batch + kv * p.values.head;
  }

  // The row of the part's keys that row b of the call is.
  static CTX_DEVICE int64_t held_row(const Attention& a, const Part& p, int64_t b) {
    if (p.kind == Part::kRing) return a.block.row(b);
    return p.rows == nullptr ? b : p.rows[b];
  }

  // Which number of the hull key x is: 0 ... seen - 1, or another number where it is none.
  CTX_DEVICE int offset(int x) const {
    if (kind != Part::kRing) return x + shift;
    const int behind = first - x;  // the newest key
    return seen - 1 - (behind < 0 ? behind + capacity : behind);
  }
  CTX_DEVICE int64_t base(int64_t x) const { return hull.begin + offset(static_cast<int>(x)); }
  CTX_DEVICE bool in_hull(int64_t x) const {
    return static_cast<unsigned>(offset(static_cast<int>(x))) < static_cast<unsigned>(seen);
  }
  CTX_DEVICE int64_t entry(int64_t x) const {
    if (kind != Part::kPast) return x;
    const int64_t entry = first + x;
    return entry < capacity ? entry : entry - capacity;
  }
  CTX_DEVICE const char* key(int64_t x) const { return keys + entry(x) * key_stride; }
  CTX_DEVICE const char* value(int64_t x) const { return values + entry(x) * value_stride; }

  // Whether some key x ... x + count - 1 is in the hull.
  CTX_DEVICE bool touches(int64_t x, int64_t count) const {
    if (seen <= 0 || count <= 0) return false;
    const int begin = offset(static_cast<int>(x)), last = offset(static_cast<int>(x + count - 1));
    if (kind != Part::kRing) return begin < seen && last >= 0;
    // Keys become newer from one to the next, but for the one behind the newest.
    return last >= 0 || begin > last;
  }

  template <typename A>
  CTX_DEVICE A mass(int64_t x) const {
    if (part.ring_mass != nullptr)
      return static_cast<const A*>(part.ring_mass)[head * part.capacity + entry(x)];
    if (part.fresh_mass != nullptr)
      return static_cast<const A*>(part.fresh_mass)[head * part.size + x];
    return A(0);
  }
};

// From the query of token t to a key of a region.
CTX_DEVICE_CALL double clock_distance(const Clock& clock, int region, int64_t t, int64_t number) {
  return static_cast<double>(query_clock(clock, region, t)) - key_clock(clock, region, number);
}

CTX_DEVICE double distance(const Attention& a,
                           const TokenView& view,
                           const PartView& part,
                           int64_t x) {
  const int region = part.part.region;
  if (region == kCompressed && a.clock.token_distance && a.slot_positions != nullptr)
    return static_cast<double>(view.t -
                               a.slot_positions[part.head * part.part.capacity + part.entry(x)]);
  return clock_distance(a.clock, region, view.t, part.base(x) + view.shift[region]);
}

// From a product of query and key (and the relative part) to a score; `slope_of_cap`: its derivative
// by what is before the cap.
template <typename A>
CTX_DEVICE A finish_score(const Attention& a,
                          const TokenView& view,
                          const PartView& part,
                          int64_t x,
                          int64_t head,
                          A product,
                          A* slope_of_cap = nullptr) {
  A score = product * static_cast<A>(a.scale);
  if (a.softcap > 0) {
    const A cap = static_cast<A>(a.softcap);
    const A bent = hyperbolic_tangent(score / cap);
    score = cap * bent;
    if (slope_of_cap != nullptr) *slope_of_cap = A(1) - bent * bent;
  } else if (slope_of_cap != nullptr) {
    *slope_of_cap = A(1);
  }
  if (part.part.region == kCompressed) {
    if (a.bias != nullptr) score += static_cast<const A*>(a.bias)[head];
  }
  score += part.mass<A>(x);
  if (a.slopes != nullptr)
    score -= static_cast<const A*>(a.slopes)[head] * static_cast<A>(distance(a, view, part, x));
  return score;
}

CTX_DEVICE bool sees(const TokenView& view, const PartView& part, int64_t x) {
  const int64_t n = part.base(x);
  return n >= view.low[part.part.region] && n < view.high[part.part.region];
}

// Numbers of a rotated query: those of a pair, or a single one behind the pairs.
template <typename A>
struct QueryPiece {
  A x, y;
  int64_t first, second;  // their places; second < 0: there is no y
};

// Piece `piece` of the query of head `head` and token i, not scaled; zero where it is not `present`.
template <typename T>
CTX_DEVICE_CALL QueryPiece<Acc<T>> query_piece(const Attention& a,
                                               int64_t b,
                                               int64_t head,
                                               int64_t i,
                                               double position,
                                               bool present,
                                               int64_t piece) {
  using A = Acc<T>;
  const int64_t half = a.rotary.dim / 2;
  const T* from = row<T>(a.queries, b, head, i);
  if (piece >= half) return {present ? wide<A>(from[piece + half]) : A(0), A(0), piece + half, -1};
  const PairPlace place = pair_place(a.rotary, piece);
  if (!present) return {A(0), A(0), place.first, place.second};
  A sine, cosine;
  sine_and_cosine(position * a.rotary.inv_freq[piece], sine, cosine);
  const A factor = static_cast<A>(a.rotary.attention_factor);
  const A c = cosine * factor, s = sine * factor;
  const A p = wide<A>(from[place.first]), q = wide<A>(from[place.second]);
  return {p * c - q * s, q * c + p * s, place.first, place.second};
}
CTX_DEVICE int64_t query_pieces(const Attention& a) { return a.head_dim - a.rotary.dim / 2; }

// 10000^(-2i/dim)
CTX_DEVICE double relative_frequency(int64_t i, int64_t dim) {
  return exp(-2.0 * static_cast<double>(i) / static_cast<double>(dim) * 9.210340371976182736);
}

}  // namespace ctx::cuda
