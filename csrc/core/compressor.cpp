#include "ctx/compressor.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <cmath>

#include "ops/check.h"
#include "ops/settings.h"

namespace ctx {

Compressor Compressor::make(const std::string& name,
                            int64_t kv_heads,
                            int64_t ratio,
                            int64_t head_dim,
                            int64_t value_dim,
                            const at::TensorOptions& options,
                            int64_t kernel) {
  constexpr const char* where = "ctx.Compressor.make";
  const auto at_least = [&](int64_t least, const char* argument, int64_t value) {
    CTX_CHECK_VALUE(value >= least, where, argument, " must be at least ", least, ", got ", value);
  };
  at_least(1, "kv_heads", kv_heads);
  at_least(1, "ratio", ratio);
  at_least(1, "head_dim", head_dim);
  at_least(0, "value_dim", value_dim);
  const CompressorKind kind = ops::parse_compressor(name, where);
  CTX_CHECK_VALUE(kernel == 0 || (kind == CompressorKind::kConv && kernel >= ratio),
                  where,
                  "kernel must be at least ratio = ",
                  ratio,
                  " for the compressor \"conv\", and 0 for any other, got ",
                  kernel);
  // The mean: each of the c tokens has the weight 1 / c, those left of the group have none.
  const int64_t left = kernel == 0 ? 0 : kernel - ratio;
  const auto mean_weight = [&](int64_t width) {
    at::Tensor weight = at::zeros({kv_heads, left + ratio, width, width}, options);
    weight.narrow(1, left, ratio).diagonal(0, 2, 3).fill_(1.0 / static_cast<double>(ratio));
    return weight;
  };
  // Every layer copies the later of its two tokens. The 2 D channels hold x and -x, since ReLU keeps
  // only what is positive; the last convolution takes the mean of their difference.
  const auto dilated = [&](int64_t width, std::vector<at::Tensor>& parameters) {
    at::Tensor first = at::zeros({kv_heads, 2, width, 2 * width}, options);
    first.select(1, 1).narrow(2, 0, width).diagonal(0, 1, 2).fill_(1.0);
    first.select(1, 1).narrow(2, width, width).diagonal(0, 1, 2).fill_(-1.0);
    at::Tensor deeper =
        at::zeros({kv_heads, dilated_layers(ratio) - 1, 2, 2 * width, 2 * width}, options);
    deeper.select(2, 1).diagonal(0, 2, 3).fill_(1.0);
    at::Tensor last = at::zeros({kv_heads, ratio, 2 * width, width}, options);
    last.narrow(2, 0, width).diagonal(0, 2, 3).fill_(1.0 / static_cast<double>(ratio));
    last.narrow(2, width, width).diagonal(0, 2, 3).fill_(-1.0 / static_cast<double>(ratio));
    parameters.insert(parameters.end(), {first, deeper, last});
  };
  switch (kind) {
    case CompressorKind::kConv:
      return {name, {mean_weight(head_dim), mean_weight(value_dim)}, nullptr};
    case CompressorKind::kDilated: {
      Compressor made{name, {}, nullptr};
      dilated(head_dim, made.parameters);
      dilated(value_dim, made.parameters);
      return made;
    }
    case CompressorKind::kGated:
      return {name,
              {at::zeros({kv_heads, head_dim}, options),
               at::zeros({kv_heads, ratio}, options),
               at::zeros({kv_heads, head_dim}, options),
               at::zeros({kv_heads, ratio}, options)},
              nullptr};
    case CompressorKind::kGiven:
    case CompressorKind::kMean:
    case CompressorKind::kMax:
    case CompressorKind::kMostUsed:
      break;
  }
  return {name, {}, nullptr};
}

int64_t Compressor::reads_left(int64_t ratio) const {
  const CompressorKind kind = ops::parse_compressor(name, "ctx.Compressor");
  return kind == CompressorKind::kGiven ? overlap : ops::overlap_of(kind, parameters, ratio);
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> compress(const at::Tensor& keys,
                                                        const at::Tensor& values,
                                                        const Compressor& compressor,
                                                        int64_t ratio) {
  constexpr const char* where = "ctx.compress";
  if (compressor.name == "custom") {
    CTX_CHECK_VALUE(compressor.function != nullptr,
                    where,
                    "function must be set for the compressor \"custom\", got none");
    std::vector<at::Tensor> made = compressor.function(keys, values);
    CTX_CHECK_VALUE(made.size() == 2 || made.size() == 3,
                    where,
                    "function must return key slots, value slots and perhaps their mass, got ",
                    made.size());
    if (ratio == 0) return {made[0], made[1], keys.new_empty({0})};
    const auto usual = [&] {
      return at::full_symint(
          keys.sym_sizes().slice(0, 3), std::log(static_cast<double>(ratio)), keys.options());
    };
    return {made[0], made[1], made.size() == 3 ? made[2] : usual()};
  }
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("ctx::compress", "")
          .typed<std::tuple<at::Tensor, at::Tensor, at::Tensor>(const at::Tensor&,
                                                                const at::Tensor&,
                                                                ops::OptionalList,
                                                                c10::string_view,
                                                                int64_t)>();
  return op.call(keys, values, compressor.parameters, compressor.name, ratio);
}

}  // namespace ctx
