// The law: which tokens a query sees, as pure integers.
//
// A stream's tokens are numbered t = 0, 1, 2, ...; whatever a compressive memory holds at any
// moment follows from these numbers alone. Kernels, rings, the training path and the bindings all
// take their indices from this header, so that no two of them can disagree. It needs neither Torch
// nor a device.
//
//   window  (M) exact tokens that every query is guaranteed to see behind it
//   compressed (C) capacity of the compressive memory, in slots
//   ratio   (c) tokens that become one compressed slot
//   segment (S) eviction happens only at absolute positions that are multiples of S
//   sinks   (A) first tokens of a stream, kept exactly for ever
//   overlap tokens left of a group that its compressor reads, too: they stay stored a little longer,
//           and nothing that a query sees depends on it; memories take it from their compressor
//
// Rae et al. 2019 (arXiv:1911.05507) is segment = n_s, sinks = 0; tokens that wait for their group
// to fill stay exact and visible here, where the authors' code pads them with zeros.
#pragma once

#include <cstdint>

#include "ctx/export.h"

namespace ctx {

struct Schedule {
  int64_t window = 0;
  int64_t compressed = 0;
  int64_t ratio = 1;
  int64_t segment = 1;
  int64_t sinks = 0;
  int64_t overlap = 0;

  // Largest value of any setting: leaves every product of two of them, and every position below
  // 2^62, inside int64.
  static constexpr int64_t kLimit = int64_t{1} << 30;
  static constexpr int64_t kLastPosition = (int64_t{1} << 62) - 1;

  // Groups compressed before the segment of token t began, for t >= 0; 0 for t = -1, "nothing seen
  // yet".
  CTX_HOST_DEVICE constexpr int64_t groups(int64_t t) const {
    if (t < 0) return 0;
    const int64_t left = segment * (t / segment) - sinks -
                         window;  // tokens behind the window at the segment's start
    return left > 0 ? left / ratio : 0;
  }

  // First token that is still held exactly in the window when token t attends.
  CTX_HOST_DEVICE constexpr int64_t window_begin(int64_t t) const { return first_token(groups(t)); }

  // Compressed slots that token t attends to: groups(t) - slots(t) ... groups(t) - 1.
  CTX_HOST_DEVICE constexpr int64_t slots(int64_t t) const {
    const int64_t n = groups(t);
    return n < compressed ? n : compressed;
  }

  // Sinks that token t attends to: 0 ... visible_sinks(t) - 1.
  CTX_HOST_DEVICE constexpr int64_t visible_sinks(int64_t t) const {
    return t + 1 < sinks ? t + 1 : sinks;
  }

  // First token of group g, and the middle of its tokens. Int, Real: numbers, or tensors of numbers.
  template <typename Int>
  CTX_HOST_DEVICE constexpr Int first_token(const Int& g) const {
    return sinks + ratio * g;
  }
  template <typename Real>
  CTX_HOST_DEVICE constexpr Real centre(const Real& g) const {
    return sinks + ratio * g + (ratio - 1) / 2.0;
  }

  // Tokens of so many groups.
  CTX_HOST_DEVICE constexpr int64_t tokens_of(int64_t groups) const { return ratio * groups; }

  // The group of token t, which is no sink, and the token's place in it.
  CTX_HOST_DEVICE constexpr int64_t group_of(int64_t t) const { return (t - sinks) / ratio; }
  CTX_HOST_DEVICE constexpr int64_t place_in_group(int64_t t) const { return (t - sinks) % ratio; }

  // Tokens from t on to the end of its segment, itself included.
  CTX_HOST_DEVICE constexpr int64_t segment_left(int64_t t) const { return segment - t % segment; }

  // A call's places are cut into blocks of `ratio`, from the place of its first token on: the block
  // in which group g begins, if its stream starts at place `start` (negative: before the call). No
  // two whole groups begin in the same block, and the next group of a stream begins in the next one.
  CTX_HOST_DEVICE constexpr int64_t block_of(int64_t start, int64_t g) const {
    const int64_t first = start + sinks;
    const int64_t below = first % ratio < 0;  // division rounds to zero, a block's is down
    return first / ratio - below + g;
  }

  // The longest window any query attends to, itself included.
  CTX_HOST_DEVICE constexpr int64_t max_window() const { return window + segment + ratio - 1; }

  // The most slots any query attends to, of all three regions.
  CTX_HOST_DEVICE constexpr int64_t max_slots() const { return sinks + compressed + max_window(); }

  // Tokens that the memory reaches back to, exactly or compressed.
  CTX_HOST_DEVICE constexpr int64_t reach() const { return sinks + ratio * compressed + window; }

  // The most groups that can fall due while the position advances by `tokens`. Int: int64_t, or a
  // symbol of the same arithmetic.
  template <typename Int>
  CTX_HOST_DEVICE constexpr Int max_new_groups(Int tokens) const {
    const Int boundaries = (tokens + (segment - 1)) / segment;
    return (boundaries * segment + (ratio - 1)) / ratio;
  }

  // Ring sizes that let `max_rewind` tokens be written before the first of them attends, and
  // `max_rewind` tokens be taken back again. A token's index is its position modulo the capacity, a
  // slot's its group modulo the capacity.
  template <typename Int>
  CTX_HOST_DEVICE constexpr Int window_capacity(Int max_rewind) const {
    return max_rewind + max_window() + overlap;
  }
  template <typename Int>
  CTX_HOST_DEVICE constexpr Int compressed_capacity(Int max_rewind) const {
    return compressed == 0 ? Int(0) : max_new_groups(Int(max_rewind - 1)) + compressed;
  }

  constexpr bool operator==(const Schedule&) const = default;

  // Throws ValueError (c10::ValueError) naming the first setting that is out of range.
  CTX_API void validate() const;
};

// How far the query of token t is from what it sees (semantics: distance "slot" is contiguous over
// all three regions and bounded; distance "token" is the true one). Keys are rotated once, when
// written, to key_position; each region has a clock, and the query is rotated to it.
struct Clock {
  Schedule schedule;
  bool token_distance = false;

  CTX_HOST_DEVICE constexpr double group_key(int64_t g) const {
    return token_distance ? schedule.centre(static_cast<double>(g)) : static_cast<double>(g);
  }
  CTX_HOST_DEVICE constexpr int64_t group_query(int64_t t) const {
    return token_distance ? t : t - schedule.window_begin(t) + schedule.groups(t);
  }
  CTX_HOST_DEVICE constexpr int64_t sink_query(int64_t t) const {
    return token_distance ? t : t - schedule.window_begin(t) + schedule.slots(t) + schedule.sinks;
  }
};

// Examples, checked whenever this header is compiled: window 8, 4 slots of 4 tokens, segments of 8.
namespace examples {
constexpr Schedule kPaper{8, 4, 4, 8, 0};
static_assert(kPaper.groups(-1) == 0 && kPaper.groups(15) == 0);
static_assert(kPaper.groups(16) == 2 && kPaper.window_begin(16) == 8 && kPaper.slots(16) == 2);
static_assert(kPaper.groups(23) == 2 && kPaper.groups(24) == 4 && kPaper.slots(40) == 4);
static_assert(kPaper.max_window() == 19 && kPaper.max_slots() == 23 && kPaper.reach() == 24);
// Token-level streaming with sinks: tokens wait for their group to fill.
constexpr Schedule kStream{3, 2, 5, 1, 2};
static_assert(kStream.groups(9) == 0 && kStream.groups(10) == 1 && kStream.groups(14) == 1 &&
              kStream.groups(15) == 2);
static_assert(kStream.window_begin(14) == 7 && 14 - kStream.window_begin(14) + 1 == 8 &&
              kStream.max_window() == 8);
// The distance of a group is contiguous with the window's: its newest group is one further than the
// window's oldest.
static_assert(Clock{kPaper}.group_query(30) - 3 == 30 - kPaper.window_begin(30) + 1);
}  // namespace examples

}  // namespace ctx
