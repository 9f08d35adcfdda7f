// A small SIMD type: one source, compiled once per instruction set (ZSVR_ISA names the level).
//
// Vec is a GCC/Clang vector of kWidth floats: + - * / and comparisons are the language's own, and a * b + c
// contracts to a fused multiply-add where the level has one. What the language lacks is below.
// Loads never touch memory outside [pointer, pointer + count).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "zsvr/dtype.h"

#if !defined(ZSVR_ISA) || !defined(ZSVR_ISA_LEVEL)
#error "simd.h belongs in *_isa.cpp files, which CMake compiles with ZSVR_ISA and ZSVR_ISA_LEVEL"
#endif

#define ZSVR_INLINE inline __attribute__((always_inline))

namespace zsvr {
namespace ZSVR_ISA {

#if ZSVR_ISA_LEVEL >= 2
inline constexpr int kWidth = 16;
#elif ZSVR_ISA_LEVEL == 1
inline constexpr int kWidth = 8;
#else
inline constexpr int kWidth = 4;
#endif

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef int32_t VecInt __attribute__((vector_size(kWidth * 4)));
typedef float VecUnaligned __attribute__((vector_size(kWidth * 4), aligned(4), may_alias));

ZSVR_INLINE Vec broadcast(float x) { return x - Vec{}; }
ZSVR_INLINE Vec zero() { return Vec{}; }

// ---- scalar conversions -------------------------------------------------------------------------

ZSVR_INLINE float to_float(float x) { return x; }

ZSVR_INLINE float to_float(BFloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}

ZSVR_INLINE float to_float(Float16 x) {
#if ZSVR_ISA_LEVEL >= 1
  return _cvtsh_ss(x.bits);
#else
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = x.bits & 0x7fffu;
  uint32_t bits;
  if (magnitude >= 0x7c00u) {  // inf, NaN
    bits = sign | 0x7f800000u | (magnitude & 0x3ffu) << 13;
  } else if (magnitude >= 0x400u) {
    bits = sign | ((magnitude << 13) + 0x38000000u);
  } else {  // zero, subnormal: exact in float32
    const float value = static_cast<float>(magnitude) * 0x1p-24f;
    std::memcpy(&bits, &value, 4);
    bits |= sign;
  }
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
#endif
}

template <class Scalar>
ZSVR_INLINE Scalar from_float(float x);

template <>
ZSVR_INLINE float from_float<float>(float x) {
  return x;
}

template <>
ZSVR_INLINE BFloat16 from_float<BFloat16>(float x) {  // round to nearest even; NaN stays NaN
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<uint16_t>(bits >> 16 | 0x40u)};
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

template <>
ZSVR_INLINE Float16 from_float<Float16>(float x) {  // round to nearest even
#if ZSVR_ISA_LEVEL >= 1
  return {static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC))};
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = bits >> 16 & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {static_cast<uint16_t>(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {static_cast<uint16_t>(sign | 0x7c00u)};  // rounds past 65504
  if (bits <
      0x38800000u) {  // subnormal half: adding 0.5 leaves the rounded significand in the low bits
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {static_cast<uint16_t>(sign | (bits - 0x3f000000u))};
  }
  return {static_cast<uint16_t>(sign | ((bits - 0x38000000u + 0xfffu + (bits >> 13 & 1u)) >> 13))};
#endif
}

// ---- full-width loads and stores ----------------------------------------------------------------

ZSVR_INLINE Vec load(const float* pointer) {
  return *reinterpret_cast<const VecUnaligned*>(pointer);
}

ZSVR_INLINE Vec load(const BFloat16* pointer) {
#if ZSVR_ISA_LEVEL >= 2
  const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(pointer));
  return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
#elif ZSVR_ISA_LEVEL == 1
  const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(pointer));
  return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16);
#else
  Vec result;
  for (int i = 0; i < kWidth; ++i) result[i] = to_float(pointer[i]);
  return result;
#endif
}

ZSVR_INLINE Vec load(const Float16* pointer) {
#if ZSVR_ISA_LEVEL >= 2
  return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(pointer)));
#elif ZSVR_ISA_LEVEL == 1
  return (Vec)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(pointer)));
#else
  Vec result;
  for (int i = 0; i < kWidth; ++i) result[i] = to_float(pointer[i]);
  return result;
#endif
}

ZSVR_INLINE void store(float* pointer, Vec x) { *reinterpret_cast<VecUnaligned*>(pointer) = x; }

ZSVR_INLINE void store(BFloat16* pointer, Vec x) {
#if ZSVR_ISA_LEVEL >= 3
  // vcvtneps2bf16 flushes float32 subnormals to zero, which no error budget sees.
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(pointer, &half, 32);
#elif ZSVR_ISA_LEVEL == 2
  const __m512i bits = (__m512i)x;
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  const __mmask16 nan = _mm512_cmp_ps_mask((__m512)x, (__m512)x, _CMP_UNORD_Q);
  rounded = _mm512_mask_or_epi32(rounded, nan, bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(pointer),
                      _mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)));
#else
  for (int i = 0; i < kWidth; ++i) pointer[i] = from_float<BFloat16>(x[i]);
#endif
}

ZSVR_INLINE void store(Float16* pointer, Vec x) {
#if ZSVR_ISA_LEVEL >= 2
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(pointer),
                      _mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif ZSVR_ISA_LEVEL == 1
  _mm_storeu_si128(reinterpret_cast<__m128i*>(pointer),
                   _mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  for (int i = 0; i < kWidth; ++i) pointer[i] = from_float<Float16>(x[i]);
#endif
}

// ---- the first `count` lanes only (0 <= count <= kWidth); other lanes load as zero --------------

template <class Scalar>
ZSVR_INLINE Vec load_first(const Scalar* pointer, int count) {
  if (count >= kWidth) return load(pointer);
#if ZSVR_ISA_LEVEL >= 2
  if constexpr (sizeof(Scalar) == 4) {
    return (Vec)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), pointer);
  }
#endif
  Scalar buffer[kWidth] = {};
  std::memcpy(buffer, pointer, static_cast<size_t>(count) * sizeof(Scalar));
  return load(buffer);
}

template <class Scalar>
ZSVR_INLINE void store_first(Scalar* pointer, Vec x, int count) {
  if (count >= kWidth) return store(pointer, x);
#if ZSVR_ISA_LEVEL >= 2
  if constexpr (sizeof(Scalar) == 4) {
    _mm512_mask_storeu_ps(pointer, static_cast<__mmask16>((1u << count) - 1u), (__m512)x);
    return;
  }
#endif
  Scalar buffer[kWidth];
  store(buffer, x);
  std::memcpy(pointer, buffer, static_cast<size_t>(count) * sizeof(Scalar));
}

// ---- arithmetic ---------------------------------------------------------------------------------

ZSVR_INLINE Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }

// b where a is NaN, as the x86 instruction does.
ZSVR_INLINE Vec max(Vec a, Vec b) {
#if ZSVR_ISA_LEVEL >= 2
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#elif ZSVR_ISA_LEVEL == 1
  return (Vec)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}

ZSVR_INLINE Vec min(Vec a, Vec b) {
#if ZSVR_ISA_LEVEL >= 2
  return (Vec)_mm512_min_ps((__m512)a, (__m512)b);
#elif ZSVR_ISA_LEVEL == 1
  return (Vec)_mm256_min_ps((__m256)a, (__m256)b);
#else
  return a < b ? a : b;
#endif
}

ZSVR_INLINE float reduce_add(Vec x) {
#if ZSVR_ISA_LEVEL >= 2
  return _mm512_reduce_add_ps((__m512)x);
#else
  float sum = 0.0f;
  float pairs[kWidth / 2];
  for (int i = 0; i < kWidth / 2; ++i) pairs[i] = x[i] + x[i + kWidth / 2];
  for (int i = 0; i < kWidth / 2; ++i) sum += pairs[i];
  return sum;
#endif
}

ZSVR_INLINE float reduce_max(Vec x) {
  float result = x[0];
  for (int i = 1; i < kWidth; ++i) result = x[i] > result ? x[i] : result;
  return result;
}

// Adds neighbours kStep lanes apart within a and within b, and interleaves: the lanes whose index has bit kStep
// come from b. Applying it for steps 1, 2, 4, ... to pairs of 8 vectors sums each vector into its own lane.
template <int kStep>
ZSVR_INLINE Vec merge_add(Vec a, Vec b) {
#if defined(__clang__)
  Vec result;
  for (int lane = 0; lane < kWidth; ++lane) {
    const int low = lane & ~kStep;
    result[lane] = (lane & kStep) != 0 ? b[low] + b[low + kStep] : a[low] + a[low + kStep];
  }
  return result;
#else
  VecInt low{}, high{};
  for (int lane = 0; lane < kWidth; ++lane) {
    const int from = (lane & ~kStep) + ((lane & kStep) != 0 ? kWidth : 0);
    low[lane] = from;
    high[lane] = from + kStep;
  }
  return __builtin_shuffle(a, b, low) + __builtin_shuffle(a, b, high);
#endif
}

// Lane n of the result is the sum of all lanes of x[n].
ZSVR_INLINE Vec reduce_group(const Vec (&x)[kWidth >= 8 ? 8 : 4]) {
  const Vec a = merge_add<1>(x[0], x[1]), b = merge_add<1>(x[2], x[3]);
  const Vec ab = merge_add<2>(a, b);
#if ZSVR_ISA_LEVEL >= 1
  const Vec c = merge_add<1>(x[4], x[5]), d = merge_add<1>(x[6], x[7]);
  const Vec all = merge_add<4>(ab, merge_add<2>(c, d));
#if ZSVR_ISA_LEVEL >= 2
  return merge_add<8>(all, all);
#else
  return all;
#endif
#else
  return ab;
#endif
}

// 2^x: exactly 1 at 0, 0 below -126 (so for -inf, and no subnormal result slows what follows), relative error
// below 1.5e-7; NaN gives NaN. x <= 128.
ZSVR_INLINE Vec exp2(Vec x) {
#if ZSVR_ISA_LEVEL >= 2
  const Vec rounded = (Vec)_mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | 8);
  const Vec f = x - rounded;
#elif ZSVR_ISA_LEVEL == 1
  const Vec clamped = max(broadcast(-127.0f), x);  // NaN passes: max returns its second operand
  const Vec rounded = (Vec)_mm256_round_ps((__m256)clamped, _MM_FROUND_TO_NEAREST_INT | 8);
  const Vec f = clamped - rounded;
#else
  const Vec clamped = x < -127.0f ? broadcast(-127.0f) : x;
  const Vec magic = broadcast(12582912.0f);  // 1.5 * 2^23
  const Vec rounded = (clamped + magic) - magic;
  const Vec f = clamped - rounded;
#endif
  // Least squares at Chebyshev points of [-0.5, 0.5] with the constant fixed to 1.
  Vec y = broadcast(1.532934742e-4f);
  y = y * f + broadcast(1.339029579e-3f);
  y = y * f + broadcast(9.618467833e-3f);
  y = y * f + broadcast(5.550358530e-2f);
  y = y * f + broadcast(2.402264837e-1f);
  y = y * f + broadcast(6.931471876e-1f);
  y = y * f + broadcast(1.0f);
#if ZSVR_ISA_LEVEL >= 2
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
  return (Vec)_mm512_maskz_scalef_ps(kept, (__m512)y, (__m512)rounded);
#else
  const VecInt exponent = __builtin_convertvector(rounded, VecInt);
  const Vec scaled = y * (Vec)((exponent + 127) << 23);
  return x < -126.0f ? zero() : (x == x ? scaled : x);
#endif
}

inline constexpr float kLog2E = 1.44269504088896341f;
inline constexpr float kLn2 = 0.693147180559945309f;

ZSVR_INLINE Vec exp(Vec x) { return exp2(x * broadcast(kLog2E)); }

}  // namespace ZSVR_ISA
}  // namespace zsvr
