// The two things trajectory attention does with bilinear samples, for *_isa.cpp files:
//   dots   one number per head: y . sum_c w_c x_c      (logits, and dO . V)
//   blend  a row: sum over slots of weight * sum_c w_c x_c      (output, and dq)
// All heads of a corner row are handled together, so a cell is located once for H heads.
#pragma once

#include "trajectory_attention/cell.h"
#include "trajectory_attention/units.h"
#include "zsvr/params.h"
#include "zsvr/simd.h"

namespace zsvr {
namespace ZSVR_ISA {

inline constexpr int kGroup = kWidth >= 8 ? 8 : 4;  // heads reduced together
inline constexpr int kChunk = 4;                    // units of one head kept in registers
inline constexpr int kTileSide = 4;
inline constexpr int kTileSites = kTileSide * kTileSide;
inline constexpr int64_t kScoreBudget = 64 * 1024;  // floats of scores per worker

ZSVR_INLINE int64_t aligned(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// A tile of sites: 4x4, smaller where slots x heads are many. Its rows of K, V, q and o over a window of 5 frames then
// fit the second-level cache up to 2 KiB a row, and two grid rows of one frame fit the first level.
struct Tiling {
  int64_t height, width;  // sites of a tile
  int64_t rows, columns;  // tiles of the grid
};

ZSVR_INLINE Tiling tiling_of(int64_t Hg, int64_t Wg, int64_t L, int64_t H) {
  Tiling tiling{kTileSide, kTileSide, 0, 0};
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
ZSVR_INLINE Sample<Scalar> sample_at(const ConstTokens& x, int64_t b, int64_t j, const Cell& cell,
                                     int slot) {
  Sample<Scalar> sample;
  sample.corners = cell.corners;
  sample.slot = slot;
  const Scalar* base = x.at<Scalar>(b, j, 0, 0);
  for (int c = 0; c < cell.corners; ++c) {
    sample.row[c] = base + cell.site[c] * x.stride_p;
    sample.weight[c] = cell.weight[c];
  }
  return sample;
}

// Calls kernel.template operator()<D>() with D the compiled head dim, or 0 for any other: D is then read at run time.
// Sanitized builds compile 40 alone, the one with a masked tail in every storage type; others take minutes.
template <class Kernel>
ZSVR_INLINE void with_head_dim([[maybe_unused]] int64_t D, const Kernel& kernel) {
#if ZSVR_ISA_LEVEL >= 2
  switch (D) {
    case 40:
      return kernel.template operator()<40>();
#ifndef ZSVR_FEW_HEAD_DIMS
    case 64:
      return kernel.template operator()<64>();
    case 80:
      return kernel.template operator()<80>();
    case 128:
      return kernel.template operator()<128>();
    case 160:
      return kernel.template operator()<160>();
#endif
  }
#endif
  kernel.template operator()<0>();
}

// Frames of one tile that a task takes in turn: neighbouring frames read the same frames of K and V.
ZSVR_INLINE int64_t frames_of_task(int64_t frames, int64_t tiles, int threads) {
  int64_t chunks = (int64_t{8} * threads + tiles - 1) / tiles;
  if (chunks > frames) chunks = frames;
  return (frames + chunks - 1) / chunks;
}

// ---- ahead --------------------------------------------------------------------------------------

// Rows of one site that the next frame of a tile needs and this one does not. They come from memory, in pieces too
// short for the hardware to foresee, so they are fetched slice by slice during this frame.
struct Ahead {
  static constexpr int kRows = 8;
  int count = 0;
  const char* row[kRows];

  template <class Scalar, class AnyTokens>
  ZSVR_INLINE void add(const AnyTokens& x, int64_t b, int64_t t, int64_t site) {
    if (x.data == nullptr || count == kRows) return;
    row[count++] = reinterpret_cast<const char*>(x.template at<Scalar>(b, t, site, 0));
  }
  ZSVR_INLINE void fetch(int64_t begin, int64_t bytes) const {
    for (int n = 0; n < count; ++n) {
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(row[n] + begin + at, 0, 2);
    }
  }
};

// Adds the rows of K and V that frame i > 0 reads from frames that i - 1 does not attend to: of every sample the top left
// corner, along the tile's far edges also the bottom right one.
template <class Scalar, class Params>
static void add_new_samples(const Params& p, int64_t b, int64_t i, const TileSites& sites,
                            Ahead* ahead) {
  const int64_t P = p.Hg * p.Wg;
  const int32_t *frames = p.frames + i * p.L, *before = frames - p.L;
  for (int64_t l = 0; l < p.L; ++l) {
    bool is_new = frames[l] >= 0;
    for (int64_t m = 0; m < p.L; ++m) is_new = is_new && before[m] != frames[l];
    if (!is_new) continue;
    for (int64_t n = 0; n < sites.count(); ++n) {
      const int64_t at = ((b % p.Bp * p.T + i) * p.L + l) * P + sites.site(n);
      if (p.valid[at] == 0) continue;
      const Cell cell = cell_of(p.positions + 2 * at, p.Hg, p.Wg);
      const bool at_edge = n % sites.width == sites.width - 1 || n >= sites.count() - sites.width;
      for (int c = 0; c < (at_edge ? cell.corners : 1); c += 3) {
        ahead[n].template add<Scalar>(p.k, b, frames[l], cell.site[c]);
        ahead[n].template add<Scalar>(p.v, b, frames[l], cell.site[c]);
      }
    }
  }
}

// ---- logits -------------------------------------------------------------------------------------

inline constexpr float kDead = -__builtin_inff();  // the score of a slot that is not live

// Scores in base 2; a dead slot stays dead whatever the scale.
ZSVR_INLINE Vec scaled_score(Vec score, Vec scale) {
  return score == broadcast(kDead) ? broadcast(kDead) : score * scale;
}

// ---- dots ---------------------------------------------------------------------------------------

// The first `count` channels of sum_c w_c row_c, from channel `at` on.
template <class Scalar, int kCorners>
ZSVR_INLINE void blend_corners(const Scalar* const* row, const Vec* weight, int64_t at, int count,
                               Vec* x) {
  constexpr int kParts = Unit<Scalar>::kParts;
  load_unit(row[0] + at, count, x);
  if constexpr (kCorners > 1) {
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) x[i] = x[i] * weight[0];
#pragma GCC unroll 4
    for (int c = 1; c < kCorners; ++c) {
      Vec corner[kParts];
      load_unit(row[c] + at, count, corner);
#pragma GCC unroll 2
      for (int i = 0; i < kParts; ++i) x[i] = fma(corner[i], weight[c], x[i]);
    }
  }
}

// Lanes that sum to y . sum_c w_c row_c of one head, which begins at channel `at` of the rows.
template <class Scalar, int kCorners, int kD>
ZSVR_INLINE Vec dot_lanes(const Scalar* const* row, const Vec* weight, int64_t at, const Scalar* y,
                          int runtime_D) {
  constexpr int kParts = Unit<Scalar>::kParts, kLanes = Unit<Scalar>::kLanes;
  const int D = kD > 0 ? kD : runtime_D;
#if ZSVR_ISA_LEVEL >= 3
  // q meets every corner as it is stored, two products a lane; four scalars are blended instead of four rows.
  if constexpr (kParts == 2) {
    __m512 sum[kCorners];
#pragma GCC unroll 4
    for (int c = 0; c < kCorners; ++c) sum[c] = _mm512_setzero_ps();
#pragma GCC unroll 8
    for (int d = 0; d < D; d += kLanes) {
      const __m512i other = load_bfloat16_pairs(y + d, D - d);
#pragma GCC unroll 4
      for (int c = 0; c < kCorners; ++c) {
        const __m512i corner = load_bfloat16_pairs(row[c] + at + d, D - d);
        sum[c] = _mm512_dpbf16_ps(sum[c], (__m512bh)corner, (__m512bh)other);
      }
    }
    if constexpr (kCorners == 1) return (Vec)sum[0];
    Vec lanes = (Vec)sum[0] * weight[0];
#pragma GCC unroll 4
    for (int c = 1; c < kCorners; ++c) lanes = fma((Vec)sum[c], weight[c], lanes);
    return lanes;
  }
#endif
  Vec sum[2] = {zero(), zero()};
  const auto add = [&](int d, int count, int chain) __attribute__((always_inline)) {
    Vec x[kParts], other[kParts];
    blend_corners<Scalar, kCorners>(row, weight, at + d, count, x);
    load_unit(y + d, count, other);
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) {
      Vec& part = sum[kParts == 2 ? i : chain];
      part = fma(x[i], other[i], part);
    }
  };
  if constexpr (kD > 0) {
#pragma GCC unroll 16
    for (int d = 0; d < kD; d += kLanes) {
      add(d, kD - d < kLanes ? kD - d : kLanes, d / kLanes % 2);
    }
  } else {
    int d = 0;
    for (; d + 2 * kLanes <= D; d += 2 * kLanes) {
      add(d, kLanes, 0);
      add(d + kLanes, kLanes, 1);
    }
    for (; d < D; d += kLanes) add(d, D - d < kLanes ? D - d : kLanes, 0);
  }
  return sum[0] + sum[1];
}

template <class Scalar, int kCorners, int kD>
static void dots_of(const Sample<Scalar>& sample, int64_t stride, const Scalar* y, int64_t y_stride,
                    int64_t H, int D, float* out) {
  Vec weight[kCorners];
  const Scalar* row[kCorners];
#pragma GCC unroll 4
  for (int c = 0; c < kCorners; ++c) {
    weight[c] = broadcast(sample.weight[c]);
    row[c] = sample.row[c];
  }
  int64_t first = 0;
  for (; first + kGroup <= H; first += kGroup) {
    Vec partial[kGroup];
#pragma GCC unroll 8
    for (int n = 0; n < kGroup; ++n) {
      partial[n] = dot_lanes<Scalar, kCorners, kD>(row, weight, (first + n) * stride,
                                                   y + (first + n) * y_stride, D);
    }
    store_first(out + first, reduce_group(partial), kGroup);
  }
  if (first == H) return;
  const int heads = static_cast<int>(H - first);
  Vec partial[kGroup] = {};
  for (int n = 0; n < heads; ++n) {
    partial[n] = dot_lanes<Scalar, kCorners, kD>(row, weight, (first + n) * stride,
                                                 y + (first + n) * y_stride, D);
  }
  store_first(out + first, reduce_group(partial), heads);
}

// out[h] = y[h] . sample[h].
template <int kD, class Scalar>
ZSVR_INLINE void dots(const Sample<Scalar>& sample, int64_t stride, const Scalar* y,
                      int64_t y_stride, int64_t H, int D, float* out) {
  if (sample.corners == 4) return dots_of<Scalar, 4, kD>(sample, stride, y, y_stride, H, D, out);
  if (sample.corners == 2) return dots_of<Scalar, 2, kD>(sample, stride, y, y_stride, H, D, out);
  dots_of<Scalar, 1, kD>(sample, stride, y, y_stride, H, D, out);
}

// ---- blend --------------------------------------------------------------------------------------

// sum[head][unit][part] += weight[head] * the sample's row; the last unit of a head holds `last` channels.
template <class Scalar, int kCorners, int kUnits, int kHeads>
ZSVR_INLINE void add_sample(const Sample<Scalar>& sample, int64_t at, int64_t stride,
                            const float* weights, int last,
                            Vec (&sum)[kHeads][kUnits][Unit<Scalar>::kParts]) {
  constexpr int kParts = Unit<Scalar>::kParts, kLanes = Unit<Scalar>::kLanes;
  Vec weight[kCorners];
  const Scalar* row[kCorners];
#pragma GCC unroll 4
  for (int c = 0; c < kCorners; ++c) {
    weight[c] = broadcast(sample.weight[c]);
    row[c] = sample.row[c];
  }
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
    const Vec factor = broadcast(weights[h]);
#pragma GCC unroll 16
    for (int u = 0; u < kUnits; ++u) {
      Vec x[kParts];
      blend_corners<Scalar, kCorners>(row, weight, at + h * stride + u * kLanes,
                                      u == kUnits - 1 ? last : kLanes, x);
#pragma GCC unroll 2
      for (int i = 0; i < kParts; ++i) sum[h][u][i] = fma(x[i], factor, sum[h][u][i]);
    }
  }
}

// kUnits units of kHeads heads from channel `at` on, sums in registers.
template <class Scalar, int kUnits, int kHeads, int kLast>
static void blend_units(const Sample<Scalar>* samples, int count, int64_t at, int64_t stride,
                        const float* weights, int64_t weight_stride, float factor, Scalar* out,
                        int64_t out_stride, int runtime_last) {
  constexpr int kParts = Unit<Scalar>::kParts, kLanes = Unit<Scalar>::kLanes;
  const int last = kLast > 0 ? kLast : runtime_last;
  Vec sum[kHeads][kUnits][kParts] = {};
  for (int n = 0; n < count; ++n) {
    const Sample<Scalar>& sample = samples[n];
    const float* weight = weights + sample.slot * weight_stride;
    if (sample.corners == 4) {
      add_sample<Scalar, 4, kUnits, kHeads>(sample, at, stride, weight, last, sum);
    } else if (sample.corners == 2) {
      add_sample<Scalar, 2, kUnits, kHeads>(sample, at, stride, weight, last, sum);
    } else {
      add_sample<Scalar, 1, kUnits, kHeads>(sample, at, stride, weight, last, sum);
    }
  }
  const Vec scale = broadcast(factor);
#pragma GCC unroll 4
  for (int h = 0; h < kHeads; ++h) {
#pragma GCC unroll 16
    for (int u = 0; u < kUnits; ++u) {
#pragma GCC unroll 2
      for (int i = 0; i < kParts; ++i) sum[h][u][i] = sum[h][u][i] * scale;
      store_unit(out + h * out_stride + u * kLanes, sum[h][u], u == kUnits - 1 ? last : kLanes);
    }
  }
}

// Heads whose slices of a row blend together: a slice of 512 bytes keeps the rows of all slots in first-level cache
// between neighbouring sites.
template <class Scalar, int kD>
inline constexpr int kBlendHeads = kD == 0 || kD > 80 ? 1 : 2;

// out[h] = factor * sum over samples of weights[slot * weight_stride + h] * sample[h], heads first .. first + heads.
template <int kD, class Scalar>
ZSVR_INLINE void blend(const Sample<Scalar>* samples, int count, int64_t stride,
                       const float* weights, int64_t weight_stride, float factor, int64_t first,
                       int64_t heads, int D, Scalar* out, int64_t out_stride) {
  constexpr int kLanes = Unit<Scalar>::kLanes;
  const auto units = [&]<int kUnits, int kHeads, int kLast>(int64_t h, int c, int last) {
    blend_units<Scalar, kUnits, kHeads, kLast>(samples, count, h * stride + c, stride, weights + h,
                                               weight_stride, factor, out + h * out_stride + c,
                                               out_stride, last);
  };
  if constexpr (kD > 0) {
    constexpr int kUnits = (kD + kLanes - 1) / kLanes, kLast = kD - (kUnits - 1) * kLanes;
    constexpr int kHeads = kBlendHeads<Scalar, kD>;
    if (kHeads > 1 && heads == kHeads) {
      units.template operator()<kUnits, kHeads, kLast>(first, 0, kLast);
    } else {
      for (int64_t h = first; h < first + heads; ++h) {
        units.template operator()<kUnits, 1, kLast>(h, 0, kLast);
      }
    }
  } else {
    for (int64_t h = first; h < first + heads; ++h) {
      for (int c = 0; c < D; c += kChunk * kLanes) {
        const int left = D - c < kChunk * kLanes ? D - c : kChunk * kLanes;
        const int count_of_units = (left + kLanes - 1) / kLanes;
        const int last = left - (count_of_units - 1) * kLanes;
        if (count_of_units == 4) {
          units.template operator()<4, 1, 0>(h, c, last);
        } else if (count_of_units == 3) {
          units.template operator()<3, 1, 0>(h, c, last);
        } else if (count_of_units == 2) {
          units.template operator()<2, 1, 0>(h, c, last);
        } else {
          units.template operator()<1, 1, 0>(h, c, last);
        }
      }
    }
  }
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
