// Vectors as wide as the instruction set's registers, in the compiler's own notation: one source
// for all sets, and nothing to include that takes long to compile.
//
// Everything is computed in the arithmetic's type A; load() widens what is stored.
#pragma once

#include <bit>
#include <utility>

#include "kernels/cpu/vec.h"

namespace ctx::cpu::CTX_CPU_CAPABILITY {

#if defined(__AVX512F__)
inline constexpr int kVectorBytes = 64;
inline constexpr int kAccumulators = 16;  // of 32 registers
#elif defined(__AVX2__)
inline constexpr int kVectorBytes = 32;
inline constexpr int kAccumulators = 8;  // of 16 registers
#else
inline constexpr int kVectorBytes = 16;
inline constexpr int kAccumulators = 8;
#endif

template <typename A>
inline constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(A));

template <typename A>
struct VectorOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <typename A>
using Vec = typename VectorOf<A>::type;
using Bits32 = VectorOf<int32_t>::type;

// n elements as whole vectors.
template <typename A>
constexpr int64_t padded(int64_t n) {
  return (n + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
}

// n elements as whole pairs of vectors.
template <typename A>
constexpr int64_t row_width(int64_t n) {
  return (n + 2 * kLanes<A> - 1) / (2 * kLanes<A>)*(2 * kLanes<A>);
}

template <typename A>
inline Vec<A> broadcast(A a) {
  return a - Vec<A>{};  // not +: minus zero stays minus zero, so the compiler adds nothing
}

template <typename A>
inline void store(A* target, Vec<A> x) {
  std::memcpy(target, &x, sizeof(x));
}

template <typename A>
  requires std::is_floating_point_v<A>
inline Vec<A> load(const A* source) {
  Vec<A> x;
  std::memcpy(&x, source, sizeof(x));
  return x;
}

// float32 from the 16 bits of a vector's elements, as a bfloat16 has them: its upper half. Named
// instructions, where there are any: GCC 12 widens by halves and puts these together again.
typedef uint16_t Words __attribute__((vector_size(kVectorBytes / 2)));
typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
inline Vec<float> widen_bfloat16(Words bits) {
#if defined(__AVX512F__)
  const auto wide = std::bit_cast<Wide>(_mm512_cvtepu16_epi32(std::bit_cast<__m256i>(bits)));
#elif defined(__AVX2__)
  const auto wide = std::bit_cast<Wide>(_mm256_cvtepu16_epi32(std::bit_cast<__m128i>(bits)));
#else
  const auto wide = __builtin_convertvector(bits, Wide);
#endif
  return std::bit_cast<Vec<float>>(wide << 16);
}

inline Vec<float> load(const c10::BFloat16* source) {
  Words bits;
  std::memcpy(&bits, source, sizeof(bits));
  return widen_bfloat16(bits);
}

inline Vec<float> load(const int8_t* source) {
  typedef int8_t Bytes __attribute__((vector_size(kVectorBytes / 4)));
  Bytes bytes;
  std::memcpy(&bytes, source, sizeof(bytes));
#if defined(__AVX512F__)
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(std::bit_cast<__m128i>(bytes)));
#elif defined(__AVX2__)
  return _mm256_cvtepi32_ps(
      _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(source))));
#else
  return __builtin_convertvector(bytes, Vec<float>);
#endif
}

inline Vec<float> load(const c10::Half* source) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
#else
  Vec<float> x;
  for (int i = 0; i < kLanes<float>; ++i) x[i] = static_cast<float>(source[i]);
  return x;
#endif
}

// The first n lanes, the others zero; what stands behind them is not read.
template <typename T>
inline Vec<Acc<T>> load_some(const T* source, int64_t n) {
#if defined(__AVX512F__)
  // A head_dim that is a multiple of 8 and not of 16 is common: half a vector must cost no more.
  if constexpr (std::is_same_v<T, float>) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), source);
  } else if constexpr (sizeof(T) == 2) {
    const __m256i bits = _mm256_maskz_loadu_epi16(static_cast<__mmask16>((1u << n) - 1), source);
    if constexpr (std::is_same_v<T, c10::Half>) return _mm512_cvtph_ps(bits);
    return widen_bfloat16(std::bit_cast<Words>(bits));
  }
#endif
  T whole[kLanes<Acc<T>>] = {};
  std::copy_n(source, n, whole);
  return load(whole);
}

// Two vectors of elements that lie together, in the order in which they are cheapest to widen: as
// they lie, but bfloat16 split into the even and the odd ones. In a pair of either, an element is
// the upper half of 32 bits, so that one load gives both.
template <typename A>
struct Pair {
  Vec<A> first;
  Vec<A> second;
};
template <typename T>
inline constexpr bool kSplit = std::is_same_v<T, c10::BFloat16>;

// The processor's own bfloat16 products (vdpbf16ps) are not used: measured on Sapphire Rapids' successor
// one takes the time of four of float32, for the work of two, and queries would have to be two
// bfloat16s each to be as exact.
inline Pair<float> split(Wide bits) {
  return {std::bit_cast<Vec<float>>(bits << 16), std::bit_cast<Vec<float>>(bits & 0xffff0000u)};
}

template <typename T>
inline Pair<Acc<T>> load_pair(const T* source) {
  if constexpr (kSplit<T>) {
    Wide bits;
    std::memcpy(&bits, source, sizeof(bits));
    return split(bits);
  } else {
    return {load(source), load(source + kLanes<Acc<T>>)};
  }
}

// The first n elements of a pair, the others zero; what stands behind them is not read.
template <typename T>
inline Pair<Acc<T>> load_some_of_pair(const T* source, int64_t n) {
  constexpr int64_t kLane = kLanes<Acc<T>>;
  if constexpr (kSplit<T>) {
#if defined(__AVX512F__)
    return split(std::bit_cast<Wide>(
        _mm512_maskz_loadu_epi16(static_cast<__mmask32>((uint32_t{1} << n) - 1), source)));
#else
    T whole[2 * kLane] = {};
    std::copy_n(source, n, whole);
    return load_pair(whole);
#endif
  } else {
    if (n <= kLane) return {load_some(source, n), Vec<Acc<T>>{}};
    return {load(source), load_some(source + kLane, n - kLane)};
  }
}

template <typename A, size_t... Lane>
inline Pair<A> split_pair(Pair<A> x, std::index_sequence<Lane...>) {
  return {__builtin_shufflevector(x.first, x.second, static_cast<int>(2 * Lane)...),
          __builtin_shufflevector(x.first, x.second, static_cast<int>(2 * Lane + 1)...)};
}
template <typename A, size_t... Lane>
inline Pair<A> join_pair(Pair<A> x, std::index_sequence<Lane...>) {
  constexpr int kLane = kLanes<A>;
  constexpr auto source = [](int i) { return i / 2 + i % 2 * kLane; };
  return {__builtin_shufflevector(x.first, x.second, source(static_cast<int>(Lane))...),
          __builtin_shufflevector(x.first, x.second, source(static_cast<int>(Lane) + kLane)...)};
}

// Numbers of the arithmetic's type, brought to T's order and back.
template <typename T>
inline Pair<Acc<T>> load_as(const Acc<T>* source) {
  using A = Acc<T>;
  const Pair<A> x{load(source), load(source + kLanes<A>)};
  if constexpr (!kSplit<T>) return x;
  return split_pair<A>(x, std::make_index_sequence<kLanes<A>>{});
}
template <typename T>
inline void store_from(Acc<T>* target, Pair<Acc<T>> x) {
  using A = Acc<T>;
  if constexpr (kSplit<T>) x = join_pair<A>(x, std::make_index_sequence<kLanes<A>>{});
  store(target, x.first);
  store(target + kLanes<A>, x.second);
}

template <typename A>
inline Vec<A> largest_of(Vec<A> x, Vec<A> y) {
  return x > y ? x : y;
}

// Combines all lanes: halves with halves, quarters with quarters, ...
template <int Distance, typename V, typename F, size_t... Lane>
inline V fold(V x, const F& combine, std::index_sequence<Lane...> lanes) {
  if constexpr (Distance == 0) {
    return x;
  } else {
    const V other = __builtin_shufflevector(x, x, (static_cast<int>(Lane) ^ Distance)...);
    return fold<Distance / 2>(combine(x, other), combine, lanes);
  }
}

template <typename A>
inline A largest_lane(Vec<A> x) {
  constexpr auto lanes = std::make_index_sequence<kLanes<A>>{};
  return fold<kLanes<A> / 2>(x, largest_of<A>, lanes)[0];
}

template <typename A>
inline A sum_lanes(Vec<A> x) {
  constexpr auto lanes = std::make_index_sequence<kLanes<A>>{};
  return fold<kLanes<A> / 2>(x, [](Vec<A> a, Vec<A> b) { return a + b; }, lanes)[0];
}

// Adds neighbouring blocks of `Block` lanes of x and y: twice as many blocks come in as go out.
template <int Block, typename V, size_t... Lane>
inline V add_neighbours(V x, V y, std::index_sequence<Lane...>) {
  constexpr auto source = [](int lane, int odd) {
    return (2 * (lane / Block) + odd) * Block + lane % Block;
  };
  return __builtin_shufflevector(x, y, source(int(Lane), 0)...) +
         __builtin_shufflevector(x, y, source(int(Lane), 1)...);
}

// The sums of as many vectors as one has lanes, in order: about three instructions for a sum.
template <typename A, int Block = kLanes<A> / 2>
[[gnu::always_inline]] inline Vec<A> sums_of(const Vec<A>* x) {
  constexpr auto lanes = std::make_index_sequence<kLanes<A>>{};
  Vec<A> half[Block];
  for (int i = 0; i < Block; ++i) half[i] = add_neighbours<Block>(x[2 * i], x[2 * i + 1], lanes);
  if constexpr (Block == 1) {
    return half[0];
  } else {
    return sums_of<A, Block / 2>(half);
  }
}

// e^x for x <= 0: Cephes' expf, without branches; error below 2 units in the last place, zero
// below e^-87.
inline Vec<float> exponential(Vec<float> x) {
  const Vec<float> clamped = x < -87.0f ? broadcast(-87.0f) : x;  // NaN stays
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer
  const Vec<float> shifted = clamped * 1.44269504f + kRound;
  const Vec<float> n = shifted - kRound;
  const Vec<float> r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec<float> p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = (p * r) * r + r + 1.0f;
  // The integer stands in the low bits of `shifted`; 127 is the exponent of one.
  const Bits32 bits = (std::bit_cast<Bits32>(shifted) + 127) << 23;
  const Vec<float> power = std::bit_cast<Vec<float>>(bits);
  return x < -87.0f ? Vec<float>{} : p * power;
}

inline Vec<double> exponential(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = std::exp(x[i]);
  return x;
}

template <typename A>
inline A exponential_of(A x) {
  return exponential(broadcast(x))[0];
}

}  // namespace ctx::cpu::CTX_CPU_CAPABILITY
