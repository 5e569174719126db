// Portable vectors for the CPU implementations, on the compiler's vector types: the same source becomes AVX-512, AVX2
// or SSE / NEON code according to the target it is compiled for (cpu_target.h). Loads widen to the type that arithmetic
// happens in: float for float, bfloat16 and float16; double for double, which exists so that gradients can be checked
// numerically.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#include "core/dtype.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

#ifndef ARFAST_CPU_TARGET
#define ARFAST_CPU_TARGET baseline
#endif

namespace arfast::ARFAST_CPU_TARGET {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kFloatLanes = kVectorBytes / 4;
constexpr int kDoubleLanes = kVectorBytes / 8;

typedef float VecF __attribute__((vector_size(kVectorBytes)));
typedef int32_t VecI __attribute__((vector_size(kVectorBytes)));
typedef uint32_t VecU __attribute__((vector_size(kVectorBytes)));
typedef uint16_t VecU16 __attribute__((vector_size(kVectorBytes / 2)));
typedef double VecD __attribute__((vector_size(kVectorBytes)));

// Acc<T>: the type that arithmetic on elements of type T happens in; Vec<T>: a register full of it.
template <typename T>
struct SimdTraits {
  using Acc = float;
  using Vec = VecF;
  static constexpr int kLanes = kFloatLanes;
};
template <>
struct SimdTraits<double> {
  using Acc = double;
  using Vec = VecD;
  static constexpr int kLanes = kDoubleLanes;
};
template <typename T>
using Acc = typename SimdTraits<T>::Acc;
template <typename T>
using Vec = typename SimdTraits<T>::Vec;
template <typename T>
constexpr int kLanes = SimdTraits<T>::kLanes;

template <typename A>
constexpr A kInfinity = std::numeric_limits<A>::infinity();

template <typename V>
inline V splat(decltype(V{}[0] + 0) value) {
  return V{} + value;
}

// Scalars.

inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }
inline float to_acc(BFloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float to_acc(Float16 x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits;
  float value;
  if (magnitude >= 0x7c00u) {  // infinity and NaN keep their payload
    bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x0400u) {
    bits = sign | ((magnitude << 13) + 0x38000000u);
  } else {  // subnormal: magnitude * 2^-24 is exact
    value = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  std::memcpy(&value, &bits, 4);
  return value;
#endif
}

template <typename T>
inline T from_acc(Acc<T> x);
template <>
inline float from_acc<float>(float x) {
  return x;
}
template <>
inline double from_acc<double>(double x) {
  return x;
}
template <>
inline BFloat16 from_acc<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return BFloat16{0x7fc0};
  return BFloat16{static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline Float16 from_acc<Float16>(float x) {
#if defined(__F16C__)
  return Float16{static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint16_t sign = static_cast<uint16_t>(bits >> 16 & 0x8000u);
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return Float16{static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return Float16{static_cast<uint16_t>(sign | 0x7c00u)};  // rounds beyond 65504
  if (bits < 0x38800000u) {  // subnormal: adding 0.5 lets the float unit round at 2^-24
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return Float16{static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  const uint32_t rounded = bits + 0xfffu + (bits >> 13 & 1u) - 0x38000000u;
  return Float16{static_cast<uint16_t>(sign | rounded >> 13)};
#endif
}

// Vectors: load and store of kLanes<T> elements at any alignment.

inline VecF load(const float* p) {
  VecF v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
inline VecD load(const double* p) {
  VecD v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
// GCC 12 turns the generic conversions between 16 and 32 bits into several shuffles, hence the intrinsics.
inline VecF load(const BFloat16* p) {
#if defined(__AVX512F__)
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return reinterpret_cast<VecF>(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
#elif defined(__AVX2__)
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return reinterpret_cast<VecF>(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
#else
  VecU16 h;
  std::memcpy(&h, p, sizeof(h));
  return reinterpret_cast<VecF>(__builtin_convertvector(h, VecU) << 16);
#endif
}
inline VecF load(const Float16* p) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
  return reinterpret_cast<VecF>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#else
  VecF v{};
  for (int lane = 0; lane < kFloatLanes; ++lane) v[lane] = to_acc(p[lane]);
  return v;
#endif
}

inline void store(float* p, VecF v) { std::memcpy(p, &v, sizeof(v)); }
inline void store(double* p, VecD v) { std::memcpy(p, &v, sizeof(v)); }
// The bits of the nearest bfloat16, in the low half of each lane.
inline VecU round_to_bf16(VecF v) {
  const VecU bits = reinterpret_cast<VecU>(v);
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return v == v ? rounded : VecU{} + 0x7fc0u;
}
inline void store_low_halves(void* p, VecU v) {
#if defined(__AVX512F__)
  const __m256i half = _mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(v));
  _mm256_storeu_si256(static_cast<__m256i*>(p), half);
#elif defined(__AVX2__)
  // The pack works within 128-bit lanes; the permutation puts the two low halves side by side.
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(v), reinterpret_cast<__m256i>(v));
  _mm_storeu_si128(static_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  const VecU16 half = __builtin_convertvector(v, VecU16);
  std::memcpy(p, &half, sizeof(half));
#endif
}
inline void store(BFloat16* p, VecF v) { store_low_halves(p, round_to_bf16(v)); }
inline void store(Float16* p, VecF v) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(reinterpret_cast<__m512>(v), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p),
                   _mm256_cvtps_ph(reinterpret_cast<__m256>(v), _MM_FROUND_TO_NEAREST_INT));
#else
  for (int lane = 0; lane < kFloatLanes; ++lane) p[lane] = from_acc<Float16>(v[lane]);
#endif
}

// The first `count` < kLanes elements; the other lanes hold `fill` and are not stored.
template <typename T>
inline Vec<T> load_partial(const T* p, int count, Acc<T> fill) {
  Vec<T> v = splat<Vec<T>>(fill);
  for (int lane = 0; lane < count; ++lane) v[lane] = to_acc(p[lane]);
  return v;
}
template <typename T>
inline void store_partial(T* p, Vec<T> v, int count) {
  for (int lane = 0; lane < count; ++lane) p[lane] = from_acc<T>(v[lane]);
}

// A row as vectors: calls f(offset, count) with count == kLanes<T> for all but the partial vector at the end, which
// load_lanes fills up with zeros and store_lanes cuts off.
template <typename T, typename F>
inline void for_each_vector(int64_t size, const F& f) {
  int64_t i = 0;
  for (; i + kLanes<T> <= size; i += kLanes<T>) f(i, kLanes<T>);
  if (i < size) f(i, static_cast<int>(size - i));
}
template <typename T>
inline Vec<T> load_lanes(const T* p, int count) {
  return count == kLanes<T> ? load(p) : load_partial(p, count, 0);
}
template <typename T>
inline void store_lanes(T* p, Vec<T> v, int count) {
  if (count == kLanes<T>) return store(p, v);
  store_partial<T>(p, v, count);
}

// a b + c rounded once where the target can, and then always: whether the compiler fuses the two differs from place to
// place, so code of which two versions must give the same bits says it.
inline VecF multiply_add(VecF a, VecF b, VecF c) {
#if defined(__AVX512F__)
  return reinterpret_cast<VecF>(
      _mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<VecF>(
      _mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#else
  return a * b + c;
#endif
}

// A NaN in `a` is passed over: callers that must see it add the elements as well.
template <typename V>
inline V max(V a, V b) {
  return a > b ? a : b;
}

// Reductions halve the vector: f(low half, high half), in the same order on every target of the same width.
template <typename V, typename F>
inline auto reduce(V v, const F& f) {
  using T = std::remove_reference_t<decltype(v[0] + 0)>;
  if constexpr (sizeof(V) == 2 * sizeof(T)) {
    return f(v[0], v[1]);
  } else {
    typedef T Half __attribute__((vector_size(sizeof(V) / 2)));
    Half low, high;
    std::memcpy(&low, &v, sizeof(Half));
    std::memcpy(&high, reinterpret_cast<const char*>(&v) + sizeof(Half), sizeof(Half));
    return reduce(f(low, high), f);
  }
}
template <typename V>
inline auto reduce_add(V v) {
  return reduce(v, [](auto a, auto b) { return a + b; });
}
template <typename V>
inline auto reduce_max(V v) {
  return reduce(v, [](auto a, auto b) { return a > b ? a : b; });
}

// e^x by range reduction and a polynomial of degree 6, at most 2 ulp for results in the normal range; smaller ones are
// 0 or subnormal, larger than the largest float infinity, NaN stays NaN.
#if defined(__AVX512F__)
inline VecF exp(VecF x) {
  // The second operand of min and max wins when either is NaN.
  __m512 t = _mm512_max_ps(_mm512_set1_ps(-104.0f), reinterpret_cast<__m512>(x));
  t = _mm512_min_ps(_mm512_set1_ps(89.0f), t);
  const __m512 n = _mm512_roundscale_ps(t * 1.44269504f, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m512 r = t - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  __m512 p = r * 1.38146690e-3f + 8.36884586e-3f;
  p = p * r + 4.16683965e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  return reinterpret_cast<VecF>(_mm512_scalef_ps(p, n));
}
#else
inline VecF exp(VecF x) {
  const VecF clamped_low = x < -87.33654f ? splat<VecF>(-87.33654f) : x;
  const VecF clamped = clamped_low > 88.72284f ? splat<VecF>(88.72284f) : clamped_low;
  // Adding 1.5 * 2^23 rounds to the nearest integer and leaves it in the low bits.
  const VecF shifted = clamped * 1.44269504f + 12582912.0f;
  const VecF n = shifted - 12582912.0f;
  VecF r = clamped - n * 0.693145752f;
  r = r - n * 1.42860677e-6f;
  VecF p = splat<VecF>(1.38146690e-3f);
  p = p * r + 8.36884586e-3f;
  p = p * r + 4.16683965e-2f;
  p = p * r + 1.66665196e-1f;
  p = p * r + 0.49999994f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  // 2^n in two factors: n reaches 128, which has no exponent of its own.
  const VecI integer = reinterpret_cast<VecI>(shifted) - 0x4b400000;
  const VecI half = integer >> 1;
  const VecF scale_1 = reinterpret_cast<VecF>((half + 127) << 23);
  const VecF scale_2 = reinterpret_cast<VecF>((integer - half + 127) << 23);
  const VecF result = p * scale_1 * scale_2;
  const VecF flushed = x < -87.33654f ? VecF{} : result;
  return x > 88.72284f ? splat<VecF>(std::numeric_limits<float>::infinity()) : flushed;
}
#endif
inline VecD exp(VecD x) {
  VecD v = x;
  for (int lane = 0; lane < kDoubleLanes; ++lane) v[lane] = std::exp(x[lane]);
  return v;
}

// tanh(x) = 1 - 2 / (e^(2x) + 1); near 0, where that cancels, x + x^3 P(x^2) with the P of Cephes (Moshier 1989). At
// most 2 ulp.
inline VecF tanh(VecF x) {
  const VecF magnitude = x < 0.0f ? -x : x;
  const VecF by_exp = 1.0f - 2.0f / (exp(magnitude + magnitude) + 1.0f);
  const VecF square = x * x;
  VecF p = splat<VecF>(-5.70498873e-3f);
  p = p * square + 2.06390888e-2f;
  p = p * square - 5.37397156e-2f;
  p = p * square + 1.33314422e-1f;
  p = p * square - 3.33332819e-1f;
  const VecF by_polynomial = magnitude + magnitude * (square * p);
  const VecF result = magnitude < 0.625f ? by_polynomial : by_exp;
  return x < 0.0f ? -result : result;
}
inline VecD tanh(VecD x) {
  VecD v = x;
  for (int lane = 0; lane < kDoubleLanes; ++lane) v[lane] = std::tanh(x[lane]);
  return v;
}

}  // namespace arfast::ARFAST_CPU_TARGET
