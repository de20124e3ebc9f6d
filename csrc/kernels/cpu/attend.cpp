// One softmax over sinks, compressed slots and window. A region is a ring, so what a query sees of
// it is at most two contiguous pieces; they are walked in blocks, each block read once for all
// query heads that share it and for some neighbouring tokens.
#include <ATen/Parallel.h>

#include "kernels/cpu/scores.h"
#include "kernels/cpu/softmax.h"
#include "kernels/cpu/table.h"
#include "kernels/cpu/tiling.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {
namespace {

template <typename T>
class Attention {
 public:
  using A = Acc<T>;

  Attention(const AttendArgs& args,
            const Tiling& tiling,
            const RotatedQueries<A>& queries,
            A* states)
      : args_(args), m_(args.memory), tiling_(tiling), queries_(queries), states_(states) {}

  // Attends to one part of what a tile sees; a tile of one part is done then.
  void attend(const TokenTile& tile, int64_t part) const {
    const QueryRows rows = tiling_.rows(tile);
    if (part == 0) store_absent(tile, rows);
    if (rows.count() == 0) return;
    const Ranges all = tiling_.common(rows);
    const int64_t parts = tiling_.parts(slots_of(all));
    if (part >= parts) return;
    Softmax<A> state = softmax(tile, rows, part);
    state.clear();
    walk(state, rows, part_of(all, part, parts));
    if (part == parts - 1) walk_rest(state, rows, all);
    if (parts == 1) store(state, rows);
  }

  // Merges the parts of a tile, in their order.
  void merge(const TokenTile& tile) const {
    const QueryRows rows = tiling_.rows(tile);
    if (rows.count() == 0) return;
    const int64_t parts = tiling_.parts(slots_of(tiling_.common(rows)));
    if (parts == 1) return;
    Softmax<A> state = softmax(tile, rows, 0);
    for (int64_t part = 1; part < parts; ++part) state.merge(softmax(tile, rows, part));
    store(state, rows);
  }

  // Adds the weights that a tile's queries gave to the window. They are known once all is summed
  // up, so the scores are made a second time.
  void count_usage(const TokenTile& tile) const {
    const QueryRows rows = tiling_.rows(tile);
    if (rows.count() == 0) return;
    const Softmax<A> state = softmax(tile, rows, 0);
    const Ring<T> ring(m_, kWindow, rows.held, rows.kv);
    A* usage = static_cast<A*>(m_.usage) + (rows.held * m_.kv_heads + rows.kv) * m_.window_capacity;
    for (int64_t i = rows.tokens.begin; i < rows.tokens.end; ++i) {
      const QueryRows one = tiling_.token(rows, i);
      const int64_t first_row = (i - rows.tokens.begin) * rows.q_per_kv;
      Range left = tiling_.visible(one)[kWindow];
      while (left.size() > 0) {
        const Piece<T> piece = ring.piece(left);
        A* scores = scores_of(one);
        score_piece(args_, queries_, kWindow, one, piece, scores);
        for (int64_t r = 0; r < one.count(); ++r)
          state.add_weights(first_row + r, scores + r * kBlock, piece.count, usage + piece.index);
        left.begin += piece.count;
      }
    }
  }

 private:
  Softmax<A> softmax(const TokenTile& tile, const QueryRows& rows, int64_t part) const {
    const int64_t size = Softmax<A>::size(tiling_.most_rows(), m_.value_dim);
    A* memory = states_ + (tile.index * tiling_.most_parts() + part) * size;
    return {memory, rows.count(), rows.q_per_kv, m_.value_dim};
  }

  static A* scores_of(const QueryRows& rows) {
    thread_local std::vector<A> memory;  // kept from step to step
    const size_t size = rows.count() * kBlock;
    if (memory.size() < size) memory.resize(size);
    return memory.data();
  }

  // All rows attend to ranges that all of them see.
  void walk(Softmax<A> state, const QueryRows& rows, const Ranges& ranges) const {
    for (int64_t index = 0; index < kRegions; ++index) {
      const Range left = ranges[index];
      if (left.size() <= 0) continue;
      const auto region = static_cast<Region>(index);
      if (region != kCompressed) {
        walk_ring<T>(state, region, rows, left);
      } else {
        dispatch_slots<T>(m_.compressed_storage,
                          [&](auto type) { walk_ring<decltype(type)>(state, region, rows, left); });
      }
    }
  }

  template <typename S>
  void walk_ring(Softmax<A>& state, Region region, const QueryRows& rows, Range left) const {
    const Ring<S> ring(m_, region, rows.held, rows.kv);
    while (left.size() > 0) {
      const Piece<S> piece = ring.piece(left);
      attend_piece(state, region, rows, piece);
      left.begin += piece.count;
    }
  }

  // What a token sees and not all of its tile do: slots that leave within the tile, and the tile's
  // own tokens.
  void walk_rest(const Softmax<A>& state, const QueryRows& rows, const Ranges& all) const {
    if (rows.tokens.size() == 1) return;
    for (int64_t i = rows.tokens.begin; i < rows.tokens.end; ++i) {
      const QueryRows one = tiling_.token(rows, i);
      Ranges before = tiling_.visible(one);
      Ranges behind = before;
      for (int64_t region = 0; region < kRegions; ++region) {
        before[region].end = std::min(before[region].end, all[region].begin);
        behind[region].begin = std::max(behind[region].begin, all[region].end);
      }
      const Softmax<A> own = state.part((i - rows.tokens.begin) * rows.q_per_kv, rows.q_per_kv);
      walk(own, one, before);
      walk(own, one, behind);
    }
  }

  template <typename S>
  void attend_piece(Softmax<A>& state,
                    Region region,
                    const QueryRows& rows,
                    const Piece<S>& piece) const {
    A* scores = scores_of(rows);
    score_piece(args_, queries_, region, rows, piece, scores);
    for (int64_t r = 0; r < rows.count(); ++r)
      state.weigh(r, region, scores + r * kBlock, piece.count);
    apply_scales(piece.values, piece.value_stride, m_.value_dim, piece.count, rows.count(), scores);
    by_rows(rows.count(), [&](auto number, int64_t r) {
      add_rows<decltype(number)::value>(scores + r * kBlock,
                                        piece.values,
                                        piece.count,
                                        m_.value_dim,
                                        piece.value_stride,
                                        state.sums + r * state.width);
    });
  }

  void store(Softmax<A>& state, const QueryRows& rows) const {
    for (int64_t r = 0; r < rows.count(); ++r) {
      const A inverse = A(1) / state.total(r);
      A* sums = state.sums + r * state.width;
      scale_row(inverse, sums, m_.value_dim);
      const int64_t head = rows.kv * rows.q_per_kv + r % rows.q_per_kv;
      const int64_t i = rows.tokens.begin + r / rows.q_per_kv;
      store_row(sums, row<T>(args_.out, rows.b, head, args_.block.offset + i), m_.value_dim);
      if (args_.region_weights == nullptr) continue;
      for (int64_t region = 0; region < kRegions; ++region)
        region_weights(rows.b, head, i)[region] = state.totals[r * kRegions + region] * inverse;
    }
  }

  // Zeros for the tokens of a tile that are not the stream's.
  void store_absent(const TokenTile& tile, const QueryRows& rows) const {
    for (int64_t i = tile.begin; i < tile.end; ++i) {
      if (i >= rows.tokens.begin && i < rows.tokens.end) continue;
      for (int64_t head = tile.kv * rows.q_per_kv; head < (tile.kv + 1) * rows.q_per_kv; ++head) {
        std::fill_n(row<T>(args_.out, tile.b, head, args_.block.offset + i), m_.value_dim, T(0));
        if (args_.region_weights != nullptr)
          std::fill_n(region_weights(tile.b, head, i), int64_t{kRegions}, A(0));
      }
    }
  }

  A* region_weights(int64_t b, int64_t head, int64_t i) const {
    const int64_t token = (b * args_.heads + head) * args_.call_tokens + args_.block.offset + i;
    return static_cast<A*>(args_.region_weights) + token * kRegions;
  }

  const AttendArgs& args_;
  const MemoryView& m_;
  const Tiling& tiling_;
  const RotatedQueries<A>& queries_;
  A* states_;  // of every part of every tile
};

template <typename T>
void attend_block(const AttendArgs& args) {
  using A = Acc<T>;
  if (args.block.tokens == 0) return;
  const MemoryView& m = args.memory;
  thread_local std::vector<A> query_memory, state_memory;  // kept from step to step
  RotatedQueries<A> queries(args, query_memory);
  queries.template fill<T>();
  const Tiling tiling(args);
  const int64_t size = Softmax<A>::size(tiling.most_rows(), m.value_dim);
  const size_t needed = tiling.tiles() * tiling.most_parts() * size;
  if (state_memory.size() < needed) state_memory.resize(needed);
  const Attention<T> attention(args, tiling, queries, state_memory.data());

  const int64_t parts = tiling.most_parts();
  at::parallel_for(
      0, tiling.tiles() * parts, grain(tiling.work()), [&](int64_t begin, int64_t end) {
        for (int64_t task = begin; task < end; ++task)
          attention.attend(tiling.tile(task / parts), task % parts);
      });
  if (parts > 1) {
    at::parallel_for(0, tiling.tiles(), grain(parts * size / 8), [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) attention.merge(tiling.tile(task));
    });
  }
  if (args.count_usage) {  // in the order of the tokens: queries of one head add to the same sums
    const int64_t tiles = tiling.tiles() / (m.batch * m.kv_heads);
    at::parallel_for(
        0, m.batch * m.kv_heads, grain(tiling.work() * tiles), [&](int64_t begin, int64_t end) {
          for (int64_t task = begin * tiles; task < end * tiles; ++task)
            attention.count_usage(tiling.tile(task));
        });
  }
}

}  // namespace

void attend(const AttendArgs& args) {
  dispatch(args.memory.storage, [&](auto type) { attend_block<decltype(type)>(args); });
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
