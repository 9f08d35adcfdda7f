// Computes:  o = sum over live slots of softmax(scale q . K_l) V_l, K_l and V_l bilinear samples, and lse.
// Tasks:     (clip, tile of up to 4x4 sites, some query frames in turn); a task owns its rows of o and lse.
// Tiles:     scores [L, sites, H] of a tile; slots outer and sites inner for K, so that neighbouring sites meet the
//            same rows in the first-level cache; then two heads at a time, site by site, for V with the output in
//            registers. The rows that only the next frame needs are prefetched meanwhile.
// Traffic:   q and o once; 4 corner rows of k and v per live slot, shared by neighbouring sites through the first
//            level and by neighbouring frames through the second.
// Numerics:  float32 arithmetic, softmax in base 2; a single live slot has weight exactly 1.
#include <cmath>

#include "trajectory_attention/samples.h"
#include "trajectory_attention/trajectory_attention.h"

namespace zsvr {
namespace ZSVR_ISA {
namespace {

using Params = TrajectoryAttentionParams;

int64_t score_bytes(const Params& p, const Tiling& tiling) {
  return aligned(tiling.height * tiling.width * p.L * p.H * 4);
}

int64_t scratch_bytes(const Params& p, const Tiling& tiling) {
  return score_bytes(p, tiling) +
         aligned(tiling.height * tiling.width * p.L * static_cast<int64_t>(sizeof(Sample<float>)));
}

// Scores in base 2 -> weights of the softmax over slots; writes lse. rows = sites * H values per slot.
void softmax(const Params& p, float* scores, int64_t b, int64_t i, const TileSites& sites) {
  const float factor = p.scale * kLog2E;
  const Vec scale = broadcast(factor);
  const int64_t rows = sites.count() * p.H;
  const Vec lowest = broadcast(kDead);
  int64_t n = 0, h = 0;
  float* lse = p.lse + ((b * p.T + i) * p.Hg * p.Wg + sites.site(0)) * p.H;
  for (int64_t at = 0; at < rows; at += kWidth) {
    const int lanes = rows - at < kWidth ? static_cast<int>(rows - at) : kWidth;
    Vec peak = lowest;
    for (int64_t l = 0; l < p.L; ++l) {
      const Vec x = scaled_score(load_first(scores + l * rows + at, lanes), scale);
      store_first(scores + l * rows + at, x, lanes);
      peak = max(x, peak);
    }
    const Vec base = max(peak, broadcast(-3.0e38f));  // no live slot: exp2(-inf) = 0, not NaN
    Vec sum = zero();
    for (int64_t l = 0; l < p.L; ++l) {
      const Vec e = exp2(load_first(scores + l * rows + at, lanes) - base);
      store_first(scores + l * rows + at, e, lanes);
      sum = sum + e;
    }
    const Vec inverse = broadcast(1.0f) / sum;
    for (int64_t l = 0; l < p.L; ++l) {
      const Vec e = load_first(scores + l * rows + at, lanes);
      store_first(scores + l * rows + at, e * inverse, lanes);
    }
    float peaks[kWidth], sums[kWidth];
    store(peaks, base);
    store(sums, sum);
    for (int lane = 0; lane < lanes; ++lane) {
      lse[h] = sums[lane] == 0.0f ? -__builtin_inff() : (peaks[lane] + ::log2f(sums[lane])) * kLn2;
      if (++h < p.H) continue;
      h = 0;
      if (++n < sites.count()) lse = p.lse + ((b * p.T + i) * p.Hg * p.Wg + sites.site(n)) * p.H;
    }
  }
}

template <class Scalar, int kD>
void attend(const Params& p, const Tiling& tiling, int64_t b, int64_t i, int64_t tile,
            bool has_next, char* scratch) {
  const TileSites sites = tile_at(tiling, tile, p.Hg, p.Wg);
  const int64_t P = p.Hg * p.Wg, rows = sites.count() * p.H;
  const int D = static_cast<int>(p.D);
  const int64_t trajectory = (b % p.Bp * p.T + i) * p.L * P;  // sample of slot 0, site 0
  const int32_t* frames = p.frames + i * p.L;
  float* scores = reinterpret_cast<float*>(scratch);
  auto* samples =
      reinterpret_cast<Sample<Scalar>*>(scratch + score_bytes(p, tiling));  // [sites, L]
  int live[kTileSites] = {};

  for (int64_t l = 0; l < p.L; ++l) {
    for (int64_t n = 0; n < sites.count(); ++n) {
      const int64_t site = sites.site(n), at = trajectory + l * P + site;
      float* out = scores + l * rows + n * p.H;
      if (frames[l] < 0 || p.valid[at] == 0) {
        for (int64_t h = 0; h < p.H; ++h) out[h] = kDead;
        continue;
      }
      const Cell cell = cell_of(p.positions + 2 * at, p.Hg, p.Wg);
      const int slot = static_cast<int>(l);
      dots<kD>(sample_at<Scalar>(p.k, b, frames[l], cell, slot), p.k.stride_h,
               p.q.at<Scalar>(b, i, site, 0), p.q.stride_h, p.H, D, out);
      samples[n * p.L + live[n]++] = sample_at<Scalar>(p.v, b, frames[l], cell, slot);
    }
  }
  softmax(p, scores, b, i, sites);
  Ahead ahead[kTileSites];
  if (has_next) {
    for (int64_t n = 0; n < sites.count(); ++n) {
      ahead[n].add<Scalar>(p.q, b, i + 1, sites.site(n));
      ahead[n].add<Scalar>(p.o, b, i + 1, sites.site(n));
    }
    add_new_samples<Scalar>(p, b, i + 1, sites, ahead);
  }
  constexpr int kHeads = kBlendHeads<Scalar, kD>;
  for (int64_t h = 0; h < p.H; h += kHeads) {
    const int64_t heads = p.H - h < kHeads ? p.H - h : kHeads;
    for (int64_t n = 0; n < sites.count(); ++n) {
      ahead[n].fetch(h * D * sizeof(Scalar), heads * D * sizeof(Scalar));
      blend<kD>(samples + n * p.L, live[n], p.v.stride_h, scores + n * p.H, rows, 1.0f, h, heads, D,
                p.o.at<Scalar>(b, i, sites.site(n), 0), p.o.stride_h);
    }
  }
}

template <class Scalar>
void run(const Params& p, const Executor& executor) {
  const Tiling tiling = tiling_of(p.Hg, p.Wg, p.L, p.H);
  const int64_t tiles = tiling.rows * tiling.columns;
  const int64_t bytes = scratch_bytes(p, tiling);
  const int64_t frames = frames_of_task(p.T, p.B * tiles, executor.threads);
  const int64_t chunks = (p.T + frames - 1) / frames;
  run_tasks(executor, p.B * tiles * chunks, [&](int64_t task, int worker) {
    const int64_t begin = task % chunks * frames, end = begin + frames < p.T ? begin + frames : p.T;
    char* scratch = static_cast<char*>(p.workspace) + worker * bytes;
    with_head_dim(p.D, [&]<int kD>() {
      for (int64_t i = begin; i < end; ++i) {
        attend<Scalar, kD>(p, tiling, task / (tiles * chunks), i, task / chunks % tiles,
                           i + 1 < end, scratch);
      }
    });
  });
}

}  // namespace

int64_t trajectory_attention_fwd_workspace(const TrajectoryAttentionParams& params, int threads) {
  const Tiling tiling = tiling_of(params.Hg, params.Wg, params.L, params.H);
  return threads * scratch_bytes(params, tiling);
}

Status trajectory_attention_fwd(const TrajectoryAttentionParams& params, const Executor& executor) {
  by_dtype(params.dtype, [&](auto value) { run<decltype(value)>(params, executor); });
  return ok_status();
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
