// The two things trajectory attention does with bilinear samples, for *_isa.cpp files:
//   dots   one number per head: y . sum_c w_c x_c      (logits, and dO . V)
//   blend  a row: sum over slots of weight * sum_c w_c x_c      (output, and dq)
// All heads of a corner row are handled together, so a cell is located once for H heads.
#pragma once

#include "trajectory_attention/cell.h"
#include "zsvr/params.h"
#include "zsvr/simd.h"

namespace zsvr {
namespace ZSVR_ISA {

inline constexpr int kGroup = kWidth >= 8 ? 8 : 4;  // heads reduced together
inline constexpr int kChunk = 4;                    // vectors of one head kept in registers
inline constexpr int64_t kScoreBudget = 64 * 1024;  // floats of scores per worker

ZSVR_INLINE int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// A tile of sites: as square as 64 sites allow, smaller where slots x heads are many.
struct Tiling {
  int64_t height, width;  // sites of a tile
  int64_t rows, columns;  // tiles of the grid
};

ZSVR_INLINE Tiling tiling_of(int64_t Hg, int64_t Wg, int64_t L, int64_t H) {
  Tiling tiling{8, 8, 0, 0};
  while (tiling.height * tiling.width > 1 && tiling.height * tiling.width * L * H > kScoreBudget) {
    (tiling.height >= tiling.width ? tiling.height : tiling.width) /= 2;
  }
  tiling.rows = (Hg + tiling.height - 1) / tiling.height;
  tiling.columns = (Wg + tiling.width - 1) / tiling.width;
  return tiling;
}

// The sites of one tile, row by row.
struct TileSites {
  int64_t top, left, height, width, Wg;

  int64_t count() const { return height * width; }
  int64_t site(int64_t n) const { return (top + n / width) * Wg + left + n % width; }
};

ZSVR_INLINE TileSites tile_at(const Tiling& tiling, int64_t tile, int64_t Hg, int64_t Wg) {
  TileSites sites;
  sites.top = tile / tiling.columns * tiling.height;
  sites.left = tile % tiling.columns * tiling.width;
  sites.height = Hg - sites.top < tiling.height ? Hg - sites.top : tiling.height;
  sites.width = Wg - sites.left < tiling.width ? Wg - sites.left : tiling.width;
  sites.Wg = Wg;
  return sites;
}

// One live slot of one query: corner rows (head 0) and weights.
template <class Scalar>
struct Sample {
  const Scalar* row[4];
  float weight[4];
  int corners;
  int slot;
};

template <class Scalar>
ZSVR_INLINE Sample<Scalar> sample_at(const ConstTokens& x, int64_t b, int64_t j,
                                     const float* position, int64_t Hg, int64_t Wg, int slot) {
  const Cell cell = cell_of(position, Hg, Wg);
  Sample<Scalar> sample;
  sample.corners = cell.corners;
  sample.slot = slot;
  for (int c = 0; c < cell.corners; ++c) {
    sample.row[c] = x.at<Scalar>(b, j, cell.site[c], 0);
    sample.weight[c] = cell.weight[c];
  }
  return sample;
}

// ---- dots ---------------------------------------------------------------------------------------

template <class Scalar, int kCorners>
ZSVR_INLINE Vec blend_corners(const Scalar* const* row, const Vec* weight, int64_t at) {
  if constexpr (kCorners == 1) return load(row[0] + at);
  Vec x = load(row[0] + at) * weight[0];
#pragma GCC unroll 4
  for (int c = 1; c < kCorners; ++c) x = fma(load(row[c] + at), weight[c], x);
  return x;
}

template <class Scalar, int kCorners>
ZSVR_INLINE Vec blend_corners_first(const Scalar* const* row, const Vec* weight, int64_t at,
                                    int count) {
  if constexpr (kCorners == 1) return load_first(row[0] + at, count);
  Vec x = load_first(row[0] + at, count) * weight[0];
#pragma GCC unroll 4
  for (int c = 1; c < kCorners; ++c) x = fma(load_first(row[c] + at, count), weight[c], x);
  return x;
}

template <class Scalar, int kCorners>
static void dots_of(const Sample<Scalar>& sample, int64_t stride, const Scalar* y, int64_t y_stride,
                    int64_t H, int D, float* out) {
  Vec weight[kCorners];
#pragma GCC unroll 4
  for (int c = 0; c < kCorners; ++c) weight[c] = broadcast(sample.weight[c]);
  const Scalar* row[kCorners];
#pragma GCC unroll 4
  for (int c = 0; c < kCorners; ++c) row[c] = sample.row[c];
  for (int64_t first = 0; first < H; first += kGroup) {
    const int heads = H - first < kGroup ? static_cast<int>(H - first) : kGroup;
    Vec partial[kGroup];
#pragma GCC unroll 8
    for (int n = 0; n < kGroup; ++n) partial[n] = zero();
    for (int n = 0; n < heads; ++n) {
      const int64_t at = (first + n) * stride;
      const Scalar* other = y + (first + n) * y_stride;
      Vec even = zero(), odd = zero();
      int c = 0;
      for (; c + 2 * kWidth <= D; c += 2 * kWidth) {
        even = fma(blend_corners<Scalar, kCorners>(row, weight, at + c), load(other + c), even);
        odd = fma(blend_corners<Scalar, kCorners>(row, weight, at + c + kWidth),
                  load(other + c + kWidth), odd);
      }
      for (; c + kWidth <= D; c += kWidth) {
        even = fma(blend_corners<Scalar, kCorners>(row, weight, at + c), load(other + c), even);
      }
      if (c < D) {
        even = fma(blend_corners_first<Scalar, kCorners>(row, weight, at + c, D - c),
                   load_first(other + c, D - c), even);
      }
      partial[n] = even + odd;
    }
    store_first(out + first, reduce_group(partial), heads);
  }
}

// out[h] = y[h] . sample[h].
template <class Scalar>
ZSVR_INLINE void dots(const Sample<Scalar>& sample, int64_t stride, const Scalar* y,
                      int64_t y_stride, int64_t H, int D, float* out) {
  if (sample.corners == 4) return dots_of<Scalar, 4>(sample, stride, y, y_stride, H, D, out);
  if (sample.corners == 2) return dots_of<Scalar, 2>(sample, stride, y, y_stride, H, D, out);
  dots_of<Scalar, 1>(sample, stride, y, y_stride, H, D, out);
}

// ---- blend --------------------------------------------------------------------------------------

// One chunk of kVecs vectors of one head; the last one holds `last` channels.
template <class Scalar, int kVecs>
static void blend_chunk(const Sample<Scalar>* samples, int count, int64_t at, const float* weights,
                        int64_t weight_stride, float factor, int last, Scalar* out) {
  Vec sum[kVecs];
#pragma GCC unroll 4
  for (int v = 0; v < kVecs; ++v) sum[v] = zero();
  for (int n = 0; n < count; ++n) {
    const Sample<Scalar>& sample = samples[n];
    const float weight = weights[sample.slot * weight_stride];
    for (int c = 0; c < sample.corners; ++c) {
      const Vec w = broadcast(weight * sample.weight[c]);
      const Scalar* row = sample.row[c] + at;
#pragma GCC unroll 4
      for (int v = 0; v < kVecs - 1; ++v) sum[v] = fma(load(row + v * kWidth), w, sum[v]);
      sum[kVecs - 1] = fma(load_first(row + (kVecs - 1) * kWidth, last), w, sum[kVecs - 1]);
    }
  }
  const Vec scale = broadcast(factor);
#pragma GCC unroll 4
  for (int v = 0; v < kVecs - 1; ++v) store(out + v * kWidth, sum[v] * scale);
  store_first(out + (kVecs - 1) * kWidth, sum[kVecs - 1] * scale, last);
}

// out[h] = factor * sum over samples of weights[slot * weight_stride + h] * sample[h].
template <class Scalar>
static void blend(const Sample<Scalar>* samples, int count, int64_t stride, const float* weights,
                  int64_t weight_stride, float factor, int64_t H, int D, Scalar* out,
                  int64_t out_stride) {
  for (int64_t h = 0; h < H; ++h) {
    for (int c = 0; c < D; c += kChunk * kWidth) {
      const int left = D - c < kChunk * kWidth ? D - c : kChunk * kWidth;
      const int vectors = (left + kWidth - 1) / kWidth;
      const int last = left - (vectors - 1) * kWidth;
      const int64_t at = h * stride + c;
      Scalar* target = out + h * out_stride + c;
      const float* weight = weights + h;
      if (vectors == 4) {
        blend_chunk<Scalar, 4>(samples, count, at, weight, weight_stride, factor, last, target);
      } else if (vectors == 3) {
        blend_chunk<Scalar, 3>(samples, count, at, weight, weight_stride, factor, last, target);
      } else if (vectors == 2) {
        blend_chunk<Scalar, 2>(samples, count, at, weight, weight_stride, factor, last, target);
      } else {
        blend_chunk<Scalar, 1>(samples, count, at, weight, weight_stride, factor, last, target);
      }
    }
  }
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
