#include "ops/shapes.h"

#include <sstream>

#include "ops/check.h"

namespace ctx::ops {

void check_shape(const char* where,
                 const char* name,
                 const at::Tensor& x,
                 std::initializer_list<Dim> dims) {
  bool fits = x.dim() == static_cast<int64_t>(dims.size());
  bool letters_only = true;
  int64_t i = 0;
  for (const Dim& dim : dims) {
    const bool any = !dim.size.is_symbolic() && dim.size.expect_int() < 0;
    letters_only = letters_only && any;
    fits = fits && (any || x.sym_size(i) == dim.size);
    ++i;
  }
  if (fits) return;
  std::ostringstream letters, sizes;
  const char* separator = "";
  for (const Dim& dim : dims) {
    letters << separator << dim.name;
    sizes << separator;
    if (!dim.size.is_symbolic() && dim.size.expect_int() < 0) {
      sizes << dim.name;
    } else {
      sizes << dim.size;
    }
    separator = ", ";
  }
  const std::string values = letters_only ? "" : " = [" + sizes.str() + "]";
  CTX_CHECK_VALUE(
      false, where, name, " must be [", letters.str(), "]", values, ", got ", x.sym_sizes());
}

void check_type(const char* where,
                const char* name,
                const at::Tensor& x,
                at::ScalarType type,
                const char* like) {
  CTX_CHECK_TYPE(
      x.scalar_type() == type, where, name, " must be ", type, like, ", got ", x.scalar_type());
}

void check_device(
    const char* where, const char* name, const at::Tensor& x, at::Device device, const char* like) {
  CTX_CHECK_VALUE(
      x.device() == device, where, name, " must be on ", device, like, ", got ", x.device());
}

void check_floating(const char* where, const char* name, const at::Tensor& x) {
  CTX_CHECK_TYPE(at::isFloatingType(x.scalar_type()),
                 where,
                 name,
                 " must be floating point, got ",
                 x.scalar_type());
}

void check_dense(const char* where, const char* name, const at::Tensor& x) {
  CTX_CHECK_VALUE(
      x.layout() == at::kStrided, where, name, " must be a dense tensor, got ", x.layout());
}

}  // namespace ctx::ops
