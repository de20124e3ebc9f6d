// How the work of a block is cut: tokens into tiles, which read a slot once for several rows, and a
// tile's slots into parts, as few heads would leave threads without work. Both follow from sizes
// alone, so that the number of threads changes no bit.
#pragma once

#include <bit>

#include "kernels/cpu/scores.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

inline constexpr int64_t kTileRows =
    32;  // query heads times tokens that a block of slots is read for
inline constexpr int64_t kFewestSlots = 256;  // of a part that a thread takes
inline constexpr int64_t kParts = 64;  // of a row's kv heads together: enough for most threads

// Tokens of one row that attend together, for one kv head.
struct TokenTile {
  int64_t b = 0;
  int64_t kv = 0;
  int64_t begin = 0;  // tokens of the block
  int64_t end = 0;
  int64_t index = 0;  // among all tiles
};

// Cuts a block's work into tiles, and a tile's slots into parts.
class Tiling {
 public:
  explicit Tiling(const AttendArgs& args)
      : args_(args),
        m_(args.memory),
        q_per_kv_(args.heads / m_.kv_heads),
        tile_tokens_(std::clamp<int64_t>(kTileRows / q_per_kv_, 1, args.block.tokens)),
        tiles_((args.block.tokens + tile_tokens_ - 1) / tile_tokens_) {
    const int64_t slots = m_.clock.schedule.sinks + m_.compressed_capacity + m_.window_capacity;
    parts_ = parts(slots);
    work_ = slots * q_per_kv_ * tile_tokens_ * (m_.head_dim + m_.value_dim) / parts_;
  }

  int64_t tiles() const { return m_.batch * m_.kv_heads * tiles_; }
  int64_t most_parts() const { return parts_; }
  int64_t work() const { return work_; }  // multiply-adds of a part
  int64_t most_rows() const { return tile_tokens_ * q_per_kv_; }

  TokenTile tile(int64_t index) const {
    const int64_t begin = index % tiles_ * tile_tokens_;
    const int64_t head = index / tiles_;
    return {head / m_.kv_heads,
            head % m_.kv_heads,
            begin,
            std::min(begin + tile_tokens_, args_.block.tokens),
            index};
  }

  // The rows of a tile's tokens that are the stream's.
  QueryRows rows(const TokenTile& tile) const {
    const int64_t begin = std::max(tile.begin, -args_.block.first(tile.b));
    const int64_t end = std::min(tile.end, args_.block.count(tile.b));
    return {tile.b, args_.block.row(tile.b), tile.kv, q_per_kv_, {begin, std::max(begin, end)}};
  }

  QueryRows token(QueryRows rows, int64_t i) const {
    rows.tokens = {i, i + 1};
    return rows;
  }

  // What the first of the rows' tokens sees.
  Ranges visible(const QueryRows& rows) const {
    return ctx::visible(m_.clock.schedule, args_.block.first(rows.b) + rows.tokens.begin);
  }

  // What all tokens see: what the last one still sees of what the first one saw.
  Ranges common(const QueryRows& rows) const {
    const Ranges first = visible(rows);
    Ranges both = visible(token(rows, rows.tokens.end - 1));
    for (int64_t region = 0; region < kRegions; ++region)
      both[region].end = std::max(both[region].begin, first[region].end);
    return both;
  }

  // A power of two, so that as many threads have as much to do, and no more of them than there will
  // be threads, as they have to be merged. Several tiles of tokens are enough work without it.
  int64_t parts(int64_t slots) const {
    if (tiles_ > 1 || slots < kFewestSlots) return 1;
    const int64_t enough = (kParts + m_.kv_heads - 1) / m_.kv_heads;
    return static_cast<int64_t>(
        std::min(std::bit_floor(static_cast<uint64_t>(slots / kFewestSlots)),
                 std::bit_ceil(static_cast<uint64_t>(enough))));
  }

 private:
  const AttendArgs& args_;
  const MemoryView& m_;
  int64_t q_per_kv_;
  int64_t tile_tokens_;
  int64_t tiles_;
  int64_t parts_;
  int64_t work_;
};

inline int64_t slots_of(const Ranges& ranges) {
  int64_t slots = 0;
  for (const Range& range : ranges.of) slots += range.size();
  return slots;
}

// Number `part` of `parts` equal ones of all slots of the three regions.
inline Ranges part_of(Ranges all, int64_t part, int64_t parts) {
  const int64_t slots = slots_of(all);
  int64_t skip = slots * part / parts;
  int64_t take = slots * (part + 1) / parts - skip;
  for (Range& range : all.of) {
    const int64_t skipped = std::min(skip, range.size());
    const int64_t taken = std::min(take, range.size() - skipped);
    range = {range.begin + skipped, range.begin + skipped + taken};
    skip -= skipped;
    take -= taken;
  }
  return all;
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
