// Attention of one query in float64 loops; keys come from a function.
#pragma once

#include "world.h"

namespace ctx::test {

struct AttendedKey {
  std::vector<double> key, value;
  double mass = 0;
  double distance = 0;
};

// All that scores are made of besides the world's clock and rotary.
struct ScoreLaw {
  double scale = 1, softcap = 0;
  Buffer<char> bias, slopes;  // [H]; empty: none
  int64_t relative_dim = 0;
  Rows relative, compressed_relative;
  Storage arithmetic = Storage::kFloat32;

  void make(Random& random, World& w, bool relative_positions = true) {
    arithmetic = w.arithmetic;
    scale = random.coin() ? 1.0 : 0.4;
    if (random.one_in(3)) softcap = 1.5;
    const auto heads = [&](Buffer<char>& x, double size) {
      x.assign(size_t(w.heads() * cuda::size_of(arithmetic)), char{});
      for (int64_t h = 0; h < w.heads(); ++h)
        store_number(arithmetic, &x[h * cuda::size_of(arithmetic)], size * random.number());
    };
    if (random.coin()) heads(bias, 1.0);
    if (random.one_in(3)) heads(slopes, 0.3);
    const bool chosen_tokens = w.kind == CompressorKind::kMostUsed && w.clock.token_distance;
    if (relative_positions && !chosen_tokens && random.one_in(3))
      relative_dim = 2 * random.between(1, 8);
  }
  double per_head(const Buffer<char>& x, int64_t h) const {
    return x.size() == 0 ? 0.0 : load_number(arithmetic, &x[h * cuda::size_of(arithmetic)]);
  }
  double relative_score(const std::vector<double>& z, double distance) const {
    double sum = 0;
    for (int64_t i = 0; i < relative_dim / 2; ++i) {
      const double w = std::pow(10000.0, -2.0 * double(i) / double(relative_dim));
      sum += z[i] * std::sin(distance * w) + z[relative_dim / 2 + i] * std::cos(distance * w);
    }
    return sum;
  }
};

struct Attended {
  std::vector<double> out;
  double logsumexp = -std::numeric_limits<double>::infinity();
  double weights[kRegions] = {0, 0, 0};  // of the regions
  std::vector<double> window;            // of the window's keys
  double size = 1;                       // of the largest value, at least one
  double steep = 1;                      // how errors of scores, relative to them, become errors
};

// The query of token t in head h; key(region, number) of what it sees.
template <typename F>
Attended attend_one(World& w,
                    const ScoreLaw& law,
                    int64_t t,
                    int64_t h,
                    const std::vector<double>& q,
                    const std::vector<double>& z,
                    const std::vector<double>& zc,
                    const F& key) {
  Attended made;
  made.out.assign(w.value_dim, 0.0);
  if (t < 0) return made;
  const Ranges seen = visible(w.clock.schedule, t);
  std::vector<double> scores;
  std::vector<std::vector<double>> values;
  std::vector<int> regions;
  double largest = -std::numeric_limits<double>::infinity(), total = 0;
  for (int region = 0; region < kRegions; ++region) {
    const std::vector<double> query =
        w.rotated(q, static_cast<double>(query_clock(w.clock, region, t)));
    for (int64_t n = seen[region].begin; n < seen[region].end; ++n) {
      AttendedKey k = key(region, n);
      double s = 0, size = 0;
      for (int64_t d = 0; d < w.head_dim; ++d) {
        s += query[d] * k.key[d];
        size += std::abs(query[d] * k.key[d]);
      }
      if (law.relative_dim > 0) s += law.relative_score(region == kCompressed ? zc : z, k.distance);
      s *= law.scale;
      made.steep = std::max(made.steep, size * law.scale / 8);
      if (law.softcap > 0) s = law.softcap * std::tanh(s / law.softcap);
      s += k.mass;
      if (region == kCompressed) s += law.per_head(law.bias, h);
      s -= law.per_head(law.slopes, h) * k.distance;
      scores.push_back(s), values.push_back(k.value), regions.push_back(region);
      largest = std::max(largest, s);
    }
  }
  for (const double s : scores) total += std::exp(s - largest);
  for (size_t j = 0; j < scores.size(); ++j) {
    const double weight = std::exp(scores[j] - largest) / total;
    made.weights[regions[j]] += weight;
    if (regions[j] == kWindow) made.window.push_back(weight);
    for (int64_t d = 0; d < w.value_dim; ++d) {
      made.out[d] += weight * values[j][d];
      made.size = std::max(made.size, std::abs(values[j][d]));
    }
  }
  if (!scores.empty()) made.logsumexp = largest + std::log(total);
  return made;
}

}  // namespace ctx::test
