// Checks of tensors, one line each; messages are *where: name must be what, got what*.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>

namespace ctx::ops {

// A dimension by its letter, and its size; negative: any.
struct Dim {
  const char* name;
  c10::SymInt size = -1;
};

// "k must be [B, Hkv, T, D] = [2, 4, T, 64], got [2, 4, 7, 32]"
void check_shape(const char* where,
                 const char* name,
                 const at::Tensor& x,
                 std::initializer_list<Dim> dims);

// `like`: the tensor whose dtype or device is wanted, in words.
void check_type(const char* where,
                const char* name,
                const at::Tensor& x,
                at::ScalarType type,
                const char* like = "");
void check_device(const char* where,
                  const char* name,
                  const at::Tensor& x,
                  at::Device device,
                  const char* like = "");
void check_floating(const char* where, const char* name, const at::Tensor& x);
void check_dense(const char* where, const char* name, const at::Tensor& x);

}  // namespace ctx::ops
