// Forward pass for bf16 in pairs; included by cross_frame_attention_fwd_isa.cpp alone.
//
// Tasks:     as in the vector form.
// Tiles:     as in the vector form, in pairs of bf16: queries packed by pairs of channels, keys in the panel as they
//            are, values interleaved by pairs of panel rows, p rounded to such pairs in place of s.
// Traffic:   as in the vector form.
// Numerics:  products of bf16 summed in float32; p is rounded to bf16, its sum is not. o is rescaled only where the
//            running maximum grew by more than kSlack, so p <= 2^kSlack.
#pragma once

#include "cross_frame_attention/cross_frame_attention.h"
#include "cross_frame_attention/key_walk.h"
#include "zsvr/bf16_pairs.h"

#if ZSVR_ISA_LEVEL == 3
namespace zsvr {
namespace ZSVR_ISA {
namespace {

static_assert(kKeys % 2 == 0);

// Scratch of one worker; a span is a whole number of blocks of kLanes queries.
struct PairScratch {
  uint32_t* packed;   // [span / kLanes, packed_pairs(D), kLanes], pairs of channels
  float* o;           // [span / kLanes, D, kLanes]
  float *peak, *sum;  // [span]
  float* s;           // [kKeys, kLanes], then p: [kKeys / 2, kLanes] pairs of keys
  uint32_t* keys;     // [kKeys, panel_stride(D / 2)], pairs of channels
  uint32_t* values;   // [kKeys / 2, panel_stride(D)], pairs of keys

  static int64_t packed_pairs(int64_t D) { return (D + 31) / 32 * 16; }

  static int64_t bytes(const CrossFrameAttentionParams& p, int64_t span) {
    return 4 * ((packed_pairs(p.D) + p.D + 2) * span + kKeys * kLanes +
                kKeys * panel_stride(p.D / 2) + kKeys / 2 * panel_stride(p.D));
  }

  PairScratch(const CrossFrameAttentionParams& p, int64_t span, char* base) {
    const auto take = [&base](int64_t count) {
      char* result = base;
      base += 4 * count;
      return result;
    };
    packed = reinterpret_cast<uint32_t*>(take(packed_pairs(p.D) * span));
    o = reinterpret_cast<float*>(take(p.D * span));
    peak = reinterpret_cast<float*>(take(span));
    sum = reinterpret_cast<float*>(take(span));
    s = reinterpret_cast<float*>(take(kKeys * kLanes));
    keys = reinterpret_cast<uint32_t*>(take(kKeys * panel_stride(p.D / 2)));
    values = reinterpret_cast<uint32_t*>(take(kKeys / 2 * panel_stride(p.D)));
  }

  // With the part that belongs to the block of kLanes queries at an offset in the span.
  PairScratch block(int64_t D, int64_t offset) const {
    PairScratch result = *this;
    result.packed += offset * packed_pairs(D);
    result.o += offset * D;
    result.peak += offset;
    result.sum += offset;
    return result;
  }

  // Peaks are in base 2 here.
  static float log_sum(float peak, float sum) { return (peak + ::log2f(sum)) * kLn2; }
};

template <class Scalar>
void pack_block(const CrossFrameAttentionParams& p, const PairScratch& block, const Scalar* q,
                int queries, int vectors) {
  pack_channel_pairs(q, p.q.stride_p, queries, vectors, static_cast<int>(p.D), p.scale < 0.0f,
                     block.packed);
}

// Fills the panels; returns the number of keys.
template <class Scalar>
int next_panel(const PairScratch& scratch, KeyWalk<CrossFrameAttentionParams>& walk) {
  const CrossFrameAttentionParams& p = walk.p;
  const int D = static_cast<int>(p.D);
  const int64_t key_stride = panel_stride(D / 2), value_stride = panel_stride(D);
  const Scalar* values[kKeys];  // rows, which may be of several frames
  const int count =
      walk.template next<Scalar>([&](const Scalar* k, const Scalar* v, int rows, int at) {
        for (int n = 0; n < rows; ++n, k += p.k.stride_p, v += p.v.stride_p) {
          values[at + n] = v;
          uint32_t* key = scratch.keys + (at + n) * key_stride;
          for (int c = 0; c < D; c += 32)
            _mm512_storeu_si512(key + c / 2, load_channels(k + c, D - c));
        }
      });
  for (int n = 0; n < count; n += 2) {
    uint32_t* pairs = scratch.values + n / 2 * value_stride;
    const Scalar *low = values[n], *high = n + 1 < count ? values[n + 1] : nullptr;
    for (int c = 0; c < D; c += 16) {
      _mm512_storeu_si512(pairs + c,
                          interleave_rows(low + c, high == nullptr ? high : high + c, D - c));
    }
  }
  return count;
}

// Takes the keys of a panel into a block's peak, sum and o.
template <int kVec>
void absorb(const CrossFrameAttentionParams& p, const PairScratch& block, int count, bool first,
            RowsAhead& ahead) {
  const int D = static_cast<int>(p.D);
  const Vec scale = broadcast(__builtin_fabsf(p.scale) * kLog2E);
  Vec largest[kVec], peak[kVec], sum[kVec], shrink[kVec];
  for (int v = 0; v < kVec; ++v) largest[v] = broadcast(-__builtin_inff());
  score_pairs<kVec>(block.keys, panel_stride(D / 2), count, block.packed, D / 2, block.s, largest,
                    ahead);
  for (int v = 0; v < kVec; ++v) {
    peak[v] = load(block.peak + v * kWidth);
    sum[v] = first ? zero() : load(block.sum + v * kWidth);
  }
  if (raise_peaks<kVec>(largest, scale, peak, shrink) && !first) {
    for (int c = 0; c < D; ++c) {
      for (int v = 0; v < kVec; ++v) {
        float* o = block.o + c * kLanes + v * kWidth;
        store(o, load(o) * shrink[v]);
      }
    }
    for (int v = 0; v < kVec; ++v) sum[v] = sum[v] * shrink[v];
  }
  uint32_t* pairs = reinterpret_cast<uint32_t*>(block.s);
  Vec added[kVec];
  for (int v = 0; v < kVec; ++v) added[v] = zero();
  exponentiate_pairs<kVec>(block.s, count, count, scale, peak, added, pairs);
  for (int v = 0; v < kVec; ++v) {
    store(block.peak + v * kWidth, peak[v]);
    store(block.sum + v * kWidth, sum[v] + added[v]);
  }
  accumulate_pairs<kVec>(block.values, panel_stride(D), (count + 1) / 2, pairs, D, !first, block.o);
}

}  // namespace
}  // namespace ZSVR_ISA
}  // namespace zsvr
#endif
