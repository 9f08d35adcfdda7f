// Backward pass for bf16 in pairs; included by cross_frame_attention_bwd_isa.cpp alone.
//
// Tasks:     as in the vector form.
// Tiles:     as in the vector form, in pairs of bf16: scores and dP pair neighbouring channels, dv and dk neighbouring
//            queries, dq neighbouring keys. P and dS are rounded to pairs of queries, dS to pairs of keys as well.
// Traffic:   as in the vector form.
// Numerics:  products of bf16 summed in float32; P and dS are rounded to bf16.
#pragma once

#include "cross_frame_attention/bwd_task.h"
#include "cross_frame_attention/key_walk.h"
#include "zsvr/bf16_pairs.h"

#if ZSVR_ISA_LEVEL >= 3
namespace zsvr {
namespace ZSVR_ISA {
namespace {

constexpr int kFewQueries = 4 * kRows;
static_assert(kQueries % 2 == 0 && kFewQueries % 2 == 0);

// Scratch of one worker.
struct PairPanels {
  uint32_t *k, *v;              // [span / kLanes, packed_pairs(D), kLanes], pairs of channels
  uint32_t* k_rows;             // [span / 2, panel_stride(D)], pairs of keys
  uint32_t *q, *d_o;            // [kQueries, panel_stride(D / 2)], pairs of channels
  uint32_t *q_rows, *d_o_rows;  // [kQueries / 2, panel_stride(D)], pairs of queries
  float *s, *t;                 // [kFewQueries, kLanes]
  uint32_t *weights, *ds;       // [kQueries / 2, kLanes], P and dS in pairs of queries
  uint32_t* ds_rows;            // [kQueries, kLanes / 2], in pairs of keys

  static int64_t packed_pairs(int64_t D) { return (D + 31) / 32 * 16; }

  static int64_t bytes(int64_t D, int64_t span) {
    return 4 * (2 * packed_pairs(D) * span + span / 2 * panel_stride(D) +
                kQueries * (2 * panel_stride(D / 2) + panel_stride(D)) + 2 * kFewQueries * kLanes +
                kQueries * (kLanes + kLanes / 2));
  }

  PairPanels(int64_t D, int64_t span, char* base) {
    const auto take = [&base](int64_t count) {
      char* result = base;
      base += 4 * count;
      return reinterpret_cast<uint32_t*>(result);
    };
    k = take(packed_pairs(D) * span);
    v = take(packed_pairs(D) * span);
    k_rows = take(span / 2 * panel_stride(D));
    q = take(kQueries * panel_stride(D / 2));
    d_o = take(kQueries * panel_stride(D / 2));
    q_rows = take(kQueries / 2 * panel_stride(D));
    d_o_rows = take(kQueries / 2 * panel_stride(D));
    s = reinterpret_cast<float*>(take(kFewQueries * kLanes));
    t = reinterpret_cast<float*>(take(kFewQueries * kLanes));
    weights = take(kQueries / 2 * kLanes);
    ds = take(kQueries / 2 * kLanes);
    ds_rows = take(kQueries * kLanes / 2);
  }
};

// a[n] . b[n] of up to kWidth rows, summed in score_pairs' order, a being its panel: see `dots` of the vector form.
Vec dots(const BFloat16* a, int64_t stride_a, const BFloat16* b, int64_t stride_b, int count,
         int D) {
  Vec sum = zero();
  for (int c = 0; c < D; c += 32) {
    Vec x[kWidth], y[kWidth];
    for (int n = 0; n < kWidth; ++n) {
      x[n] = n < count ? (Vec)load_channels(a + n * stride_a + c, D - c) : zero();
      y[n] = n < count ? (Vec)load_channels(b + n * stride_b + c, D - c) : zero();
    }
    transpose(x);
    transpose(y);
    const int pairs = D - c < 32 ? (D - c) / 2 : 16;
    for (int n = 0; n < pairs; ++n) sum = dot_pairs(sum, (__m512i)y[n], (__m512i)x[n]);
  }
  return sum;
}

// Rows as they are, in pairs of channels.
void copy_channel_pairs(const BFloat16* source, int64_t stride, int count, int D, uint32_t* panel) {
  const int64_t row = panel_stride(D / 2);
  for (int n = 0; n < count; ++n, source += stride, panel += row) {
    for (int c = 0; c < D; c += 32)
      _mm512_storeu_si512(panel + c / 2, load_channels(source + c, D - c));
  }
}

// Rows 2n and 2n + 1 interleaved; an odd last row has zeros beside it.
void copy_row_pairs(const BFloat16* source, int64_t stride, int count, int D, uint32_t* panel) {
  const int64_t row = panel_stride(D);
  for (int n = 0; n < count; n += 2, source += 2 * stride, panel += row) {
    const BFloat16* high = n + 1 < count ? source + stride : nullptr;
    for (int c = 0; c < D; c += 16) {
      _mm512_storeu_si512(panel + c,
                          interleave_rows(source + c, high == nullptr ? high : high + c, D - c));
    }
  }
}

// P, and dS where it is wanted, of two queries (`both`, or the first alone) by a block of `keys` keys, into row n / 2
// of pairs of queries and rows n, n + 1 of pairs of keys. s, t: their scores and dP.
template <int kVec>
ZSVR_INLINE void weigh_two(const CrossFrameAttentionBackwardParams& p, const PairPanels& panels,
                           const float* s, const float* t, Vec scale, const float* lse,
                           const float* delta, int n, bool both, int keys) {
  const bool scores = wants_scores(p);
  Vec probability[2][kVec], gradient[2][kVec];
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    const int row = both ? n + r : n;
    const Vec top = broadcast(lse[row] * kLog2E), mean = broadcast(delta[row]);
    const Vec weight = broadcast(r == 1 && !both ? 0.0f : 1.0f);
#pragma GCC unroll 4
    for (int w = 0; w < kVec; ++w) {
      const int64_t at = (row - n) * kLanes + w * kWidth;
      probability[r][w] = exp2_for_bf16(load(s + at) * scale - top) * weight;
      gradient[r][w] = scores ? probability[r][w] * (load(t + at) - mean) : zero();
    }
  }
#pragma GCC unroll 4
  for (int w = 0; w < kVec; ++w) {
    const int64_t at = n / 2 * kLanes + w * kWidth;
    _mm512_storeu_si512(panels.weights + at, round_pairs(probability[0][w], probability[1][w]));
    _mm512_storeu_si512(panels.ds + at, round_pairs(gradient[0][w], gradient[1][w]));
  }
  if (p.dq.data == nullptr) return;
#pragma GCC unroll 2
  for (int r = 0; r < 2; ++r) {
    uint32_t* row = panels.ds_rows + (n + r) * (kLanes / 2);
#pragma GCC unroll 2
    for (int w = 0; w < kVec; w += 2) {
      const Vec high = w + 1 < kVec ? gradient[r][w + 1] : zero();
      _mm512_storeu_si512(row + w * kWidth / 2,
                          (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)gradient[r][w]));
    }
    if (keys % 2 != 0) row[keys / 2] &= 0xffffu;  // beside the last key, which may be infinite
  }
}

// P and dS of `count` queries by a block of `keys` keys, a few rows at a time, so that scores stay in the first-level
// cache.
template <int kVec>
void weigh_pairs(const CrossFrameAttentionBackwardParams& p, const PairPanels& panels,
                 const uint32_t* k, const uint32_t* v, const float* lse, const float* delta,
                 int count, int keys, RowsAhead& ahead) {
  const int D = static_cast<int>(p.D);
  const int64_t row = panel_stride(D / 2);
  const Vec scale = broadcast(p.scale * kLog2E);
  Vec largest[kVec];
  for (int w = 0; w < kVec; ++w) largest[w] = zero();
  for (int n = 0; n < count; n += kFewQueries) {
    const int few = count - n < kFewQueries ? count - n : kFewQueries;
    score_pairs<kVec>(panels.q + n * row, row, few, k, D / 2, panels.s, largest, ahead);
    if (wants_scores(p))
      score_pairs<kVec>(panels.d_o + n * row, row, few, v, D / 2, panels.t, largest, ahead);
    for (int m = 0; m < few; m += 2) {
      weigh_two<kVec>(p, panels, panels.s + m * kLanes, panels.t + m * kLanes, scale, lse, delta,
                      n + m, m + 1 < few, keys);
    }
  }
}

template <int kCount, int kVec>
ZSVR_INLINE void multiply_pair_rows(const uint32_t* rows, int pairs, const uint32_t* panel,
                                    int64_t stride, bool first, float* out, int64_t out_stride) {
  Vec sum[kCount][kVec];
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v)
      sum[r][v] = first ? zero() : load(out + r * out_stride + v * kWidth);
  }
  multiply_pairs(rows, kLanes / 2, 1, panel, pairs, sum, stride);
#pragma GCC unroll 8
  for (int r = 0; r < kCount; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) store(out + r * out_stride + v * kWidth, sum[r][v]);
  }
}

template <int kVec>
void multiply_pair_columns(const uint32_t* rows, int count, int pairs, const uint32_t* panel,
                           int64_t stride, bool first, float* out, int64_t out_stride) {
  int n = 0;
  for (; n + kRows <= count; n += kRows) {
    multiply_pair_rows<kRows, kVec>(rows + n * (kLanes / 2), pairs, panel, stride, first,
                                    out + n * out_stride, out_stride);
  }
  for (; n + 2 <= count; n += 2) {
    multiply_pair_rows<2, kVec>(rows + n * (kLanes / 2), pairs, panel, stride, first,
                                out + n * out_stride, out_stride);
  }
  if (n < count) {
    multiply_pair_rows<1, kVec>(rows + n * (kLanes / 2), pairs, panel, stride, first,
                                out + n * out_stride, out_stride);
  }
}

// out[n][c] = (old value unless first) + sum over pairs of rows[n] . panel[:][c], for c up to whole vectors.
void multiply_pair_block(const uint32_t* rows, int count, int pairs, const uint32_t* panel,
                         int64_t stride, int D, bool first, float* out, int64_t out_stride) {
  const int vectors = channel_vectors(D);
  const auto columns = [&](int v, auto width) {
    multiply_pair_columns<width.count>(rows, count, pairs, panel + v * kWidth, stride, first,
                                       out + v * kWidth, out_stride);
  };
  int v = 0;
  for (; v + 4 <= vectors; v += 4) columns(v, Vectors<4>{});
  if (vectors - v == 3) columns(v, Vectors<3>{});
  if (vectors - v == 2) columns(v, Vectors<2>{});
  if (vectors - v == 1) columns(v, Vectors<1>{});
}

// Rows of two operands, to be asked for before they are copied.
RowsAhead rows_ahead(const CrossFrameAttentionBackwardParams& p, const ConstTokens& a,
                     const ConstTokens& b, const BackwardTask& task, int64_t frame, int64_t site,
                     int count) {
  const int64_t size = sizeof(BFloat16);
  return {reinterpret_cast<const char*>(a.at<BFloat16>(task.b, frame, site, task.h)),
          reinterpret_cast<const char*>(b.at<BFloat16>(task.b, frame, site, task.h)),
          a.stride_p * size,
          b.stride_p * size,
          p.D * size,
          count};
}

void differentiate_pairs(const CrossFrameAttentionBackwardParams& p, const PairPanels& panels,
                         const BackwardTask& task) {
  const int D = static_cast<int>(p.D);
  const int64_t row = panel_stride(D), packed = PairPanels::packed_pairs(D);
  const auto panel = [&](int from) {
    return task.queries - from < kQueries ? task.queries - from : kQueries;
  };
  rows_ahead(p, p.k, p.v, task, task.j, task.key, task.keys).ask(task.keys);
  for (int at = 0; at < task.keys; at += kLanes) {
    const int count = task.keys - at < kLanes ? task.keys - at : kLanes;
    by_width(count, [&](auto width) {
      pack_channel_pairs(p.k.at<BFloat16>(task.b, task.j, task.key + at, task.h), p.k.stride_p,
                         count, width.count, D, false, panels.k + at * packed);
      pack_channel_pairs(p.v.at<BFloat16>(task.b, task.j, task.key + at, task.h), p.v.stride_p,
                         count, width.count, D, false, panels.v + at * packed);
    });
  }
  if (task.dq != nullptr) {
    copy_row_pairs(p.k.at<BFloat16>(task.b, task.j, task.key, task.h), p.k.stride_p, task.keys, D,
                   panels.k_rows);
  }
  bool first = task.first_of_keys;
  for (int64_t i = 0; i < p.T; ++i) {
    if (task.column[i] != task.j) continue;
    rows_ahead(p, p.q, p.d_o, task, i, task.query, panel(0)).ask(kQueries);
    for (int n = 0; n < task.queries; n += kQueries, first = false) {
      const int count = panel(n);
      const int64_t site = task.query + n;
      RowsAhead ahead;
      if (n + count < task.queries)
        ahead = rows_ahead(p, p.q, p.d_o, task, i, site + count, panel(n + count));
      const BFloat16* q = p.q.at<BFloat16>(task.b, i, site, task.h);
      const BFloat16* d_o = p.d_o.at<BFloat16>(task.b, i, site, task.h);
      copy_channel_pairs(q, p.q.stride_p, count, D, panels.q);
      copy_channel_pairs(d_o, p.d_o.stride_p, count, D, panels.d_o);
      if (task.dk != nullptr) copy_row_pairs(q, p.q.stride_p, count, D, panels.q_rows);
      if (task.dv != nullptr) copy_row_pairs(d_o, p.d_o.stride_p, count, D, panels.d_o_rows);
      for (int at = 0; at < task.keys; at += kLanes) {
        const int keys = task.keys - at < kLanes ? task.keys - at : kLanes;
        by_width(keys, [&](auto width) {
          constexpr int kVec = width.count;
          weigh_pairs<kVec>(p, panels, panels.k + at * packed, panels.v + at * packed,
                            task.lse + i * p.P + site, task.delta + i * p.P + site, count, keys,
                            ahead);
          if (task.dv != nullptr) {
            accumulate_pairs<kVec>(panels.d_o_rows, row, (count + 1) / 2, panels.weights, D, !first,
                                   task.dv + at * D);
          }
          if (task.dk != nullptr) {
            accumulate_pairs<kVec>(panels.q_rows, row, (count + 1) / 2, panels.ds, D, !first,
                                   task.dk + at * D);
          }
        });
        if (task.dq == nullptr) continue;
        multiply_pair_block(panels.ds_rows, count, (keys + 1) / 2, panels.k_rows + at / 2 * row,
                            row, D, task.first_of_queries && at == 0,
                            task.dq + (i * p.P + site) * task.q_row, task.q_row);
      }
    }
  }
}

}  // namespace
}  // namespace ZSVR_ISA
}  // namespace zsvr
#endif
