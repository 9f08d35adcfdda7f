// Forward pass for bf16 on matrix tiles; included by cross_frame_attention_fwd_isa.cpp alone.
//
// Tasks:     first (clip, key frame, head) pack V; then as in the vector form.
// Tiles:     s^T = K Q^T with keys in rows, read in place where 32 keys and whole 64-byte pieces are
//            there, and queries in columns; o^T = V^T P^T. Keys in groups of 32, kGroups of them per
//            softmax block; P overwrites s in place, as pairs of rounded keys.
// Traffic:   as in the vector form, plus V once in and once out: the pack is [groups, D/16, 16, 32]
//            bf16 per (clip, key frame, head), whole tiles, zero where there is no key or channel.
// Numerics:  products of bf16 summed in float32; p is rounded to bf16, its sum is not. o is rescaled
//            only where the running maximum grew by more than kSlack, so p <= 2^kSlack.
#pragma once

#include <cmath>

#include "cross_frame_attention/cross_frame_attention.h"
#include "zsvr/amx.h"

#if ZSVR_ISA_LEVEL >= 4
namespace zsvr {
namespace ZSVR_ISA {
namespace {

constexpr int kGroupKeys = 32;
constexpr int kGroups = 4;

struct TileShape {
  int pieces;      // of 32 channels, of a row of q or k
  int bands;       // of 16 channels, of o
  int64_t groups;  // of keys in a frame

  explicit TileShape(const CrossFrameAttentionParams& p)
      : pieces(static_cast<int>((p.D + 31) / 32)),
        bands(static_cast<int>((p.D + 15) / 16)),
        groups((p.P + kGroupKeys - 1) / kGroupKeys) {}

  int64_t pack_frame() const { return groups * bands * 512; }  // bf16 values of a packed frame
};

struct TileScratch {
  uint32_t* q;  // [16 * pieces, kLanes] pairs of channels
  float* s;     // [kGroups * 32, kLanes], then p: [kGroups * 16, kLanes] pairs of keys
  float* o;     // [16 * bands, kLanes]
  uint16_t* k;  // [kGroups * 32, 32 * pieces], groups that cannot be read in place
};

int64_t tile_scratch_bytes(const TileShape& shape) {
  return 16 * shape.pieces * kLanes * 4 + kGroups * kGroupKeys * kLanes * 4 +
         16 * shape.bands * kLanes * 4 + kGroups * kGroupKeys * shape.pieces * 64;
}

TileScratch tile_scratch_of(const TileShape& shape, char* base) {
  TileScratch scratch;
  scratch.q = reinterpret_cast<uint32_t*>(base);
  base += 16 * shape.pieces * kLanes * 4;
  scratch.s = reinterpret_cast<float*>(base);
  base += kGroups * kGroupKeys * kLanes * 4;
  scratch.o = reinterpret_cast<float*>(base);
  scratch.k = reinterpret_cast<uint16_t*>(base + 16 * shape.bands * kLanes * 4);
  return scratch;
}

int64_t tile_workspace(const CrossFrameAttentionParams& p, int threads) {
  const TileShape shape(p);
  return threads * tile_scratch_bytes(shape) + p.B * p.Tk * p.H * shape.pack_frame() * 2;
}

// V of one (clip, key frame, head) as tiles of 16 channels by 32 keys.
void pack_values(const CrossFrameAttentionParams& p, const TileShape& shape, int64_t b, int64_t j,
                 int64_t h, uint16_t* target) {
  const int D = static_cast<int>(p.D);
  for (int64_t group = 0; group < shape.groups; ++group) {
    const int64_t site = group * kGroupKeys;
    const int keys = static_cast<int>(p.P - site < kGroupKeys ? p.P - site : kGroupKeys);
    const BFloat16* v = p.v.at<BFloat16>(b, j, site, h);
    for (int c = 0; c < D; c += 16, target += 512) {
      Vec rows[kWidth];
#pragma GCC unroll 16
      for (int n = 0; n < 16; ++n) {
        const BFloat16* even = v + 2 * n * p.v.stride_p + c;
        const BFloat16* odd = 2 * n + 1 < keys ? even + p.v.stride_p : nullptr;
        rows[n] = (Vec)interleave_rows(2 * n < keys ? even : nullptr, odd, D - c);
      }
      transpose(rows);
      for (int n = 0; n < 16; ++n) _mm512_storeu_si512(target + n * 32, (__m512i)rows[n]);
    }
  }
}

struct KeyGroup {
  const void* k;      // rows of 32 * pieces channels
  int64_t stride;     // bytes
  int keys;           // of kGroupKeys; s of the others is not used, p of them is 0
  const uint16_t* v;  // bands tiles
};

// Walks the keys of one query frame in groups of 32 that do not cross frames.
struct GroupWalk {
  const CrossFrameAttentionParams& p;
  const TileShape& shape;
  const TileScratch& scratch;
  const uint16_t* pack;
  int64_t b, i, h;
  int64_t r = 0, group = 0;

  int next(KeyGroup* groups) {
    int count = 0;
    while (count < kGroups && r < p.R) {
      const int64_t j = p.frames[i * p.R + r];
      if (j < 0) {
        ++r;
        continue;
      }
      const int64_t site = group * kGroupKeys;
      const int keys = static_cast<int>(p.P - site < kGroupKeys ? p.P - site : kGroupKeys);
      const BFloat16* k = p.k.at<BFloat16>(b, j, site, h);
      groups[count] = {
          k, p.k.stride_p * 2, keys,
          pack + ((b * p.Tk + j) * p.H + h) * shape.pack_frame() + group * shape.bands * 512};
      if (keys < kGroupKeys || p.D % 32 != 0) copy(k, keys, count, &groups[count]);
      ++count;
      if (++group == shape.groups) {
        group = 0;
        ++r;
      }
    }
    return count;
  }

  void copy(const BFloat16* k, int keys, int slot, KeyGroup* result) const {
    const int width = 32 * shape.pieces;
    uint16_t* target = scratch.k + slot * kGroupKeys * width;
    result->k = target;
    result->stride = 2 * width;
    const int last = static_cast<int>(p.D) - (width - 32);
    const __mmask32 mask = last == 32 ? ~0u : (1u << last) - 1u;
    for (int n = 0; n < kGroupKeys; ++n, target += width) {
      for (int piece = 0; piece < shape.pieces; ++piece) {
        __m512i row = _mm512_setzero_si512();
        if (n < keys) {
          row = _mm512_maskz_loadu_epi16(piece + 1 < shape.pieces ? ~0u : mask,
                                         k + n * p.k.stride_p + piece * 32);
        }
        _mm512_storeu_si512(target + piece * 32, row);
      }
    }
  }
};

// s[key][query] = k . q for a group of keys; asks for the lines of the next group's keys meanwhile.
template <int kVec>
ZSVR_INLINE void score_group(const KeyGroup& group, const void* next, int pieces, const uint32_t* q,
                             float* s) {
  for (int half = 0; half < 2; ++half) {
    const char* k = static_cast<const char*>(group.k) + half * 16 * group.stride;
    // Rows of the other half, then of the next group, whose stride is taken to be the same.
    const char* ahead = half == 0 ? k + 16 * group.stride : static_cast<const char*>(next);
    zero_tiles<kVec>();
    for (int piece = 0; piece < pieces; ++piece) {
      multiply_tiles<kVec>(k + piece * 64, group.stride, q + piece * 16 * kLanes);
      if (ahead == nullptr) continue;
      for (int n = 0; n < 16; ++n) __builtin_prefetch(ahead + n * group.stride + piece * 64);
    }
    store_tiles<kVec>(s + half * 16 * kLanes);
  }
}

template <int kVec>
ZSVR_INLINE void largest_scores(const float* s, const KeyGroup* groups, int count, Vec* result) {
  Vec largest[kVec];
  for (int t = 0; t < kVec; ++t) largest[t] = broadcast(-__builtin_inff());
  for (int g = 0; g < count; ++g, s += kGroupKeys * kLanes) {
    const int keys = groups[g].keys;
    for (int n = 0; n < keys; ++n) {
#pragma GCC unroll 4
      for (int t = 0; t < kVec; ++t) largest[t] = max(largest[t], load(s + n * kLanes + t * 16));
    }
  }
  for (int t = 0; t < kVec; ++t) result[t] = largest[t];
}

template <int kVec>
void attend_tiles(const CrossFrameAttentionParams& p, const TileShape& shape,
                  const TileScratch& scratch, const uint16_t* pack, int64_t b, int64_t i, int64_t h,
                  int64_t query, int queries) {
  const TileScope tiles;
  const int D = static_cast<int>(p.D);
  const Vec scale = broadcast(__builtin_fabsf(p.scale) * kLog2E);
  pack_channel_pairs(p.q.at<BFloat16>(b, i, query, h), p.q.stride_p, queries, kVec, D,
                     p.scale < 0.0f, scratch.q);
  Vec peak[kVec], sum[kVec];
  for (int t = 0; t < kVec; ++t) {
    peak[t] = broadcast(-__builtin_inff());
    sum[t] = zero();
  }
  GroupWalk walk{p, shape, scratch, pack, b, i, h};
  KeyGroup groups[kGroups];
  bool first = true;
  for (int count; (count = walk.next(groups)) > 0; first = false) {
    finish_stores();
    for (int g = 0; g < count; ++g) {
      score_group<kVec>(groups[g], g + 1 < count ? groups[g + 1].k : nullptr, shape.pieces,
                        scratch.q, scratch.s + g * kGroupKeys * kLanes);
    }
    Vec largest[kVec];
    largest_scores<kVec>(scratch.s, groups, count, largest);
    Vec shrink[kVec], added[kVec];
    if (raise_peaks<kVec>(largest, scale, peak, shrink) && !first) {
      for (int t = 0; t < kVec; ++t) {
        sum[t] = sum[t] * shrink[t];
        for (int c = 0; c < D; ++c) {
          float* o = scratch.o + c * kLanes + t * 16;
          store(o, load(o) * shrink[t]);
        }
      }
    }
    for (int t = 0; t < kVec; ++t) added[t] = zero();
    for (int g = 0; g < count; ++g) {
      exponentiate_pairs<kVec>(scratch.s + g * kGroupKeys * kLanes, groups[g].keys, kGroupKeys,
                               scale, peak, added,
                               reinterpret_cast<uint32_t*>(scratch.s) + g * 16 * kLanes);
    }
    for (int t = 0; t < kVec; ++t) sum[t] = sum[t] + added[t];
    finish_stores();
    for (int band = 0; band < shape.bands; ++band) {
      float* o = scratch.o + band * 16 * kLanes;
      if (first) {
        zero_tiles<kVec>();
      } else {
        load_tiles<kVec>(o);
      }
      for (int g = 0; g < count; ++g) {
        multiply_tiles<kVec>(groups[g].v + band * 512, 64,
                             reinterpret_cast<const uint32_t*>(scratch.s) + g * 16 * kLanes);
      }
      store_tiles<kVec>(o);
    }
  }
  float inverse[kLanes], peaks[kLanes], sums[kLanes];
  for (int t = 0; t < kVec; ++t) {
    store(inverse + t * 16, broadcast(1.0f) / sum[t]);
    store(peaks + t * 16, peak[t]);
    store(sums + t * 16, sum[t]);
  }
  unpack_transposed(scratch.o, inverse, queries, kVec, D, p.o.at<BFloat16>(b, i, query, h),
                    p.o.stride_p);
  float* lse = p.lse + ((b * p.T + i) * p.P + query) * p.H + h;
  for (int n = 0; n < queries; ++n) lse[n * p.H] = (peaks[n] + ::log2f(sums[n])) * kLn2;
}

}  // namespace
}  // namespace ZSVR_ISA
}  // namespace zsvr
#endif
