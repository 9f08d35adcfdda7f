// Groups of channels as the bilinear kernels load them, for *_isa.cpp files: one vector, or for bfloat16 from
// AVX-512 on a pair of vectors (even and odd channels) from one 64-byte load, a shift and a mask.
#pragma once

#include "zsvr/simd.h"

namespace zsvr {
namespace ZSVR_ISA {

template <class Scalar>
struct Unit {
  static constexpr int kParts = 1;
  static constexpr int kLanes = kWidth;  // channels
};

#if ZSVR_ISA_LEVEL >= 2
template <>
struct Unit<BFloat16> {
  static constexpr int kParts = 2;
  static constexpr int kLanes = 2 * kWidth;
};

ZSVR_INLINE __m512i load_bfloat16_pairs(const BFloat16* pointer, int count) {
  if (count >= 32) return _mm512_loadu_si512(pointer);
  return _mm512_maskz_loadu_epi16((1u << count) - 1u, pointer);
}

// The rounded bits in the low half of every 32-bit lane.
ZSVR_INLINE __m512i bfloat16_lanes(Vec x) {
  __m256i half;
  store(reinterpret_cast<BFloat16*>(&half), x);
  return _mm512_cvtepu16_epi32(half);
}
#endif

// x[kParts] of the first `count` channels, 1 <= count <= kLanes; the others are zero.
template <class Scalar>
ZSVR_INLINE void load_unit(const Scalar* pointer, int count, Vec* x) {
#if ZSVR_ISA_LEVEL >= 2
  if constexpr (Unit<Scalar>::kParts == 2) {
    const __m512i pairs = load_bfloat16_pairs(pointer, count);
    x[0] = (Vec)_mm512_slli_epi32(pairs, 16);
    x[1] = (Vec)_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u)));
    return;
  } else if constexpr (sizeof(Scalar) == 2) {
    if (count < kWidth) {
      const auto mask = static_cast<__mmask16>((1u << count) - 1u);
      x[0] = (Vec)_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, pointer));
      return;
    }
  }
#endif
  x[0] = load_first(pointer, count);
}

template <class Scalar>
ZSVR_INLINE void store_unit(Scalar* pointer, const Vec* x, int count) {
#if ZSVR_ISA_LEVEL >= 2
  if constexpr (Unit<Scalar>::kParts == 2) {
    const __m512i odd = _mm512_slli_epi32(bfloat16_lanes(x[1]), 16);
    const __m512i pairs = _mm512_or_si512(bfloat16_lanes(x[0]), odd);
    const __mmask32 mask = count >= 32 ? ~0u : (1u << count) - 1u;
    _mm512_mask_storeu_epi16(pointer, mask, pairs);
    return;
  }
#endif
  store_first(pointer, x[0], count);
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
