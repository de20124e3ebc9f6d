// Attention of one query in double loops, and what the tests of kernels share.
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <vector>

#include "ops/kernels.h"

namespace ctx::test {

// Numbers between -1 and 1 that look random.
inline std::vector<double> numbers(size_t count, uint64_t salt) {
  std::vector<double> made(count);
  uint64_t state = salt * 0x9E3779B97F4A7C15u + 1;
  for (double& x : made) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    x = static_cast<double>(static_cast<int64_t>(state >> 11) % 20011) / 10005.5 - 1.0;
  }
  return made;
}

// All that scores are made of; one of each per query head where it is a vector.
struct Law {
  Clock clock;
  int64_t heads = 4, kv_heads = 2, head_dim = 6, value_dim = 5;
  double scale = 0.7;
  double softcap = 0;
  std::vector<double> inv_freq;  // rotary
  double attention_factor = 1.0;
  bool interleaved = false;
  std::vector<double> bias, slopes;
  int64_t relative_dim = 0;
  int64_t q_per_kv() const { return heads / kv_heads; }

  Rotary rotary() const {
    Rotary made;
    made.dim = 2 * static_cast<int64_t>(inv_freq.size());
    made.inv_freq = inv_freq.data();
    made.attention_factor = attention_factor;
    made.interleaved = interleaved;
    return made;
  }

  std::vector<double> rotated(const double* x, double position) const {
    std::vector<double> y(x, x + head_dim);
    const size_t half = inv_freq.size();
    for (size_t i = 0; i < half; ++i) {
      const size_t a = interleaved ? 2 * i : i, b = interleaved ? 2 * i + 1 : half + i;
      const double c = std::cos(position * inv_freq[i]) * attention_factor;
      const double s = std::sin(position * inv_freq[i]) * attention_factor;
      y[a] = x[a] * c - x[b] * s, y[b] = x[b] * c + x[a] * s;
    }
    return y;
  }

  // z . [sin(distance w); cos(distance w)]
  double relative(const double* z, double distance) const {
    double sum = 0;
    for (int64_t i = 0; i < relative_dim / 2; ++i) {
      const double w = std::pow(10000.0, -2.0 * static_cast<double>(i) / relative_dim);
      sum += z[i] * std::sin(distance * w) + z[relative_dim / 2 + i] * std::cos(distance * w);
    }
    return sum;
  }
};

// What one key of a region is: its rotated row, its value, its log-mass.
struct Key {
  const double* key;
  const double* value;
  double mass;
};

struct Attended {
  std::vector<double> out;
  double logsumexp;
};

// The query of token t in head h; key(region, number).
inline Attended attend_one(const Law& law,
                           int64_t t,
                           int64_t h,
                           const double* q,
                           const double* relative,
                           const double* compressed_relative,
                           const std::function<Key(int, int64_t)>& key) {
  const Ranges seen = visible(law.clock.schedule, t);
  std::vector<double> scores;
  std::vector<const double*> values;
  for (int region = 0; region < kRegions; ++region) {
    const auto clock = static_cast<double>(query_clock(law.clock, region, t));
    const std::vector<double> query = law.rotated(q, clock);
    for (int64_t n = seen[region].begin; n < seen[region].end; ++n) {
      const Key k = key(region, n);
      const double distance = clock - key_clock(law.clock, region, n);
      double s = 0;
      for (int64_t d = 0; d < law.head_dim; ++d) s += query[d] * k.key[d];
      if (law.relative_dim > 0)
        s += law.relative(region == kCompressed ? compressed_relative : relative, distance);
      s *= law.scale;
      if (law.softcap > 0) s = law.softcap * std::tanh(s / law.softcap);
      if (region == kCompressed) s += k.mass + (law.bias.empty() ? 0.0 : law.bias[h]);
      if (!law.slopes.empty()) s -= law.slopes[h] * distance;
      scores.push_back(s), values.push_back(k.value);
    }
  }
  double largest = -std::numeric_limits<double>::infinity(), total = 0;
  for (const double s : scores) largest = std::max(largest, s);
  Attended made{std::vector<double>(law.value_dim, 0.0), 0};
  for (size_t j = 0; j < scores.size(); ++j) {
    const double weight = std::exp(scores[j] - largest);
    total += weight;
    for (int64_t d = 0; d < law.value_dim; ++d) made.out[d] += weight * values[j][d];
  }
  for (double& x : made.out) x /= total;
  made.logsumexp = largest + std::log(total);
  return made;
}

}  // namespace ctx::test
