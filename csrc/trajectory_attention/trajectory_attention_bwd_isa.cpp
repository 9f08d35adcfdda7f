// Computes:  with p_l = exp(z_l - lse), g_l = dO . V_l, ds_l = p_l (g_l - delta), delta = sum p_l g_l - dlse:
//            dq = scale sum_l ds_l K_l; dk[cell] = scale sum w ds q, dv[cell] = sum w p dO over the samples
//            that read the cell; dpositions from the corner dots.
// Tasks:     per clip, pass A: (tile of 4x4 sites, some query frames in turn) for p, ds, dq, dpositions; pass B:
//            (tile, some source frames) for dk, dv, walking the inverse index. A task owns every output it writes:
//            no atomics.
// Tiles:     pass A as the forward; pass B decodes the entries of a tile, then takes one head of one site after the
//            other with dk and dv in registers.
// Traffic:   pass A reads K and V twice as the forward does; p and ds [T, L, P, 2, H] are written and read once
//            per corner; pass B reads q and dO rows once per entry (4 corners per live sample).
// Numerics:  float32 sums in the order of samples, so results do not depend on the thread count; delta comes
//            from p and g rather than from the rounded output, so one live slot has ds = 0 to float32.
#include "trajectory_attention/samples.h"
#include "trajectory_attention/trajectory_attention.h"

namespace zsvr {
namespace ZSVR_ISA {
namespace {

using Params = TrajectoryAttentionBackwardParams;

constexpr int kEntries = 512;  // inverse-index entries decoded together

int64_t sites_of(const Params& p) { return p.Hg * p.Wg; }

// p and ds of every sample of one clip: [T, L, P, 2, H].
int64_t weight_bytes(const Params& p) { return aligned(p.T * p.L * sites_of(p) * 2 * p.H * 4); }

struct Scratch {
  float *scores, *products;  // [L, sites, H]: logits then p, and dO . V then ds
  float* row;                // [2, H, D in whole units] sums of pass B
  void* samples;             // [sites, L]
};

int64_t score_bytes(const Params& p, const Tiling& tiling) {
  return aligned(tiling.height * tiling.width * p.L * p.H * 4);
}

// A head takes whole units of 32 channels at most.
int64_t row_bytes(const Params& p) { return 2 * p.H * ((p.D + 31) / 32 * 32) * 4; }

int64_t scratch_bytes(const Params& p, const Tiling& tiling) {
  return 2 * score_bytes(p, tiling) + row_bytes(p) +
         aligned(tiling.height * tiling.width * p.L * static_cast<int64_t>(sizeof(Sample<float>)));
}

Scratch scratch_of(const Params& p, const Tiling& tiling, int worker) {
  char* base =
      static_cast<char*>(p.workspace) + weight_bytes(p) + worker * scratch_bytes(p, tiling);
  Scratch scratch;
  scratch.scores = reinterpret_cast<float*>(base);
  scratch.products = reinterpret_cast<float*>(base + score_bytes(p, tiling));
  scratch.row = reinterpret_cast<float*>(base + 2 * score_bytes(p, tiling));
  scratch.samples = base + 2 * score_bytes(p, tiling) + row_bytes(p);
  return scratch;
}

constexpr int kChains =
    4;  // partial sums of a dot: at the narrowest level one sum would run over D / 4 terms

// sum[c][0] + .. + sum[c][3] holds lanes that sum to y . row[c].
template <class Scalar>
ZSVR_INLINE void dot_corners(const Scalar* const (&row)[4], const Scalar* y, int64_t D,
                             Vec (&sum)[4][kChains]) {
  for (int c = 0; c < 4; ++c) {
    for (int n = 0; n < kChains; ++n) sum[c][n] = zero();
  }
  for (int64_t d = 0; d < D; d += kChains * kWidth) {
#pragma GCC unroll 4
    for (int n = 0; n < kChains; ++n) {
      const int64_t at = d + n * kWidth;
      if (at >= D) break;
      const int count = D - at < kWidth ? static_cast<int>(D - at) : kWidth;
      const Vec other = load_first(y + at, count);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) sum[c][n] = fma(load_first(row[c] + at, count), other, sum[c][n]);
    }
  }
}

// d(sum over heads of a[h] q.K[h] + p[h] dO.V[h]) / d(x, y) at one sample, added over clips.
template <class Scalar>
void position_gradient(const Params& p, int64_t b, int64_t i, int64_t site, int64_t j,
                       const float* position, const float* probability, const float* ds,
                       float* out) {
  const Located at = locate(position, p.Hg, p.Wg);
  const int64_t corners[4] = {at.y0 * p.Wg + at.x0, at.y0 * p.Wg + at.x1, at.y1 * p.Wg + at.x0,
                              at.y1 * p.Wg + at.x1};
  Vec of_corner[4] = {zero(), zero(), zero(), zero()};
  for (int64_t h = 0; h < p.H; ++h) {
    const Scalar *k[4], *v[4];
    for (int c = 0; c < 4; ++c) {
      k[c] = p.k.at<Scalar>(b, j, corners[c], h);
      v[c] = p.v.at<Scalar>(b, j, corners[c], h);
    }
    Vec of_k[4][kChains], of_v[4][kChains];
    dot_corners(k, p.q.at<Scalar>(b, i, site, h), p.D, of_k);
    dot_corners(v, p.d_o.at<Scalar>(b, i, site, h), p.D, of_v);
    const Vec k_weight = broadcast(p.scale * ds[h]), v_weight = broadcast(probability[h]);
    for (int c = 0; c < 4; ++c) {
      const Vec head = (of_v[c][0] + of_v[c][1] + (of_v[c][2] + of_v[c][3])) * v_weight;
      of_corner[c] =
          of_corner[c] + fma(of_k[c][0] + of_k[c][1] + (of_k[c][2] + of_k[c][3]), k_weight, head);
    }
  }
  float sums[4];
  for (int c = 0; c < 4; ++c) sums[c] = reduce_add(of_corner[c]);
  const float right = static_cast<float>(p.Wg - 1), bottom = static_cast<float>(p.Hg - 1);
  const bool moves_x = position[0] >= 0.0f && position[0] <= right;
  const bool moves_y = position[1] >= 0.0f && position[1] <= bottom;
  const float dx = (1.0f - at.fy) * (sums[1] - sums[0]) + at.fy * (sums[3] - sums[2]);
  const float dy = (1.0f - at.fx) * (sums[2] - sums[0]) + at.fx * (sums[3] - sums[1]);
  out[0] += moves_x ? dx : 0.0f;
  out[1] += moves_y ? dy : 0.0f;
}

// Logits -> p, dO . V -> ds, in place; delta and lse per (site, head).
void softmax_gradient(const Params& p, const Scratch& scratch, int64_t b, int64_t i,
                      const TileSites& sites) {
  const int64_t rows = sites.count() * p.H;
  const Vec scale = broadcast(p.scale * kLog2E), minus_log2e = broadcast(-kLog2E);
  int64_t n = 0, h = 0;
  for (int64_t at = 0; at < rows; at += kWidth) {
    const int lanes = rows - at < kWidth ? static_cast<int>(rows - at) : kWidth;
    float lses[kWidth] = {}, dlses[kWidth] = {};
    for (int lane = 0; lane < lanes; ++lane) {
      const int64_t index = ((b * p.T + i) * sites_of(p) + sites.site(n)) * p.H + h;
      const float lse = p.lse[index];
      lses[lane] = lse == -__builtin_inff() ? 0.0f : lse;  // no live slot: every p is exp2(-inf)
      if (p.dlse != nullptr) dlses[lane] = p.dlse[index];
      if (++h == p.H) h = 0, ++n;
    }
    const Vec lse = load(lses);
    Vec delta = zero() - load(dlses);
    for (int64_t l = 0; l < p.L; ++l) {
      float* s = scratch.scores + l * rows + at;
      const float* g = scratch.products + l * rows + at;
      const Vec probability =
          exp2(fma(lse, minus_log2e, scaled_score(load_first(s, lanes), scale)));
      store_first(s, probability, lanes);
      delta = fma(probability, load_first(g, lanes), delta);
    }
    for (int64_t l = 0; l < p.L; ++l) {
      float* g = scratch.products + l * rows + at;
      const Vec probability = load_first(scratch.scores + l * rows + at, lanes);
      store_first(g, probability * (load_first(g, lanes) - delta), lanes);
    }
  }
}

template <class Scalar, int kD>
void pass_a(const Params& p, const Tiling& tiling, int64_t b, int64_t i, int64_t tile,
            bool has_next, const Scratch& scratch, float* weights) {
  const TileSites sites = tile_at(tiling, tile, p.Hg, p.Wg);
  const int64_t P = sites_of(p), rows = sites.count() * p.H;
  const int D = static_cast<int>(p.D);
  const int64_t trajectory = (b % p.Bp * p.T + i) * p.L * P;
  const int32_t* frames = p.frames + i * p.L;
  auto* samples = static_cast<Sample<Scalar>*>(scratch.samples);
  int live[kTileSites] = {};

  for (int64_t l = 0; l < p.L; ++l) {
    for (int64_t n = 0; n < sites.count(); ++n) {
      const int64_t site = sites.site(n), at = trajectory + l * P + site;
      float* s = scratch.scores + l * rows + n * p.H;
      float* g = scratch.products + l * rows + n * p.H;
      if (frames[l] < 0 || p.valid[at] == 0) {
        for (int64_t h = 0; h < p.H; ++h) s[h] = kDead, g[h] = 0.0f;
        continue;
      }
      const Cell cell = cell_of(p.positions + 2 * at, p.Hg, p.Wg);
      const int slot = static_cast<int>(l);
      const Sample<Scalar> k = sample_at<Scalar>(p.k, b, frames[l], cell, slot);
      dots<kD>(k, p.k.stride_h, p.q.at<Scalar>(b, i, site, 0), p.q.stride_h, p.H, D, s);
      dots<kD>(sample_at<Scalar>(p.v, b, frames[l], cell, slot), p.v.stride_h,
               p.d_o.at<Scalar>(b, i, site, 0), p.d_o.stride_h, p.H, D, g);
      samples[n * p.L + live[n]++] = k;
    }
  }
  softmax_gradient(p, scratch, b, i, sites);

  for (int64_t l = 0; l < p.L; ++l) {
    for (int64_t n = 0; n < sites.count(); ++n) {
      const int64_t site = sites.site(n), at = trajectory + l * P + site;
      const float* probability = scratch.scores + l * rows + n * p.H;
      const float* ds = scratch.products + l * rows + n * p.H;
      float* kept = weights + ((i * p.L + l) * P + site) * 2 * p.H;
      for (int64_t h = 0; h < p.H; ++h) kept[h] = probability[h], kept[p.H + h] = ds[h];
      if (p.dpositions == nullptr) continue;
      float* dposition = p.dpositions + 2 * at;
      if (b < p.Bp) dposition[0] = dposition[1] = 0.0f;
      if (frames[l] < 0 || p.valid[at] == 0) continue;
      position_gradient<Scalar>(p, b, i, site, frames[l], p.positions + 2 * at, probability, ds,
                                dposition);
    }
  }
  if (p.dq.data == nullptr) return;
  Ahead ahead[kTileSites];
  if (has_next) {
    for (int64_t n = 0; n < sites.count(); ++n) {
      ahead[n].add<Scalar>(p.q, b, i + 1, sites.site(n));
      ahead[n].add<Scalar>(p.d_o, b, i + 1, sites.site(n));
      ahead[n].add<Scalar>(p.dq, b, i + 1, sites.site(n));
    }
    add_new_samples<Scalar>(p, b, i + 1, sites, ahead);
  }
  constexpr int kHeads = kBlendHeads<Scalar, kD>;
  for (int64_t h = 0; h < p.H; h += kHeads) {
    const int64_t heads = p.H - h < kHeads ? p.H - h : kHeads;
    for (int64_t n = 0; n < sites.count(); ++n) {
      ahead[n].fetch(h * D * sizeof(Scalar), heads * D * sizeof(Scalar));
      blend<kD>(samples + n * p.L, live[n], p.k.stride_h, scratch.products + n * p.H, rows, p.scale,
                h, heads, D, p.dq.at<Scalar>(b, i, sites.site(n), 0), p.dq.stride_h);
    }
  }
}

// ---- pass B -------------------------------------------------------------------------------------

// A decoded inverse-index entry: the query's rows and weights.
template <class Scalar>
struct Entry {
  const Scalar *q, *d_o;
  const float* weights;  // [2, H]: p, ds
  float corner;
};

// Entries of one source site. Sums begin in `row` unless these are its first, and end there unless they are its last.
template <class Scalar>
struct Run {
  const Entry<Scalar>* entries;
  int count;
  bool is_first, is_last;
  int64_t site;
};

// dk += scale * corner * ds * q and dv += corner * p * dO: kUnits units of one head from channel c on.
template <class Scalar, int kUnits, int kLast>
static void gather_units(const Params& p, const Run<Scalar>& run, int64_t b, int64_t j, int64_t h,
                         int64_t c, int runtime_last, float* row) {
  constexpr int kParts = Unit<Scalar>::kParts, kLanes = Unit<Scalar>::kLanes;
  const int last = kLast > 0 ? kLast : runtime_last;
  const auto lanes = [&](int u) { return u == kUnits - 1 ? last : kLanes; };
  const int64_t q_at = h * p.q.stride_h + c, d_o_at = h * p.d_o.stride_h + c;
  // A part takes a whole vector of scratch: row [2, H, ceil(D / kLanes) * kLanes].
  const int64_t head = (p.D + kLanes - 1) / kLanes * kLanes;
  float *row_k = row + h * head + c, *row_v = row_k + p.H * head;
  Vec k[kUnits][kParts] = {}, v[kUnits][kParts] = {};
  if (!run.is_first) {
    for (int u = 0; u < kUnits; ++u) {
      for (int i = 0; i < kParts; ++i) {
        k[u][i] = load(row_k + u * kLanes + i * kWidth);
        v[u][i] = load(row_v + u * kLanes + i * kWidth);
      }
    }
  }
  for (int e = 0; e < run.count; ++e) {
    const Entry<Scalar>& entry = run.entries[e];
    const Vec of_v = broadcast(entry.corner * entry.weights[h]);
    const Vec of_k = broadcast(entry.corner * entry.weights[p.H + h]);
#pragma GCC unroll 16
    for (int u = 0; u < kUnits; ++u) {
      Vec q[kParts], d_o[kParts];
      load_unit(entry.q + q_at + u * kLanes, lanes(u), q);
      load_unit(entry.d_o + d_o_at + u * kLanes, lanes(u), d_o);
#pragma GCC unroll 2
      for (int i = 0; i < kParts; ++i) {
        k[u][i] = fma(q[i], of_k, k[u][i]);
        v[u][i] = fma(d_o[i], of_v, v[u][i]);
      }
    }
  }
  if (!run.is_last) {
    for (int u = 0; u < kUnits; ++u) {
      for (int i = 0; i < kParts; ++i) {
        store(row_k + u * kLanes + i * kWidth, k[u][i]);
        store(row_v + u * kLanes + i * kWidth, v[u][i]);
      }
    }
    return;
  }
  const Vec scale = broadcast(p.scale);
  Scalar* dk = p.dk.data == nullptr ? nullptr : p.dk.at<Scalar>(b, j, run.site, h) + c;
  Scalar* dv = p.dv.data == nullptr ? nullptr : p.dv.at<Scalar>(b, j, run.site, h) + c;
#pragma GCC unroll 16
  for (int u = 0; u < kUnits; ++u) {
#pragma GCC unroll 2
    for (int i = 0; i < kParts; ++i) k[u][i] = k[u][i] * scale;
    if (dk != nullptr) store_unit(dk + u * kLanes, k[u], lanes(u));
    if (dv != nullptr) store_unit(dv + u * kLanes, v[u], lanes(u));
  }
}

template <class Scalar, int kD>
ZSVR_INLINE void gather(const Params& p, const Run<Scalar>& run, int64_t b, int64_t j, int64_t h,
                        float* row) {
  constexpr int kLanes = Unit<Scalar>::kLanes;
  constexpr int kUnits = (kD + kLanes - 1) / kLanes;
  if constexpr (kD > 0) {
    gather_units<Scalar, kUnits, kD - (kUnits - 1) * kLanes>(p, run, b, j, h, 0, 0, row);
  } else {
    for (int64_t c = 0; c < p.D; c += kChunk * kLanes) {
      const int left = p.D - c < kChunk * kLanes ? static_cast<int>(p.D - c) : kChunk * kLanes;
      const int units = (left + kLanes - 1) / kLanes, last = left - (units - 1) * kLanes;
      if (units == 4) {
        gather_units<Scalar, 4, 0>(p, run, b, j, h, c, last, row);
      } else if (units == 3) {
        gather_units<Scalar, 3, 0>(p, run, b, j, h, c, last, row);
      } else if (units == 2) {
        gather_units<Scalar, 2, 0>(p, run, b, j, h, c, last, row);
      } else {
        gather_units<Scalar, 1, 0>(p, run, b, j, h, c, last, row);
      }
    }
  }
}

// dk and dv of one tile of source frame j: sites are taken together while their entries fit the table.
template <class Scalar, int kD>
void pass_b(const Params& p, const Tiling& tiling, int64_t b, int64_t j, int64_t tile,
            bool has_next, const Scratch& scratch, const float* weights) {
  const TileSites sites = tile_at(tiling, tile, p.Hg, p.Wg);
  const int64_t P = sites_of(p), source = (b % p.Bp * p.Tk + j) * P;
  const uint32_t grid = static_cast<uint32_t>(P), slots = static_cast<uint32_t>(p.L);
  Ahead ahead[kTileSites];
  if (has_next) {
    for (int64_t n = 0; n < sites.count(); ++n) {
      const int64_t site = sites.site(n), end = p.offsets[source + P + site + 1];
      ahead[n].add<Scalar>(p.dk, b, j + 1, site);
      ahead[n].add<Scalar>(p.dv, b, j + 1, site);
      if (end == p.offsets[source + P + site]) continue;
      const uint32_t sample = static_cast<uint32_t>(p.samples[end - 1]);  // of the latest frame
      ahead[n].add<Scalar>(p.q, b, sample / grid / slots, sample % grid);
      ahead[n].add<Scalar>(p.d_o, b, sample / grid / slots, sample % grid);
    }
  }
  Entry<Scalar> entries[kEntries];
  Run<Scalar> runs[kTileSites];
  int filled = 0, waiting = 0;
  const auto finish = [&] {
    for (int64_t h = 0; h < p.H; ++h) {
      for (int n = 0; n < waiting; ++n) gather<Scalar, kD>(p, runs[n], b, j, h, scratch.row);
    }
    filled = waiting = 0;
  };
  for (int64_t n = 0; n < sites.count(); ++n) {
    const int64_t site = sites.site(n);
    const int64_t begin = p.offsets[source + site], end = p.offsets[source + site + 1];
    ahead[n].fetch(0, p.H * p.D * static_cast<int64_t>(sizeof(Scalar)));
    if (end - begin > kEntries - filled) finish();
    int64_t at = begin;
    do {
      Run<Scalar>& run = runs[waiting++];
      run = {entries + filled, 0, at == begin, false, site};
      for (; at < end && filled < kEntries; ++at, ++run.count) {
        const uint32_t sample = static_cast<uint32_t>(p.samples[at]);
        const int64_t query = sample % grid, i = sample / grid / slots;
        entries[filled++] = {p.q.at<Scalar>(b, i, query, 0), p.d_o.at<Scalar>(b, i, query, 0),
                             weights + static_cast<int64_t>(sample) * 2 * p.H, p.weights[at]};
      }
      run.is_last = at == end;
      if (!run.is_last) finish();
    } while (at < end);
  }
  finish();
}

template <class Scalar>
void run(const Params& p, const Executor& executor) {
  const Tiling tiling = tiling_of(p.Hg, p.Wg, p.L, p.H);
  const int64_t tiles = tiling.rows * tiling.columns;
  float* weights = static_cast<float*>(p.workspace);
  // Calls visit(tile, frame, has_next, scratch), a task taking consecutive frames of one tile.
  const auto for_each_tile = [&](int64_t count, auto visit) {
    const int64_t frames = frames_of_task(count, tiles, executor.threads);
    const int64_t chunks = (count + frames - 1) / frames;
    run_tasks(executor, tiles * chunks, [&](int64_t task, int worker) {
      const int64_t begin = task % chunks * frames;
      const int64_t end = begin + frames < count ? begin + frames : count;
      const Scratch scratch = scratch_of(p, tiling, worker);
      for (int64_t t = begin; t < end; ++t) visit(task / chunks, t, t + 1 < end, scratch);
    });
  };
  with_head_dim(p.D, [&]<int kD>() {
    for (int64_t b = 0; b < p.B; ++b) {
      for_each_tile(p.T, [&](int64_t tile, int64_t i, bool has_next, const Scratch& scratch) {
        pass_a<Scalar, kD>(p, tiling, b, i, tile, has_next, scratch, weights);
      });
      if (p.dk.data == nullptr && p.dv.data == nullptr) continue;
      for_each_tile(p.Tk, [&](int64_t tile, int64_t j, bool has_next, const Scratch& scratch) {
        pass_b<Scalar, kD>(p, tiling, b, j, tile, has_next, scratch, weights);
      });
    }
  });
}

}  // namespace

int64_t trajectory_attention_bwd_workspace(const TrajectoryAttentionBackwardParams& params,
                                           int threads) {
  const Tiling tiling = tiling_of(params.Hg, params.Wg, params.L, params.H);
  return weight_bytes(params) + threads * scratch_bytes(params, tiling);
}

Status trajectory_attention_bwd(const TrajectoryAttentionBackwardParams& params,
                                const Executor& executor) {
  by_dtype(params.dtype, [&](auto value) { run<decltype(value)>(params, executor); });
  return ok_status();
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
