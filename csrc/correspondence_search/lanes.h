// Dot products of many channels, for *_isa.cpp files: channels in lanes, and the sums of many vectors at once.
#pragma once

#include "zsvr/simd.h"

namespace zsvr {
namespace ZSVR_ISA {

// ---- channels -----------------------------------------------------------------------------------

// The first `count` values, the others zero.
template <class Scalar>
ZSVR_INLINE Vec widen_first(const Scalar* pointer, int count) {
#if ZSVR_ISA_LEVEL >= 2
  if constexpr (sizeof(Scalar) == 2) {
    const auto mask = static_cast<__mmask16>(count >= 16 ? 0xffffu : (1u << count) - 1u);
    const __m256i half = _mm256_maskz_loadu_epi16(mask, pointer);
    if constexpr (__is_same(Scalar, BFloat16)) {
      return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16);
    } else {
      return (Vec)_mm512_cvtph_ps(half);
    }
  }
#endif
  return load_first(pointer, count);
}

// What one load of channels gives, and how two of them multiply into a sum.
template <class Scalar>
struct Channels {
  static constexpr int kLanes = kWidth;
  using Data = Vec;
  static ZSVR_INLINE Data whole(const Scalar* pointer) { return load(pointer); }
  static ZSVR_INLINE Data first(const Scalar* pointer, int count) {
    return widen_first(pointer, count);
  }
  static ZSVR_INLINE Vec add_product(Data a, Data b, Vec sum) { return fma(a, b, sum); }
};

#if ZSVR_ISA_LEVEL >= 3
// Two products a lane, as they are stored; subnormal inputs count as zero.
template <>
struct Channels<BFloat16> {
  static constexpr int kLanes = 2 * kWidth;
  using Data = __m512i;
  static ZSVR_INLINE Data whole(const BFloat16* pointer) { return _mm512_loadu_si512(pointer); }
  static ZSVR_INLINE Data first(const BFloat16* pointer, int count) {
    return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1u, pointer);
  }
  static ZSVR_INLINE Vec add_product(Data a, Data b, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// Channels of one chain of sums; longer tokens are sums of chains, so that rounding does not grow with C.
template <class Scalar>
inline constexpr int64_t kChain = 32 * Channels<Scalar>::kLanes;

// ---- sums over lanes ----------------------------------------------------------------------------

// merge_add of simd.h with one shuffle instead of two: lanes with bit kStep come from b, the others from a, each with
// its partner kStep lanes away added.
template <int kStep>
ZSVR_INLINE Vec pair_add(Vec a, Vec b) {
#if ZSVR_ISA_LEVEL >= 2
  constexpr int kMask = kStep == 1 ? 0xaaaa : kStep == 2 ? 0xcccc : kStep == 4 ? 0xf0f0 : 0xff00;
  const __m512 mine = _mm512_mask_blend_ps(kMask, (__m512)a, (__m512)b);
  const __m512 other = _mm512_mask_blend_ps(kMask, (__m512)b, (__m512)a);
  __m512 partner;
  if constexpr (kStep == 1) {
    partner = _mm512_permute_ps(other, 0xb1);
  } else if constexpr (kStep == 2) {
    partner = _mm512_permute_ps(other, 0x4e);
  } else if constexpr (kStep == 4) {
    partner = _mm512_shuffle_f32x4(other, other, 0xb1);
  } else {
    partner = _mm512_shuffle_f32x4(other, other, 0x4e);
  }
  return (Vec)_mm512_add_ps(mine, partner);
#else
  return merge_add<kStep>(a, b);
#endif
}

// Merges kCount vectors, a power of two: lane n holds a part of the sum of x[n % kCount].
template <int kCount>
ZSVR_INLINE Vec merge_tree(const Vec* x) {
  if constexpr (kCount == 1) {
    return x[0];
  } else {
    return pair_add<kCount / 2>(merge_tree<kCount / 2>(x), merge_tree<kCount / 2>(x + kCount / 2));
  }
}

// Lane n is the sum of all lanes of x[n % kCount], in the same order of additions for every kCount.
template <int kCount>
ZSVR_INLINE Vec sum_lanes(const Vec* x) {
  Vec sum = merge_tree<kCount>(x);
  if constexpr (kCount <= 1 && kWidth > 1) sum = pair_add<1>(sum, sum);
  if constexpr (kCount <= 2 && kWidth > 2) sum = pair_add<2>(sum, sum);
  if constexpr (kCount <= 4 && kWidth > 4) sum = pair_add<4>(sum, sum);
  if constexpr (kCount <= 8 && kWidth > 8) sum = pair_add<8>(sum, sum);
  return sum;
}

// ---- lengths ------------------------------------------------------------------------------------

inline constexpr float kSmallestLength = 1e-6f;

// max(|x|, 1e-6) from sums of squares; NaN stays NaN.
ZSVR_INLINE Vec length_of(Vec squares) {
#if ZSVR_ISA_LEVEL >= 2
  const Vec root = (Vec)_mm512_sqrt_ps((__m512)squares);
#elif ZSVR_ISA_LEVEL == 1
  const Vec root = (Vec)_mm256_sqrt_ps((__m256)squares);
#else
  Vec root;
  for (int i = 0; i < kWidth; ++i) root[i] = __builtin_sqrtf(squares[i]);
#endif
  return max(broadcast(kSmallestLength), root);
}

inline constexpr int kRows = 4;  // read side by side: streams that the hardware foresees

// Lane n holds a part of |row[n % 4]|^2.
template <class Scalar>
ZSVR_INLINE Vec parts_of_squares(const Scalar* const (&row)[kRows], int64_t C) {
  using Lane = Channels<Scalar>;
  Vec total = zero();
  for (int64_t begin = 0; begin < C; begin += kChain<Scalar>) {
    Vec sum[kRows] = {};
    const int64_t end = C - begin < kChain<Scalar> ? C : begin + kChain<Scalar>;
    int64_t c = begin;
    for (; c + Lane::kLanes <= end; c += Lane::kLanes) {
#pragma GCC unroll 4
      for (int n = 0; n < kRows; ++n) {
        const auto x = Lane::whole(row[n] + c);
        sum[n] = Lane::add_product(x, x, sum[n]);
      }
    }
    if (c < end) {
#pragma GCC unroll 4
      for (int n = 0; n < kRows; ++n) {
        const auto x = Lane::first(row[n] + c, static_cast<int>(end - c));
        sum[n] = Lane::add_product(x, x, sum[n]);
      }
    }
    total = total + merge_tree<kRows>(sum);
  }
  return total;
}

// Lane n holds |row[n % 4]|^2.
template <class Scalar>
ZSVR_INLINE Vec squares_of(const Scalar* const (&row)[kRows], int64_t C) {
  Vec sum = parts_of_squares(row, C);
  if constexpr (kWidth > 4) sum = pair_add<4>(sum, sum);
  if constexpr (kWidth > 8) sum = pair_add<8>(sum, sum);
  return sum;
}

// Lane n holds |row[n]|^2.
template <class Scalar>
ZSVR_INLINE Vec squares_of(const Scalar* const (&row)[kWidth / kRows][kRows], int64_t C) {
  Vec part[kWidth / kRows];
#pragma GCC unroll 4
  for (int n = 0; n < kWidth / kRows; ++n) part[n] = parts_of_squares(row[n], C);
#if ZSVR_ISA_LEVEL >= 2
  return pair_add<8>(pair_add<4>(part[0], part[1]), pair_add<4>(part[2], part[3]));
#elif ZSVR_ISA_LEVEL == 1
  return pair_add<4>(part[0], part[1]);
#else
  return part[0];
#endif
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
