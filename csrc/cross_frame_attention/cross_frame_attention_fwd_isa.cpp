// Computes:  o = softmax(scale q K^T) V over the listed frames, and lse.
// Tasks:     (clip, head, query frame, block of kLanes queries); a task owns its rows of o and lse.
// Tiles:     queries in lanes, packed once [D, kLanes]; keys in blocks of kKeys, read in place from the frames
//            the table names, several small frames to a block; s [kKeys, kLanes] and o [D, kLanes] stay in cache.
// Traffic:   q and o once, k and v of each listed frame once per query block (from the second-level cache).
// Numerics:  float32 (16-bit rows are converted once per block), online softmax in base 2 with the scale folded
//            into q; a row without keys gives 0 and -inf.
#include <cmath>

#include "cross_frame_attention/amx_fwd.h"
#include "cross_frame_attention/cross_frame_attention.h"
#include "cross_frame_attention/key_walk.h"
#include "zsvr/tile.h"

namespace zsvr {
namespace ZSVR_ISA {
namespace {

const float kNegativeInfinity = -__builtin_inff();

// Scratch of one worker.
struct Scratch {
  float* packed;  // [D, kLanes]
  float* s;       // [kKeys, kLanes]
  float* o;       // [D, kLanes]
  float* rows;    // [kKeys, D], 16-bit storage only
};

int64_t scratch_bytes(const CrossFrameAttentionParams& p) {
  const int64_t rows = p.dtype == DType::kFloat32 ? 0 : aligned(kKeys * p.D * 4);
  return 2 * aligned(p.D * kLanes * 4) + aligned(kKeys * kLanes * 4) + rows;
}

Scratch scratch_of(const CrossFrameAttentionParams& p, int worker) {
  char* base = static_cast<char*>(p.workspace) + worker * scratch_bytes(p);
  Scratch scratch;
  scratch.packed = reinterpret_cast<float*>(base);
  base += aligned(p.D * kLanes * 4);
  scratch.o = reinterpret_cast<float*>(base);
  base += aligned(p.D * kLanes * 4);
  scratch.s = reinterpret_cast<float*>(base);
  scratch.rows = reinterpret_cast<float*>(base + aligned(kKeys * kLanes * 4));
  return scratch;
}

// s := exp2(s - peak); adds the rows to sum, in order.
template <int kVec>
void exponentiate(float* s, int count, const Vec* peak, Vec* sum) {
  for (int n = 0; n < count; ++n) {
#pragma GCC unroll 4
    for (int v = 0; v < kVec; ++v) {
      float* at = s + n * kLanes + v * kWidth;
      const Vec e = exp2(load(at) - peak[v]);
      sum[v] = sum[v] + e;
      store(at, e);
    }
  }
}

template <class Scalar, int kVec>
void attend(const CrossFrameAttentionParams& p, const Scratch& scratch, int64_t b, int64_t i,
            int64_t h, int64_t query, int queries) {
  const int D = static_cast<int>(p.D);
  pack_transposed(p.q.at<Scalar>(b, i, query, h), p.q.stride_p, queries, kVec, D, p.scale * kLog2E,
                  scratch.packed);
  const Scalar* k[kKeys];
  const Scalar* v[kKeys];
  const float* rows[kKeys];
  Vec peak[kVec], sum[kVec];
  for (int n = 0; n < kVec; ++n) {
    peak[n] = broadcast(kNegativeInfinity);
    sum[n] = zero();
  }
  KeyWalk<CrossFrameAttentionParams> walk{p, b, h, p.frames + i * p.R};
  bool first = true;
  for (int count; (count = walk.next(k, v)) > 0; first = false) {
    float_rows(k, count, D, scratch.rows, rows);
    Vec old[kVec], shrink[kVec], block_sum[kVec];
    for (int n = 0; n < kVec; ++n) old[n] = peak[n];
    score_block<kVec>(rows, count, scratch.packed, D, scratch.s, peak);
    for (int n = 0; n < kVec; ++n) {
      shrink[n] = exp2(old[n] - peak[n]);
      block_sum[n] = zero();
    }
    exponentiate<kVec>(scratch.s, count, peak, block_sum);
    for (int n = 0; n < kVec; ++n) {
      sum[n] = first ? block_sum[n] : fma(sum[n], shrink[n], block_sum[n]);
    }
    float_rows(v, count, D, scratch.rows, rows);
    accumulate_block<kVec>(rows, count, scratch.s, D, first ? Keep::kNothing : Keep::kScaled,
                           shrink, scratch.o);
  }
  float inverse[kLanes], peaks[kLanes], sums[kLanes];
  for (int n = 0; n < kVec; ++n) {
    store(inverse + n * kWidth, broadcast(1.0f) / sum[n]);
    store(peaks + n * kWidth, peak[n]);
    store(sums + n * kWidth, sum[n]);
  }
  unpack_transposed(scratch.o, inverse, queries, kVec, D, p.o.at<Scalar>(b, i, query, h),
                    p.o.stride_p);
  float* lse = p.lse + ((b * p.T + i) * p.P + query) * p.H + h;
  for (int n = 0; n < queries; ++n) lse[n * p.H] = (peaks[n] + ::log2f(sums[n])) * kLn2;
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

// Calls work(b, h, i, query, queries, worker) for every block of queries that has keys.
template <class Scalar, class Work>
void for_query_blocks(const CrossFrameAttentionParams& p, const Executor& executor,
                      const Work& work) {
  const int64_t blocks = (p.P + kLanes - 1) / kLanes;
  run_tasks(executor, p.B * p.H * p.T * blocks, [&](int64_t task, int worker) {
    const int64_t query = task % blocks * kLanes;
    const int64_t i = task / blocks % p.T;
    const int64_t h = task / (blocks * p.T) % p.H;
    const int64_t b = task / (blocks * p.T * p.H);
    const int queries = static_cast<int>(p.P - query < kLanes ? p.P - query : kLanes);
    bool empty = true;
    for (int64_t r = 0; r < p.R; ++r) empty = empty && p.frames[i * p.R + r] < 0;
    if (empty) return write_empty<Scalar>(p, b, i, h, query, queries);
    work(b, h, i, query, queries, worker);
  });
}

template <class Scalar>
void run(const CrossFrameAttentionParams& p, const Executor& executor) {
  for_query_blocks<Scalar>(
      p, executor, [&](int64_t b, int64_t h, int64_t i, int64_t query, int queries, int worker) {
        const Scratch scratch = scratch_of(p, worker);
        const int vectors = (queries + kWidth - 1) / kWidth;
        if (vectors > 2) return attend<Scalar, kVectors>(p, scratch, b, i, h, query, queries);
        if (vectors == 2) return attend<Scalar, 2>(p, scratch, b, i, h, query, queries);
        attend<Scalar, 1>(p, scratch, b, i, h, query, queries);
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
  for_query_blocks<BFloat16>(
      p, executor, [&](int64_t b, int64_t h, int64_t i, int64_t query, int queries, int worker) {
        const TileScratch scratch =
            tile_scratch_of(shape, base + worker * tile_scratch_bytes(shape));
        const int vectors = (queries + kWidth - 1) / kWidth;
        if (vectors > 2) return attend_tiles<4>(p, shape, scratch, pack, b, i, h, query, queries);
        if (vectors == 2) return attend_tiles<2>(p, shape, scratch, pack, b, i, h, query, queries);
        attend_tiles<1>(p, shape, scratch, pack, b, i, h, query, queries);
      });
}
#endif

}  // namespace

int64_t cross_frame_attention_fwd_workspace(const CrossFrameAttentionParams& params, int threads) {
#if ZSVR_ISA_LEVEL >= 4
  if (params.dtype == DType::kBFloat16) return tile_workspace(params, threads);
#endif
  return threads * scratch_bytes(params);
}

Status cross_frame_attention_fwd(const CrossFrameAttentionParams& params,
                                 const Executor& executor) {
  switch (params.dtype) {
    case DType::kFloat32:
      run<float>(params, executor);
      break;
    case DType::kBFloat16:
#if ZSVR_ISA_LEVEL >= 4
      run_on_tiles(params, executor);
#else
      run<BFloat16>(params, executor);
#endif
      break;
    case DType::kFloat16:
      run<Float16>(params, executor);
      break;
  }
  return ok_status();
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
