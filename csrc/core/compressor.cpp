#include "ctx/compressor.h"

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include "core/check.h"
#include "ops/settings.h"

namespace ctx {

Compressor Compressor::make(const std::string& name,
                            int64_t kv_heads,
                            int64_t ratio,
                            int64_t head_dim,
                            int64_t value_dim,
                            const at::TensorOptions& options) {
  constexpr const char* where = "ctx.Compressor.make";
  const auto positive = [&](const char* argument, int64_t value) {
    CTX_CHECK_VALUE(value >= 1, where, argument, " must be at least 1, got ", value);
  };
  positive("kv_heads", kv_heads);
  positive("ratio", ratio);
  positive("head_dim", head_dim);
  positive("value_dim", value_dim);
  // Each of the c tokens passes through, divided by c: the mean.
  const auto mean_weight = [&](int64_t width) {
    return at::eye(width, options)
        .div(static_cast<double>(ratio))
        .expand({kv_heads, ratio, width, width})
        .clone();
  };
  switch (ops::parse_compressor(name, where)) {
    case CompressorKind::kConv:
      return {name, {mean_weight(head_dim), mean_weight(value_dim)}, nullptr};
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
      break;
  }
  return {name, {}, nullptr};
}

std::tuple<at::Tensor, at::Tensor> compress(const at::Tensor& keys,
                                            const at::Tensor& values,
                                            const Compressor& compressor) {
  if (compressor.name == "custom") {
    CTX_CHECK_VALUE(compressor.function != nullptr,
                    "ctx.compress",
                    "function must be set for the compressor \"custom\", got none");
    return compressor.function(keys, values);
  }
  static const auto op =
      c10::Dispatcher::singleton()
          .findSchemaOrThrow("ctx::compress", "")
          .typed<std::tuple<at::Tensor, at::Tensor>(
              const at::Tensor&, const at::Tensor&, at::TensorList, c10::string_view)>();
  return op.call(keys, values, compressor.parameters, compressor.name);
}

}  // namespace ctx
