// Products of bf16 in pairs (vdpbf16ps) for *_isa.cpp files; empty below that level.
//
// A 32-bit element holds two bf16 that are multiplied with two others and added to one float32 sum. Scores pair
// neighbouring channels, as they lie in memory; the weighted sum of values pairs neighbouring keys. The products
// are those of tile.h: one operand is packed [pairs, kLanes], the other a panel of pairs read as broadcasts:
//   score_pairs:       s[n][lane]   = panel[n] . packed[:, lane]                     rows in groups of kRows
//   accumulate_pairs:  o[c][lane] (+)= sum_n panel[n][c] . packed[n][lane]           channels in groups of kRows
#pragma once

#include "zsvr/tile.h"

#if ZSVR_ISA_LEVEL >= 3
namespace zsvr {
namespace ZSVR_ISA {

// ---- packing ------------------------------------------------------------------------------------

// The first `count` of 32 values, the others zero.
ZSVR_INLINE __m512i load_channels(const BFloat16* pointer, int count) {
  return _mm512_maskz_loadu_epi16(count >= 32 ? ~0u : (1u << count) - 1u, pointer);
}

// The first `count` of 16 values, in the low halves of 32-bit lanes.
ZSVR_INLINE __m512i low_halves(const BFloat16* pointer, int count) {
  const __mmask16 mask = count >= 16 ? 0xffffu : static_cast<__mmask16>((1u << count) - 1u);
  return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, pointer));
}

// Pairs of two rows, [low, high] in every 32-bit lane; a row that is nullptr is zero.
ZSVR_INLINE __m512i interleave_rows(const BFloat16* low, const BFloat16* high, int count) {
  __m512i pairs = _mm512_setzero_si512();
  if (low != nullptr) pairs = low_halves(low, count);
  if (high != nullptr) {
    pairs = _mm512_or_si512(pairs, _mm512_slli_epi32(low_halves(high, count), 16));
  }
  return pairs;
}

// packed[c][n] = channels 2c, 2c+1 of row n for n < count, in whole groups of 16 pairs; the rest is zero. `flip`
// changes the sign.
static inline void pack_channel_pairs(const BFloat16* source, int64_t stride, int count,
                                      int vectors, int D, bool flip, uint32_t* packed) {
  const __m512i sign = _mm512_set1_epi32(flip ? static_cast<int>(0x80008000u) : 0);
  for (int v = 0; v < vectors; ++v) {
    for (int c = 0; c < D; c += 32) {
      Vec rows[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        const int n = v * 16 + i;
        __m512i row = _mm512_setzero_si512();
        if (n < count) row = load_channels(source + n * stride + c, D - c);
        rows[i] = (Vec)_mm512_xor_si512(row, sign);
      }
      transpose(rows);
      for (int i = 0; i < 16; ++i) {
        _mm512_storeu_si512(packed + (c / 2 + i) * kLanes + v * 16, (__m512i)rows[i]);
      }
    }
  }
}

// ---- softmax ------------------------------------------------------------------------------------

// Pairs of rounded values: [low, high] in every 32-bit lane.
ZSVR_INLINE __m512i round_pairs(Vec low, Vec high) {
  const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24,
                                         8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// 2^x for x <= 128 to a relative error of 3e-6, ample for values that are rounded to bf16; what lies
// below 2^-126 gives 2^-126, NaN gives NaN.
ZSVR_INLINE Vec exp2_for_bf16(Vec x) {
  x = max(broadcast(-126.0f), x);
  const Vec f = (Vec)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  Vec y = broadcast(0x1.bb7cd4p-7f);
  y = y * f + broadcast(0x1.aa13fp-5f);
  y = y * f + broadcast(0x1.ee798ap-3f);
  y = y * f + broadcast(0x1.62d166p-1f);
  y = y * f + broadcast(0x1.00002cp+0f);
  return (Vec)_mm512_scalef_ps((__m512)y, (__m512)x);
}

// The running maximum follows the scores only where they outgrow it by more than this, so p <= 2^kSlack.
inline constexpr float kSlack = 8.0f;

// Raises the peaks to scale * largest if one of them outgrew its slack: then what was summed so far is to be
// multiplied by shrink.
template <int kVec>
ZSVR_INLINE bool raise_peaks(const Vec* largest, Vec scale, Vec* peak, Vec* shrink) {
  bool grown = false;
  for (int v = 0; v < kVec; ++v) {
    const Vec allowed = peak[v] + broadcast(kSlack);
    grown =
        grown || _mm512_cmp_ps_mask((__m512)(largest[v] * scale), (__m512)allowed, _CMP_GT_OQ) != 0;
  }
  if (!grown) return false;
  for (int v = 0; v < kVec; ++v) {
    const Vec raised = max(largest[v] * scale, peak[v]);
    shrink[v] = exp2(peak[v] - raised);
    peak[v] = raised;
  }
  return true;
}

// packed[n] = pairs of exp2(scale s - peak) of rows 2n, 2n+1, zero from row `count` to row `padded`; adds the
// unrounded values to sum. packed may be s, or lie before it.
template <int kVec>
ZSVR_INLINE void exponentiate_pairs(const float* s, int count, int padded, Vec scale,
                                    const Vec* peak, Vec* sum, uint32_t* packed) {
  Vec added[kVec], top[kVec];
#pragma GCC unroll 4
  for (int v = 0; v < kVec; ++v) {
    added[v] = sum[v];
    top[v] = peak[v];
  }
  int n = 0;
  for (; n + 2 <= count; n += 2, s += 2 * kLanes, packed += kLanes) {
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) {
      const Vec low = exp2_for_bf16(load(s + v * 16) * scale - top[v]);
      const Vec high = exp2_for_bf16(load(s + kLanes + v * 16) * scale - top[v]);
      added[v] = added[v] + (low + high);
      _mm512_storeu_si512(packed + v * 16, round_pairs(low, high));
    }
  }
  for (; n < padded; n += 2, s += 2 * kLanes, packed += kLanes) {
    for (int v = 0; v < kVec; ++v) {
      const Vec low = n < count ? exp2_for_bf16(load(s + v * 16) * scale - top[v]) : zero();
      added[v] = added[v] + low;
      _mm512_storeu_si512(packed + v * 16, round_pairs(low, zero()));
    }
  }
#pragma GCC unroll 4
  for (int v = 0; v < kVec; ++v) sum[v] = added[v];
}

// ---- products -----------------------------------------------------------------------------------

ZSVR_INLINE Vec dot_pairs(Vec sum, __m512i a, __m512i b) {
  return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
}

// sum[r] += panel[n * step + r * between] . packed[n] over n < count, rows of packed `row` apart: rows of scores are
// `between` apart and their pairs adjacent, channels of values are adjacent and their pairs a row apart.
template <int kCount, int kVec>
ZSVR_INLINE void multiply_pairs(const uint32_t* panel, int64_t between, int64_t step,
                                const uint32_t* packed, int count, Vec (&sum)[kCount][kVec],
                                int64_t row = kLanes) {
#pragma GCC unroll 2
  for (int n = 0; n < count; ++n, panel += step, packed += row) {
    __m512i lane[kVec];
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) lane[v] = _mm512_loadu_si512(packed + v * 16);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(panel[r * between]));
#pragma GCC unroll 4
      for (int v = 0; v < kVec; ++v) sum[r][v] = dot_pairs(sum[r][v], lane[v], x);
    }
  }
}

template <int kCount, int kVec>
ZSVR_INLINE void score_pair_rows(const uint32_t* panel, int64_t stride, const uint32_t* packed,
                                 int pairs, float* s, Vec* largest) {
  Vec sum[kCount][kVec];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) sum[r][v] = zero();
  }
  multiply_pairs(panel, stride, 1, packed, pairs, sum);
#pragma GCC unroll 4
  for (int v = 0; v < kVec; ++v) {
    Vec most = largest[v];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      store(s + r * kLanes + v * 16, sum[r][v]);
      most = max(sum[r][v], most);
    }
    largest[v] = most;
  }
}

// s[n][lane] = panel[n] . packed[:, lane] for n < count; largest is raised to the largest of a lane.
template <int kVec>
static void score_pairs(const uint32_t* panel, int64_t stride, int count, const uint32_t* packed,
                        int pairs, float* s, Vec* largest, RowsAhead& ahead) {
  int n = 0;
  for (; n + kRows <= count; n += kRows, panel += kRows * stride, s += kRows * kLanes) {
    ahead.ask(2);
    score_pair_rows<kRows, kVec>(panel, stride, packed, pairs, s, largest);
  }
  static_assert(kRows == 6);
  if (count - n >= 3) {
    score_pair_rows<3, kVec>(panel, stride, packed, pairs, s, largest);
    n += 3, panel += 3 * stride, s += 3 * kLanes;
  }
  if (count - n == 2) score_pair_rows<2, kVec>(panel, stride, packed, pairs, s, largest);
  if (count - n == 1) score_pair_rows<1, kVec>(panel, stride, packed, pairs, s, largest);
}

template <int kCount, int kVec>
ZSVR_INLINE void accumulate_pair_channels(const uint32_t* panel, int64_t stride, int pairs,
                                          const uint32_t* packed, bool keep, float* o) {
  Vec sum[kCount][kVec];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) sum[r][v] = keep ? load(o + r * kLanes + v * 16) : zero();
  }
  multiply_pairs(panel, 1, stride, packed, pairs, sum);
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) store(o + r * kLanes + v * 16, sum[r][v]);
  }
}

// o[c][lane] = (old value, if `keep`) + sum over n < pairs of panel[n][c] . packed[n][lane].
template <int kVec>
static void accumulate_pairs(const uint32_t* panel, int64_t stride, int pairs,
                             const uint32_t* packed, int D, bool keep, float* o) {
  int c = 0;
  for (; c + kRows <= D; c += kRows) {
    accumulate_pair_channels<kRows, kVec>(panel + c, stride, pairs, packed, keep, o + c * kLanes);
  }
  if (D - c == 4) {  // D is a multiple of 8
    accumulate_pair_channels<4, kVec>(panel + c, stride, pairs, packed, keep, o + c * kLanes);
  }
  if (D - c == 2) {
    accumulate_pair_channels<2, kVec>(panel + c, stride, pairs, packed, keep, o + c * kLanes);
  }
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
#endif
