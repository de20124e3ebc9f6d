// What numbers are stored as, and the arithmetic's type: float32, float64 for float64.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "kernels/cuda/intrinsics.cuh"
#include "ops/kernels.h"

namespace ctx::cuda {

#if defined(__CUDACC__)
template <typename To, typename From>
CTX_DEVICE To bits_as(From from) {
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}
#else
template <typename To, typename From>
inline To bits_as(From from) {
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
#endif

struct BFloat16 {
  static constexpr bool kBrain = true;
  uint16_t bits;
  CTX_HOST_DEVICE static float float_of_bits(uint16_t bits) {
#if defined(__CUDA_ARCH__)
    return __uint_as_float(static_cast<uint32_t>(bits) << 16);
#else
    const uint32_t wide = static_cast<uint32_t>(bits) << 16;
    float x;
    std::memcpy(&x, &wide, 4);
    return x;
#endif
  }
  CTX_HOST_DEVICE static uint16_t bits_of(float x) {  // to nearest, ties to even
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(x));
#else
    uint32_t wide;
    std::memcpy(&wide, &x, 4);
    if (x != x) return 0x7fff;
    return static_cast<uint16_t>((wide + 0x7fff + (wide >> 16 & 1)) >> 16);
#endif
  }
};

struct Half {
  static constexpr bool kBrain = false;
  uint16_t bits;
  CTX_HOST_DEVICE static float float_of_bits(uint16_t bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const int exponent = bits >> 10 & 31;
    const float fraction = static_cast<float>(bits & 1023);
    const float size = exponent == 31  ? (fraction == 0 ? std::numeric_limits<float>::infinity()
                                                        : std::numeric_limits<float>::quiet_NaN())
                       : exponent == 0 ? std::ldexp(fraction, -24)
                                       : std::ldexp(fraction + 1024.0f, exponent - 25);
    return bits >> 15 ? -size : size;
#endif
  }
  CTX_HOST_DEVICE static uint16_t bits_of(float x) {  // to nearest, ties to even
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(x));
#else
    const auto sign = static_cast<uint16_t>(std::signbit(x) ? 0x8000 : 0);
    const float size = std::fabs(x);
    if (x != x) return 0x7fff;
    if (size == 0.0f) return sign;
    if (size >= 65520.0f) return sign | 0x7c00;
    int exponent = 0;
    std::frexp(size, &exponent);
    const int step = exponent - 11 < -24 ? -24 : exponent - 11;  // of the last place
    const auto places = static_cast<int>(std::nearbyint(std::ldexp(size, -step)));
    if (step == -24) return static_cast<uint16_t>(sign | places);  // a carry makes it normal
    return static_cast<uint16_t>(sign | (((step + 25) << 10) + (places - 1024)));
#endif
  }
};

template <typename T>
struct Arithmetic {
  using type = float;
};
template <>
struct Arithmetic<double> {
  using type = double;
};
template <typename T>
using Acc = typename Arithmetic<T>::type;

template <typename A, typename T>
CTX_DEVICE A wide(T x) {
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>) {
    return static_cast<A>(T::float_of_bits(x.bits));
  } else {
    return static_cast<A>(x);
  }
}

template <typename T, typename A>
CTX_DEVICE T narrow(A x) {
  if constexpr (std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>) {
    return T{T::bits_of(static_cast<float>(x))};
  } else {
    return static_cast<T>(x);
  }
}

template <typename A>
CTX_DEVICE A minus_infinity() {
  return static_cast<A>(-INFINITY);
}
template <typename A>
CTX_DEVICE A maximum(A a, A b) {
  return a < b ? b : a;
}
template <typename A>
CTX_DEVICE bool is_finite(A x) {
  return x - x == A(0);
}
CTX_DEVICE float exponential(float x) { return expf(x); }
CTX_DEVICE double exponential(double x) { return exp(x); }
CTX_DEVICE float logarithm(float x) { return logf(x); }
CTX_DEVICE double logarithm(double x) { return log(x); }
CTX_DEVICE float hyperbolic_tangent(float x) { return tanhf(x); }
CTX_DEVICE double hyperbolic_tangent(double x) { return tanh(x); }

CTX_HOST_DEVICE constexpr int64_t size_of(Storage storage) {
  return storage == Storage::kFloat64   ? 8
         : storage == Storage::kFloat32 ? 4
         : storage == Storage::kInt8    ? 1
                                        : 2;
}

template <typename T>
CTX_HOST_DEVICE constexpr Storage storage_of() {
  return std::is_same_v<T, double>     ? Storage::kFloat64
         : std::is_same_v<T, float>    ? Storage::kFloat32
         : std::is_same_v<T, BFloat16> ? Storage::kBFloat16
                                       : Storage::kFloat16;
}

// Calls run(T{}) for the type of a memory's pairs.
template <typename F>
void dispatch(Storage storage, const F& run) {
  switch (storage) {
    case Storage::kFloat32:
      return run(float{});
    case Storage::kFloat64:
      return run(double{});
    case Storage::kBFloat16:
      return run(BFloat16{});
    case Storage::kFloat16:
      return run(Half{});
    case Storage::kInt8:
      return;
  }
}

// Calls run(S{}) for the type of slots in a memory of T.
template <typename T, typename F>
CTX_DEVICE void dispatch_slots(Storage storage, const F& run) {
  if constexpr (std::is_same_v<T, double>) {
    run(double{});
  } else {
    switch (storage) {
      case Storage::kInt8:
        return run(int8_t{});
      case Storage::kBFloat16:
        return run(BFloat16{});
      case Storage::kFloat16:
        return run(Half{});
      default:
        return run(float{});
    }
  }
}

// N numbers of a row in a storage that is known when the kernel runs; not for float64.
template <int N, typename A>
CTX_DEVICE void load_numbers(Storage storage, const char* from, A (&to)[N]) {
  if (storage == Storage::kInt8) {
    CTX_UNROLL for (int e = 0; e < N; ++e) to[e] = static_cast<A>(static_cast<int8_t>(from[e]));
  } else if (storage == Storage::kFloat32) {
    const auto* x = reinterpret_cast<const float*>(from);
    CTX_UNROLL for (int e = 0; e < N; ++e) to[e] = static_cast<A>(x[e]);
  } else {
    const auto* x = reinterpret_cast<const uint16_t*>(from);
    if (storage == Storage::kBFloat16) {
      CTX_UNROLL for (int e = 0; e < N; ++e) to[e] = static_cast<A>(BFloat16::float_of_bits(x[e]));
    } else {
      CTX_UNROLL for (int e = 0; e < N; ++e) to[e] = static_cast<A>(Half::float_of_bits(x[e]));
    }
  }
}

}  // namespace ctx::cuda
