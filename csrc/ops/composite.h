// Attention over three spans out of torch's own operators, for every device; differentiable by hand:
// the backward recomputes the weights from the log-sum-exp instead of keeping them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <array>
#include <optional>

#include "ops/attend.h"
#include "ops/spans.h"

namespace ctx::ops {

// Rows and tokens of a call that are handled together, and the keys that they can see.
struct Tile {
  Range rows;
  Range tokens;
  std::array<Range, kRegions> keys;
};

// Scores of one tile that are held at once on the CPU: they stay in its cache from the product to
// the last use.
constexpr int64_t kTileScores = 1 << 17;

// What is multiplied with the encodings of distances, [B, H, T, P]; undefined: nothing.
struct EncodedQueries {
  at::Tensor relative;    // for the window and the sinks
  at::Tensor compressed;  // for compressed slots
};

// One call, in the arithmetic's type.
//
// Zero times NaN is NaN, so what a query does not see must not reach a product: rows of queries, keys
// and values that are not finite are zero as operands, and what they do to the queries that see them
// is added to the outputs of these. In the backward a query without a gradient takes part in nothing.
class Composite {
 public:
  // q [B, H, T, D] are what is multiplied with keys. `recorded`: autograd records the operators, so
  // that what they give has derivatives of any order and mode.
  Composite(const at::Tensor& q,
            const EncodedQueries& encoded,
            const CallSpans& spans,
            const AttendCall& call,
            bool recorded);

  // Outputs, log-sum-exp, and region weights where they are asked for.
  Attended forward(bool with_region_weights) const;

  struct Gradients {
    at::Tensor q;
    std::array<at::Tensor, kRegions> relative;  // of the queries of relative positions
    std::array<at::Tensor, kRegions> keys;
    std::array<at::Tensor, kRegions> values;
    at::Tensor bias;
    at::Tensor mass;  // [B, Hkv, slots]
  };

  Gradients backward(const at::Tensor& grad_out,
                     const at::Tensor& grad_logsumexp,
                     const at::Tensor& out,
                     const at::Tensor& logsumexp) const;

 private:
  int64_t size(int region) const { return keys_[region].size(2); }
  void measure(int region, const at::Tensor& slot_positions);
  void add_relative(int region, const at::Tensor& queries);
  void set_apart();
  at::Tensor poison(const Tile& tile) const;

  at::Tensor distances(int region, const Tile& tile) const;

  // Query heads of a kv head lie behind one another, so that each region costs one product per kv
  // head: [B, H, T, width] -> [B, Hkv, R T, width], R = H / Hkv.
  at::Tensor per_kv_head(const at::Tensor& x) const {
    return x.reshape({x.size(0), kv_heads_, heads_ / kv_heads_ * x.size(2), x.size(3)});
  }

  static at::Tensor row_range(const at::Tensor& x, const Tile& tile) {
    return x.narrow(0, tile.rows.begin, tile.rows.size());
  }

  // x [B, H, T, ...]: the tile's rows and tokens.
  static at::Tensor cut(const at::Tensor& x, const Tile& tile) {
    return row_range(x, tile).narrow(2, tile.tokens.begin, tile.tokens.size());
  }

  // x [B, Hkv, keys, width]: the tile's rows and keys.
  static at::Tensor keyed(const at::Tensor& x, const Tile& tile, int region) {
    return row_range(x, tile).narrow(2, tile.keys[region].begin, tile.keys[region].size());
  }

  at::Tensor products(int region, const Tile& tile) const;
  at::Tensor scores(int region, const Tile& tile) const;
  at::Tensor hidden(int region, const Tile& tile) const;

  template <typename F>
  void for_each_tile(const F& run) const;
  template <typename F>
  void walk_row(int64_t b, const F& run) const;

  at::ScalarType type_;
  bool recorded_;
  Clock clock_;
  Rotary rotary_;
  double scale_;
  double softcap_;
  int64_t batch_;
  int64_t heads_;
  int64_t tokens_;
  int64_t head_dim_;
  int64_t kv_heads_;
  std::array<at::Tensor, kRegions> keys_;
  std::array<at::Tensor, kRegions> values_;
  at::Tensor bias_;
  at::Tensor mass_;                         // [B, Hkv, slots]
  at::Tensor slopes_;                       // [1, H, 1, 1]
  at::Tensor t_;                            // [B, T], and so are the others
  std::array<at::Tensor, kRegions> first_;  // number of a region's first key in the query's stream
  at::Tensor groups_;
  at::Tensor window_begin_;
  at::Tensor held_;
  std::array<at::Tensor, kRegions> clocks_;
  std::array<at::Tensor, kRegions>
      queries_;  // rotated to the region's clock and scaled; undefined for an empty region
  std::array<at::Tensor, kRegions> places_;   // double [1, 1, keys], or [B, Hkv, keys]
  std::array<at::Tensor, kRegions> offsets_;  // double [B, T]
  // Rows that are not finite, bool [B, H, T] and [B, Hkv, keys]; undefined where there are none.
  at::Tensor bad_queries_;
  std::array<at::Tensor, kRegions> bad_keys_;
};

}  // namespace ctx::ops
