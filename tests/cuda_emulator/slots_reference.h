// What compressors make of groups, in float64 loops over what a world's rings hold.
#pragma once

#include "world.h"

namespace ctx::test {

struct Slot {
  std::vector<double> key, value;  // un-rotated
  double mass = 0;
};

class SlotsReference {
 public:
  explicit SlotsReference(World& world) : w_(world), s_(world.clock.schedule) {}

  Slot make(int64_t b, int64_t h, int64_t group) {
    const int64_t c = s_.ratio, k = c + s_.overlap;
    Slot slot;
    slot.mass = std::log(static_cast<double>(c));
    std::vector<std::vector<double>> rows[2];
    for (int side = 0; side < 2; ++side)
      for (int64_t i = 0; i < k; ++i)
        rows[side].push_back(token(b, h, s_.first_token(group) - s_.overlap + i, side));
    for (int side = 0; side < 2; ++side) {
      std::vector<double>& out = side == 0 ? slot.key : slot.value;
      const int64_t width = side == 0 ? w_.head_dim : w_.value_dim;
      out.assign(width, 0.0);
      switch (w_.kind) {
        case CompressorKind::kMean:
          for (int64_t d = 0; d < width; ++d)
            for (int64_t i = 0; i < c; ++i) out[d] += rows[side][i][d] / static_cast<double>(c);
          break;
        case CompressorKind::kMax:
          for (int64_t d = 0; d < width; ++d) {
            out[d] = rows[side][0][d];
            for (int64_t i = 1; i < c; ++i) out[d] = std::max(out[d], rows[side][i][d]);
          }
          break;
        case CompressorKind::kConv:
          out = convolved(rows[side], side, h, width, width);
          for (int64_t d = 0; d < width && w_.parameters[2 + side].size() > 0; ++d)
            out[d] += w_.parameter(2 + side, h, width, d);
          break;
        case CompressorKind::kDilated:
          out = dilated(rows[side], side, h, width);
          break;
        case CompressorKind::kGated:
          out = gated(rows[0], rows[side], side, h, slot.mass);
          break;
        default:
          break;
      }
    }
    return slot;
  }

 private:
  // A token's row as its compressor gets it.
  std::vector<double> token(int64_t b, int64_t h, int64_t t, int side) {
    const int64_t width = side == 0 ? w_.head_dim : w_.value_dim;
    std::vector<double> x(width, 0.0);
    if (t < 0) return x;
    const int region = t < s_.sinks ? kSinks : kWindow;
    for (int64_t d = 0; d < width; ++d)
      x[d] = w_.ring(region, side).get(b, h, w_.entry(region, t), d);
    return side == 0 ? w_.rotated(x, static_cast<double>(t), /*back=*/true) : x;
  }

  using Matrix = std::vector<std::vector<double>>;

  std::vector<double> convolved(
      const Matrix& x, int parameter, int64_t h, int64_t inner, int64_t width) {
    std::vector<double> out(width, 0.0);
    const int64_t size = static_cast<int64_t>(x.size()) * inner * width;
    for (size_t i = 0; i < x.size(); ++i)
      for (int64_t d = 0; d < inner; ++d)
        for (int64_t e = 0; e < width; ++e)
          out[e] +=
              x[i][d] *
              w_.parameter(parameter, h, size, (static_cast<int64_t>(i) * inner + d) * width + e);
    return out;
  }

  std::vector<double> dilated(Matrix x, int side, int64_t h, int64_t width) {
    const int64_t layers = dilated_layers(s_.ratio), hidden = 2 * width;
    for (int64_t layer = 0; layer < layers; ++layer) {
      const int64_t inner = layer == 0 ? width : hidden, step = int64_t{1} << layer;
      const int64_t matrix = 2 * inner * hidden;
      const int64_t all = layer == 0 ? matrix : (layers - 1) * matrix;
      const int64_t first = layer == 0 ? 0 : (layer - 1) * matrix;
      Matrix y;
      for (size_t i = 0; i + step < x.size(); ++i) {
        std::vector<double> out(hidden, 0.0);
        for (int64_t tap = 0; tap < 2; ++tap)
          for (int64_t d = 0; d < inner; ++d)
            for (int64_t e = 0; e < hidden; ++e)
              out[e] += x[i + tap * step][d] *
                        w_.parameter(
                            3 * side + (layer > 0), h, all, first + (tap * inner + d) * hidden + e);
        for (double& number : out) number = std::max(number, 0.0);
        y.push_back(out);
      }
      x = y;
    }
    return convolved(x, 3 * side + 2, h, hidden, width);
  }

  std::vector<double> gated(
      const Matrix& keys, const Matrix& x, int side, int64_t h, double& mass) {
    const int64_t c = s_.ratio;
    std::vector<double> weights(c), out(x[0].size(), 0.0);
    double total = 0, entropy = 0;
    for (int64_t i = 0; i < c; ++i) {
      double score = w_.parameter(2 * side + 1, h, c, i);
      for (int64_t d = 0; d < w_.head_dim; ++d)
        score += keys[i][d] * w_.parameter(2 * side, h, w_.head_dim, d);
      total += weights[i] = std::exp(score);
    }
    for (int64_t i = 0; i < c; ++i) {
      weights[i] /= total;
      entropy -= weights[i] * std::log(weights[i]);
      for (size_t d = 0; d < out.size(); ++d) out[d] += weights[i] * x[i][d];
    }
    if (side == 0) mass = entropy;
    return out;
  }

  World& w_;
  const Schedule& s_;
};

}  // namespace ctx::test
