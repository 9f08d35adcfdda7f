// The two matrix products of attention on a CPU, with one operand in SIMD lanes and the other as scalars.
//
// A packed operand is [D, kLanes] float32: channel-major, one query (or key) per lane. The other operand is a
// panel: float32 rows read as broadcasts, copied from tokens of any strides and storage type:
//   score_block:       s[n][lane]  = panel[n] . packed[:, lane]              rows in groups of kRows
//   accumulate_block:  o[c][lane] (+)= sum_n panel[n][c] * s[n][lane]        channels in groups of kRows
// The copy pays where several packed operands meet one panel: tokens of one head are a power of two apart, so
// in place they share a few cache sets, miss the first-level cache always and the second-level cache often.
// kRows x kVectors accumulators fill the register file: 6 x 4 of 32 on AVX-512, 6 x 2 of 16 on AVX2.
#pragma once

#include "zsvr/simd.h"

namespace zsvr {
namespace ZSVR_ISA {

inline constexpr int kVectors = ZSVR_ISA_LEVEL >= 2 ? 4 : 2;
inline constexpr int kRows = ZSVR_ISA_LEVEL >= 1 ? 6 : 4;
inline constexpr int kLanes = kVectors * kWidth;
static_assert((kRows + 1) * kVectors + 1 <= (ZSVR_ISA_LEVEL >= 2 ? 32 : 16));

inline constexpr int64_t kAlign = 64;
ZSVR_INLINE int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// ---- transposing pack and unpack ----------------------------------------------------------------

#if defined(__clang__)
ZSVR_INLINE void transpose(Vec (&rows)[kWidth]) {
  float buffer[kWidth][kWidth];
  for (int i = 0; i < kWidth; ++i) store(buffer[i], rows[i]);
  for (int i = 0; i < kWidth; ++i) {
    for (int j = 0; j < kWidth; ++j) rows[i][j] = buffer[j][i];
  }
}
#else
template <int kStep>
ZSVR_INLINE void transpose_stage(Vec (&rows)[kWidth]) {
  VecInt low{}, high{};
  for (int lane = 0; lane < kWidth; ++lane) {
    const bool odd = (lane & kStep) != 0;
    low[lane] = odd ? kWidth + lane - kStep : lane;
    high[lane] = odd ? kWidth + lane : lane + kStep;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kWidth; ++i) {
    if ((i & kStep) != 0) continue;
    const Vec a = rows[i], b = rows[i + kStep];
    rows[i] = __builtin_shuffle(a, b, low);
    rows[i + kStep] = __builtin_shuffle(a, b, high);
  }
}

ZSVR_INLINE void transpose(Vec (&rows)[kWidth]) {
  transpose_stage<1>(rows);
  transpose_stage<2>(rows);
  if constexpr (kWidth >= 8) transpose_stage<4>(rows);
  if constexpr (kWidth >= 16) transpose_stage<8>(rows);
}
#endif

// packed[c][n] = factor * source[n * stride + c] for n < count; lanes count..vectors*kWidth are zero.
template <class Scalar>
static void pack_transposed(const Scalar* source, int64_t stride, int count, int vectors, int D,
                            float factor, float* packed) {
  const Vec scale = broadcast(factor);
  for (int v = 0; v < vectors; ++v) {
    for (int c = 0; c < D; c += kWidth) {
      const int channels = D - c < kWidth ? D - c : kWidth;
      Vec rows[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        const int n = v * kWidth + i;
        rows[i] = n < count ? load_first(source + n * stride + c, channels) * scale : zero();
      }
      transpose(rows);
      for (int i = 0; i < channels; ++i) store(packed + (c + i) * kLanes + v * kWidth, rows[i]);
    }
  }
}

// target[n * stride + c] = packed[c][n] * factors[n] for n < count.
template <class Scalar>
static void unpack_transposed(const float* packed, const float* factors, int count, int vectors,
                              int D, Scalar* target, int64_t stride) {
  for (int v = 0; v < vectors; ++v) {
    const Vec factor = load(factors + v * kWidth);
    for (int c = 0; c < D; c += kWidth) {
      const int channels = D - c < kWidth ? D - c : kWidth;
      Vec rows[kWidth];
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        rows[i] = i < channels ? load(packed + (c + i) * kLanes + v * kWidth) * factor : zero();
      }
      transpose(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        const int n = v * kWidth + i;
        if (n < count) store_first(target + n * stride + c, rows[i], channels);
      }
    }
  }
}

// ---- panels -------------------------------------------------------------------------------------

// Floats between rows of a panel: an odd number of cache lines, so that equal channels use all cache sets.
ZSVR_INLINE int64_t panel_stride(int64_t D) { return ((D + 15) / 16 | 1) * 16; }

// panel[n][c] = factor * source[n * stride + c] for n < count; 0 behind channel D, up to a whole vector.
template <class Scalar>
static void copy_rows(const Scalar* source, int64_t stride, int count, int D, float* panel,
                      float factor = 1.0f) {
  const int64_t panel_row = panel_stride(D);
  const Vec scale = broadcast(factor);
  for (int n = 0; n < count; ++n, source += stride, panel += panel_row) {
    int c = 0;
    for (; c + kWidth <= D; c += kWidth) store(panel + c, load(source + c) * scale);
    if (c < D) store(panel + c, load_first(source + c, D - c) * scale);
  }
}

// Rows that will be copied next; asking for their lines is spread over the products that run meanwhile.
struct RowsAhead {
  const char *a = nullptr, *b = nullptr;  // two operands
  int64_t stride_a = 0, stride_b = 0;     // bytes
  int64_t width = 0;                      // bytes of a row
  int count = 0;

  ZSVR_INLINE void ask(int rows) {
    for (; rows > 0 && count > 0; --rows, --count, a += stride_a, b += stride_b) {
      for (int64_t c = 0; c < width; c += 64) {
        __builtin_prefetch(a + c, 0, 2);
        __builtin_prefetch(b + c, 0, 2);
      }
    }
  }
};

// ---- scores -------------------------------------------------------------------------------------

// A dot product is a sum of chains of equal length, at most this many channels each: the rounding error of a large
// score is that of its chains, and moves the whole row of o.
inline constexpr int kLongestChain = 32;

ZSVR_INLINE int chain_length(int D) {
  const int chains = (D + kLongestChain - 1) / kLongestChain;
  return (D + chains - 1) / chains;
}

template <int kCount, int kVec>
ZSVR_INLINE void score_rows(const float* panel, const float* packed, int D, float* s, Vec* peak) {
  const float* row[kCount];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) row[r] = panel + r * panel_stride(D);
  const int chain = chain_length(D);
  for (int begin = 0; begin < D; begin += chain) {
    const int end = begin + chain < D ? begin + chain : D;
    Vec sum[kCount][kVec];
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVec; ++v) sum[r][v] = zero();
    }
#pragma GCC unroll 2
    for (int c = begin; c < end; ++c) {
      Vec lane[kVec];
#pragma GCC unroll 4
      for (int v = 0; v < kVec; ++v) lane[v] = load(packed + c * kLanes + v * kWidth);
#pragma GCC unroll 8
      for (int r = 0; r < kCount; ++r) {
        const Vec x = broadcast(row[r][c]);
#pragma GCC unroll 4
        for (int v = 0; v < kVec; ++v) sum[r][v] = fma(x, lane[v], sum[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVec; ++v) {
        float* target = s + r * kLanes + v * kWidth;
        if (begin > 0) sum[r][v] = sum[r][v] + load(target);
        store(target, sum[r][v]);
        if (peak != nullptr && end == D) peak[v] = max(sum[r][v], peak[v]);
      }
    }
  }
}

// s[n][lane] = panel[n] . packed[:, lane] for n < count; peak[v], if given, is raised to the largest.
template <int kVec>
static void score_block(const float* panel, int count, const float* packed, int D, float* s,
                        Vec* peak, RowsAhead& ahead) {
  const int64_t stride = panel_stride(D);
  int n = 0;
  for (; n + kRows <= count; n += kRows) {
    ahead.ask(2);
    score_rows<kRows, kVec>(panel + n * stride, packed, D, s + n * kLanes, peak);
  }
  switch (count - n) {
    case 1:
      return score_rows<1, kVec>(panel + n * stride, packed, D, s + n * kLanes, peak);
    case 2:
      return score_rows<2, kVec>(panel + n * stride, packed, D, s + n * kLanes, peak);
    case 3:
      return score_rows<3, kVec>(panel + n * stride, packed, D, s + n * kLanes, peak);
    case 4:
      if constexpr (kRows > 4)
        score_rows<4, kVec>(panel + n * stride, packed, D, s + n * kLanes, peak);
      return;
    case 5:
      if constexpr (kRows > 5)
        score_rows<5, kVec>(panel + n * stride, packed, D, s + n * kLanes, peak);
      return;
    default:
      return;
  }
}

// ---- accumulation -------------------------------------------------------------------------------

// What happens to the old value of o.
enum class Keep { kNothing, kAll, kScaled };

template <int kCount, int kVec, Keep kKeep>
ZSVR_INLINE void accumulate_channels(const float* panel, int64_t stride, int count, int c,
                                     const float* s, const Vec* scale, float* o) {
  const float* row = panel + c;
  Vec sum[kCount][kVec];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) sum[r][v] = zero();
  }
#pragma GCC unroll 2
  for (int n = 0; n < count; ++n, row += stride) {
    Vec lane[kVec];
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) lane[v] = load(s + n * kLanes + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const Vec x = broadcast(row[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVec; ++v) sum[r][v] = fma(x, lane[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) {
      float* target = o + (c + r) * kLanes + v * kWidth;
      if constexpr (kKeep == Keep::kAll) sum[r][v] = sum[r][v] + load(target);
      if constexpr (kKeep == Keep::kScaled) sum[r][v] = fma(load(target), scale[v], sum[r][v]);
      store(target, sum[r][v]);
    }
  }
}

template <int kVec, Keep kKeep>
static void accumulate_kept(const float* panel, int count, const float* s, int D, const Vec* scale,
                            float* o) {
  const int64_t stride = panel_stride(D);
  int c = 0;
  for (; c + kRows <= D; c += kRows) {
    accumulate_channels<kRows, kVec, kKeep>(panel, stride, count, c, s, scale, o);
  }
  switch (D - c) {  // D is a multiple of 8, kRows is 6 or 4
    case 2:
      return accumulate_channels<2, kVec, kKeep>(panel, stride, count, c, s, scale, o);
    case 4:
      return accumulate_channels<4, kVec, kKeep>(panel, stride, count, c, s, scale, o);
    default:
      return;
  }
}

// o[c][lane] = (kept old value) + sum over n < count of panel[n][c] * s[n][lane]; nothing is kept of the first
// block, and where a scale is given the old value is multiplied by it.
template <int kVec, Keep kRest>
ZSVR_INLINE void accumulate_block(const float* panel, int count, const float* s, int D, bool first,
                                  const Vec* scale, float* o) {
  if (first) {
    accumulate_kept<kVec, Keep::kNothing>(panel, count, s, D, nullptr, o);
  } else {
    accumulate_kept<kVec, kRest>(panel, count, s, D, scale, o);
  }
}

// ---- products with channels in lanes ------------------------------------------------------------

// Vectors that hold D channels.
ZSVR_INLINE int channel_vectors(int D) { return (D + kWidth - 1) / kWidth; }

template <int kCount, int kVec>
ZSVR_INLINE void multiply_rows(const float* s, int keys, const float* panel, int64_t stride,
                               bool first, float* out, int64_t out_stride) {
  Vec sum[kCount][kVec];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) sum[r][v] = zero();
  }
#pragma GCC unroll 2
  for (int n = 0; n < keys; ++n, panel += stride) {
    Vec lane[kVec];
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) lane[v] = load(panel + v * kWidth);
#pragma GCC unroll 8
    for (int r = 0; r < kCount; ++r) {
      const Vec x = broadcast(s[r * kLanes + n]);
#pragma GCC unroll 4
      for (int v = 0; v < kVec; ++v) sum[r][v] = fma(x, lane[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) {
      float* target = out + r * out_stride + v * kWidth;
      store(target, first ? sum[r][v] : sum[r][v] + load(target));
    }
  }
}

template <int kVec>
static void multiply_columns(const float* s, int count, int keys, const float* panel,
                             int64_t stride, bool first, float* out, int64_t out_stride) {
  int n = 0;
  for (; n + kRows <= count; n += kRows) {
    multiply_rows<kRows, kVec>(s + n * kLanes, keys, panel, stride, first, out + n * out_stride,
                               out_stride);
  }
  for (; n + 2 <= count; n += 2) {
    multiply_rows<2, kVec>(s + n * kLanes, keys, panel, stride, first, out + n * out_stride,
                           out_stride);
  }
  if (n < count) {
    multiply_rows<1, kVec>(s + n * kLanes, keys, panel, stride, first, out + n * out_stride,
                           out_stride);
  }
}

// out[n][c] = (old value unless first) + sum over k < keys of s[n][k] * panel[k][c], for n < count and c up to
// whole vectors of channels. s has rows of kLanes.
[[maybe_unused]] static void multiply_block(const float* s, int count, int keys, const float* panel,
                                            int64_t stride, int D, bool first, float* out,
                                            int64_t out_stride) {
  const int vectors = channel_vectors(D);
  int v = 0;
  for (; v + kVectors <= vectors; v += kVectors) {
    multiply_columns<kVectors>(s, count, keys, panel + v * kWidth, stride, first, out + v * kWidth,
                               out_stride);
  }
  if constexpr (kVectors > 2) {
    if (vectors - v == 3) {
      return multiply_columns<3>(s, count, keys, panel + v * kWidth, stride, first,
                                 out + v * kWidth, out_stride);
    }
    if (vectors - v == 2) {
      return multiply_columns<2>(s, count, keys, panel + v * kWidth, stride, first,
                                 out + v * kWidth, out_stride);
    }
  }
  if (vectors - v == 1) {
    multiply_columns<1>(s, count, keys, panel + v * kWidth, stride, first, out + v * kWidth,
                        out_stride);
  }
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
