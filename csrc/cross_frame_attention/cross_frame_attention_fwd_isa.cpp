// Computes:  o = softmax(scale q K^T) V over the listed frames, and lse.
// Tasks:     (clip, head, query frame, span of queries); a task owns its rows of o and lse.
// Tiles:     queries in lanes, packed once in blocks [D, kLanes]; keys and values in panels of kKeys rows, copied
//            from the frames the table names, several small frames to a panel; each panel meets every block.
// Traffic:   q and o once, k and v of each listed frame once per span of kSpan queries.
// Numerics:  float32, online softmax with the scale folded into q; a row without keys gives 0 and -inf. One key
//            alone has lse = its score, which the backward finds again bit by bit.
//            A block's arithmetic does not depend on the span it is in.
#include <cmath>

#include "cross_frame_attention/amx_fwd.h"
#include "cross_frame_attention/bf16_fwd.h"
#include "cross_frame_attention/cross_frame_attention.h"
#include "cross_frame_attention/key_walk.h"
#include "zsvr/tile.h"

namespace zsvr {
namespace ZSVR_ISA {
namespace {

const float kNegativeInfinity = -__builtin_inff();

constexpr int64_t kSpan = 256;  // queries of a task

// Scratch of one worker; a span is a whole number of blocks of kLanes queries.
struct FloatScratch {
  float* packed;         // [span / kLanes, D, kLanes]
  float* o;              // [span / kLanes, D, kLanes]
  float *peak, *sum;     // [span]
  float* s;              // [kKeys, kLanes]
  float *keys, *values;  // [kKeys, panel_stride(D)]

  static int64_t bytes(const CrossFrameAttentionParams& p, int64_t span) {
    return 4 * (2 * p.D * span + 2 * span + kKeys * kLanes + 2 * kKeys * panel_stride(p.D));
  }

  FloatScratch(const CrossFrameAttentionParams& p, int64_t span, char* base) {
    float* next = reinterpret_cast<float*>(base);
    const auto take = [&next](int64_t count) {
      float* result = next;
      next += count;
      return result;
    };
    packed = take(p.D * span);
    o = take(p.D * span);
    peak = take(span);
    sum = take(span);
    s = take(kKeys * kLanes);
    keys = take(kKeys * panel_stride(p.D));
    values = take(kKeys * panel_stride(p.D));
  }

  // With the part that belongs to the block of kLanes queries at an offset in the span.
  FloatScratch block(int64_t D, int64_t offset) const {
    FloatScratch result = *this;
    result.packed += offset * D;
    result.o += offset * D;
    result.peak += offset;
    result.sum += offset;
    return result;
  }

  static float log_sum(float peak, float sum) { return peak + ::logf(sum); }
};

// s := exp(s - peak); adds the rows to sum, in order.
template <int kVec>
void exponentiate(float* s, int count, const Vec* peak, Vec* sum) {
  for (int n = 0; n < count; ++n) {
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) {
      float* at = s + n * kLanes + v * kWidth;
      const Vec e = exp(load(at) - peak[v]);
      sum[v] = sum[v] + e;
      store(at, e);
    }
  }
}

template <class Scalar>
void pack_block(const CrossFrameAttentionParams& p, const FloatScratch& block, const Scalar* q,
                int queries, int vectors) {
  pack_transposed(q, p.q.stride_p, queries, vectors, static_cast<int>(p.D), p.scale, block.packed);
}

// Fills the panels; returns the number of keys.
template <class Scalar>
int next_panel(const FloatScratch& scratch, KeyWalk<CrossFrameAttentionParams>& walk) {
  return walk.template next<Scalar>(scratch.keys, scratch.values);
}

// Takes the keys of a panel into a block's peak, sum and o.
template <int kVec>
void absorb(const CrossFrameAttentionParams& p, const FloatScratch& block, int count, bool first,
            RowsAhead& ahead) {
  const int D = static_cast<int>(p.D);
  Vec peak[kVec], sum[kVec], shrink[kVec], block_sum[kVec];
  for (int n = 0; n < kVec; ++n) peak[n] = load(block.peak + n * kWidth);
  score_block<kVec>(block.keys, count, block.packed, D, block.s, peak, ahead);
  for (int n = 0; n < kVec; ++n) {
    sum[n] = load(block.sum + n * kWidth);
    shrink[n] = exp(load(block.peak + n * kWidth) - peak[n]);
    block_sum[n] = zero();
  }
  exponentiate<kVec>(block.s, count, peak, block_sum);
  for (int n = 0; n < kVec; ++n) {
    store(block.sum + n * kWidth, first ? block_sum[n] : fma(sum[n], shrink[n], block_sum[n]));
    store(block.peak + n * kWidth, peak[n]);
  }
  accumulate_block<kVec, Keep::kScaled>(block.values, count, block.s, D, first, shrink, block.o);
}

template <class Scalar, int kVec, class Block>
void finish(const CrossFrameAttentionParams& p, const Block& block, int64_t b, int64_t i, int64_t h,
            int64_t query, int queries) {
  float inverse[kLanes];
  for (int n = 0; n < kVec; ++n) {
    store(inverse + n * kWidth, broadcast(1.0f) / load(block.sum + n * kWidth));
  }
  unpack_transposed(block.o, inverse, queries, kVec, static_cast<int>(p.D),
                    p.o.at<Scalar>(b, i, query, h), p.o.stride_p);
  float* lse = p.lse + ((b * p.T + i) * p.P + query) * p.H + h;
  for (int n = 0; n < queries; ++n) {
    lse[n * p.H] = Block::log_sum(block.peak[n], block.sum[n]);
  }
}

template <class Scalar, class Scratch>
void attend(const CrossFrameAttentionParams& p, const Scratch& scratch, int64_t b, int64_t i,
            int64_t h, int64_t query, int queries) {
  each_block(scratch, p.D, query, queries,
             [&](const Scratch& block, int64_t at, int count, auto width) {
               pack_block<Scalar>(p, block, p.q.at<Scalar>(b, i, at, h), count, width.count);
               for (int n = 0; n < width.count; ++n) {
                 store(block.peak + n * kWidth, broadcast(kNegativeInfinity));
                 store(block.sum + n * kWidth, zero());
               }
             });
  KeyWalk<CrossFrameAttentionParams> walk{p, b, h, p.frames + i * p.R};
  bool first = true;
  for (int keys; (keys = next_panel<Scalar>(scratch, walk)) > 0; first = false) {
    RowsAhead ahead = walk.template ahead<Scalar>();
    each_block(scratch, p.D, query, queries, [&](const Scratch& block, int64_t, int, auto width) {
      absorb<width.count>(p, block, keys, first, ahead);
    });
  }
  each_block(scratch, p.D, query, queries,
             [&](const Scratch& block, int64_t at, int count, auto width) {
               finish<Scalar, width.count>(p, block, b, i, h, at, count);
             });
}

template <class Scalar>
void write_empty(const CrossFrameAttentionParams& p, int64_t b, int64_t i, int64_t h, int64_t query,
                 int queries) {
  float* lse = p.lse + ((b * p.T + i) * p.P + query) * p.H + h;
  for (int n = 0; n < queries; ++n) {
    Scalar* o = p.o.at<Scalar>(b, i, query + n, h);
    for (int64_t c = 0; c < p.D; ++c) o[c] = from_float<Scalar>(0.0f);
    lse[n * p.H] = kNegativeInfinity;
  }
}

// Calls work(b, h, i, query, queries, worker) for every span of at most `most` queries that has keys.
template <class Scalar, class Work>
void for_query_spans(const CrossFrameAttentionParams& p, const Executor& executor, int64_t most,
                     const Work& work) {
  const int64_t span = task_span(p.B * p.H * p.T, p.P, most, executor.threads);
  const int64_t spans = (p.P + span - 1) / span;
  run_tasks(executor, p.B * p.H * p.T * spans, [&](int64_t task, int worker) {
    const int64_t query = task % spans * span;
    const int64_t i = task / spans % p.T;
    const int64_t h = task / (spans * p.T) % p.H;
    const int64_t b = task / (spans * p.T * p.H);
    const int queries = static_cast<int>(p.P - query < span ? p.P - query : span);
    bool empty = true;
    for (int64_t r = 0; r < p.R; ++r) empty = empty && p.frames[i * p.R + r] < 0;
    if (empty) return write_empty<Scalar>(p, b, i, h, query, queries);
    work(b, h, i, query, queries, worker);
  });
}

template <class Scratch>
int64_t workspace(const CrossFrameAttentionParams& p, int threads) {
  return threads * Scratch::bytes(p, largest_span(p.P, kSpan));
}

template <class Scalar, class Scratch>
void run(const CrossFrameAttentionParams& p, const Executor& executor) {
  const int64_t span = largest_span(p.P, kSpan);
  for_query_spans<Scalar>(
      p, executor, kSpan,
      [&](int64_t b, int64_t h, int64_t i, int64_t query, int queries, int worker) {
        char* base = static_cast<char*>(p.workspace) + worker * Scratch::bytes(p, span);
        attend<Scalar>(p, Scratch(p, span, base), b, i, h, query, queries);
      });
}

#if ZSVR_ISA_LEVEL >= 4
void run_on_tiles(const CrossFrameAttentionParams& p, const Executor& executor) {
  const TileShape shape(p);
  char* base = static_cast<char*>(p.workspace);
  uint16_t* pack = reinterpret_cast<uint16_t*>(base);
  base += p.B * p.Tk * p.H * shape.pack_frame() * 2;
  run_tasks(executor, p.B * p.Tk * p.H, [&](int64_t task, int) {
    pack_values(p, shape, task / (p.Tk * p.H), task / p.H % p.Tk, task % p.H,
                pack + task * shape.pack_frame());
  });
  for_query_spans<BFloat16>(
      p, executor, kLanes,
      [&](int64_t b, int64_t h, int64_t i, int64_t query, int queries, int worker) {
        const TileScratch scratch =
            tile_scratch_of(shape, base + worker * tile_scratch_bytes(shape));
        by_width(queries, [&](auto width) {
          attend_tiles<width.count>(p, shape, scratch, pack, b, i, h, query, queries);
        });
      });
}
#endif

}  // namespace

int64_t cross_frame_attention_fwd_workspace(const CrossFrameAttentionParams& params, int threads) {
#if ZSVR_ISA_LEVEL >= 4
  if (params.dtype == DType::kBFloat16) return tile_workspace(params, threads);
#elif ZSVR_ISA_LEVEL == 3
  if (params.dtype == DType::kBFloat16) return workspace<PairScratch>(params, threads);
#endif
  return workspace<FloatScratch>(params, threads);
}

Status cross_frame_attention_fwd(const CrossFrameAttentionParams& params,
                                 const Executor& executor) {
  switch (params.dtype) {
    case DType::kFloat32:
      run<float, FloatScratch>(params, executor);
      break;
    case DType::kBFloat16:
#if ZSVR_ISA_LEVEL >= 4
      run_on_tiles(params, executor);
#elif ZSVR_ISA_LEVEL == 3
      run<BFloat16, PairScratch>(params, executor);
#else
      run<BFloat16, FloatScratch>(params, executor);
#endif
      break;
    case DType::kFloat16:
      run<Float16, FloatScratch>(params, executor);
      break;
  }
  return ok_status();
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
