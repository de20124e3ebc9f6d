#include "core/memory_spec.h"

#include <array>
#include <charconv>

#include "ops/check.h"

namespace ctx {
namespace {

// The shortest digits that are this number and no other.
std::string in_words(double number) {
  std::array<char, 32> digits;
  return {digits.data(), std::to_chars(digits.data(), digits.data() + digits.size(), number).ptr};
}

std::string in_words(const std::vector<double>& numbers) {
  std::string made = "[";
  for (const double number : numbers) made += (made.size() > 1 ? ", " : "") + in_words(number);
  return made + "]";
}

}  // namespace

LayerSpec layer_spec(const LayerShape& shape,
                     const AttentionSettings& resolved,
                     const std::string& position,
                     const std::string& compressor) {
  LayerSpec made{shape, {}};
  const auto text = [&](const char* name, std::string value) {
    made.settings.emplace_back(name, std::move(value));
  };
  const auto number = [&](const char* name, int64_t value) { text(name, std::to_string(value)); };
  const Schedule& schedule = shape.schedule;
  number("window", schedule.window);
  number("compressed", schedule.compressed);
  number("ratio", schedule.ratio);
  number("segment", schedule.segment);
  number("sinks", schedule.sinks);
  number("overlap", schedule.overlap);
  text("position", position);
  text("distance", resolved.distance);
  number("rotary_dim", resolved.rotary_dim);
  number("rotary_interleaved", resolved.rotary_dim > 0 && resolved.rotary_interleaved);
  text("inv_freq", in_words(resolved.inv_freq));
  text("attention_factor", in_words(resolved.attention_factor));
  number("slot_mass", resolved.slot_mass);
  text("compressor", compressor);
  number("kv_heads", shape.kv_heads);
  number("head_dim", shape.head_dim);
  number("value_dim", shape.value_dim);
  number("max_rewind", shape.max_rewind);
  return made;
}

void check_spec(const MemorySpec& wanted, const MemorySpec& held, const char* where) {
  if (&wanted == &held) return;
  CTX_CHECK_VALUE(wanted.layers.size() == held.layers.size(),
                  where,
                  "memory must have ",
                  wanted.layers.size(),
                  " layers, got ",
                  held.layers.size());
  for (size_t layer = 0; layer < wanted.layers.size(); ++layer) {
    const auto &mine = wanted.layers[layer].settings, &theirs = held.layers[layer].settings;
    std::string asked, got;
    for (size_t i = 0; i < mine.size(); ++i) {
      if (mine[i].second == theirs[i].second) continue;
      asked += (asked.empty() ? "" : " ") + mine[i].first + "=" + mine[i].second;
      got += (got.empty() ? "" : " ") + theirs[i].first + "=" + theirs[i].second;
    }
    CTX_CHECK_VALUE(
        asked.empty(), where, "memory must be made for ", asked, ", got one made for ", got);
  }
}

}  // namespace ctx
