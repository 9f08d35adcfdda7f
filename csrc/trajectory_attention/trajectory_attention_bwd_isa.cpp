// Computes:  with p_l = exp(z_l - lse), g_l = dO . V_l, ds_l = p_l (g_l - delta), delta = sum p_l g_l - dlse:
//            dq = scale sum_l ds_l K_l; dk[cell] = scale sum w ds q, dv[cell] = sum w p dO over the samples
//            that read the cell; dpositions from the corner dots.
// Tasks:     per clip, pass A: (query frame, tile of sites) for p, ds, dq, dpositions; pass B: (source frame, 16
//            sites) for dk, dv, walking the inverse index. A task owns every output it writes: no atomics.
// Tiles:     pass A as the forward; pass B keeps one head's row of dk and dv in registers over its entries.
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

constexpr int64_t kSourceBlock = 16;  // sites of a pass-B task
constexpr int kEntries = 128;         // inverse-index entries decoded together

int64_t sites_of(const Params& p) { return p.Hg * p.Wg; }

// p and ds of every sample of one clip: [T, L, P, 2, H].
int64_t weight_bytes(const Params& p) { return aligned(p.T * p.L * sites_of(p) * 2 * p.H * 4); }

struct Scratch {
  float *scores, *products;  // [L, sites, H]: logits then p, and dO . V then ds
  float* row;                // [2, H, D] sums of pass B
  void* samples;             // [L]
};

int64_t score_bytes(const Params& p, const Tiling& tiling) {
  return aligned(tiling.height * tiling.width * p.L * p.H * 4);
}

int64_t scratch_bytes(const Params& p, const Tiling& tiling) {
  return 2 * score_bytes(p, tiling) + aligned(2 * p.H * p.D * 4) +
         aligned(p.L * static_cast<int64_t>(sizeof(Sample<float>)));
}

Scratch scratch_of(const Params& p, const Tiling& tiling, int worker) {
  char* base =
      static_cast<char*>(p.workspace) + weight_bytes(p) + worker * scratch_bytes(p, tiling);
  Scratch scratch;
  scratch.scores = reinterpret_cast<float*>(base);
  scratch.products = reinterpret_cast<float*>(base + score_bytes(p, tiling));
  scratch.row = reinterpret_cast<float*>(base + 2 * score_bytes(p, tiling));
  scratch.samples = base + 2 * score_bytes(p, tiling) + aligned(2 * p.H * p.D * 4);
  return scratch;
}

// d(sum over heads of a[h] q.K[h] + p[h] dO.V[h]) / d(x, y) at one sample, added over clips.
template <class Scalar>
void position_gradient(const Params& p, int64_t b, int64_t i, int64_t site, int64_t j,
                       const float* position, const float* probability, const float* ds,
                       float* out) {
  const Located at = locate(position, p.Hg, p.Wg);
  const int64_t corners[4] = {at.y0 * p.Wg + at.x0, at.y0 * p.Wg + at.x1, at.y1 * p.Wg + at.x0,
                              at.y1 * p.Wg + at.x1};
  float sums[4];
  for (int c = 0; c < 4; ++c) {
    Vec sum = zero();
    for (int64_t h = 0; h < p.H; ++h) {
      const Scalar* k = p.k.at<Scalar>(b, j, corners[c], h);
      const Scalar* v = p.v.at<Scalar>(b, j, corners[c], h);
      const Scalar* q = p.q.at<Scalar>(b, i, site, h);
      const Scalar* d_o = p.d_o.at<Scalar>(b, i, site, h);
      const Vec of_k = broadcast(p.scale * ds[h]), of_v = broadcast(probability[h]);
      for (int64_t d = 0; d < p.D; d += kWidth) {
        const int n = p.D - d < kWidth ? static_cast<int>(p.D - d) : kWidth;
        sum = fma(load_first(k + d, n) * load_first(q + d, n), of_k, sum);
        sum = fma(load_first(v + d, n) * load_first(d_o + d, n), of_v, sum);
      }
    }
    sums[c] = reduce_add(sum);
  }
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
  for (int64_t at = 0; at < rows; at += kWidth) {
    const int lanes = rows - at < kWidth ? static_cast<int>(rows - at) : kWidth;
    float lses[kWidth] = {}, dlses[kWidth] = {};
    for (int n = 0; n < lanes; ++n) {
      const int64_t site = sites.site((at + n) / p.H), h = (at + n) % p.H;
      const int64_t index = ((b * p.T + i) * sites_of(p) + site) * p.H + h;
      const float lse = p.lse[index];
      lses[n] = lse == -__builtin_inff() ? 0.0f : lse;  // no live slot: every p is exp2(-inf)
      if (p.dlse != nullptr) dlses[n] = p.dlse[index];
    }
    const Vec lse = load(lses);
    Vec delta = zero() - load(dlses);
    for (int64_t l = 0; l < p.L; ++l) {
      float* s = scratch.scores + l * rows + at;
      const float* g = scratch.products + l * rows + at;
      const Vec probability = exp2(fma(lse, minus_log2e, load_first(s, lanes) * scale));
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

template <class Scalar>
void pass_a(const Params& p, const Tiling& tiling, int64_t b, int64_t i, int64_t tile,
            const Scratch& scratch, float* weights) {
  const TileSites sites = tile_at(tiling, tile, p.Hg, p.Wg);
  const int64_t P = sites_of(p), rows = sites.count() * p.H;
  const int D = static_cast<int>(p.D);
  const int64_t trajectory = (b % p.Bp * p.T + i) * p.L * P;
  const int32_t* frames = p.frames + i * p.L;
  const auto live = [&](int64_t l, int64_t site) {
    return frames[l] >= 0 && p.valid[trajectory + l * P + site] != 0;
  };
  const auto position = [&](int64_t l, int64_t site) {
    return p.positions + 2 * (trajectory + l * P + site);
  };

  for (int64_t l = 0; l < p.L; ++l) {
    for (int64_t n = 0; n < sites.count(); ++n) {
      const int64_t site = sites.site(n);
      float* s = scratch.scores + l * rows + n * p.H;
      float* g = scratch.products + l * rows + n * p.H;
      if (!live(l, site)) {
        for (int64_t h = 0; h < p.H; ++h) s[h] = -__builtin_inff(), g[h] = 0.0f;
        continue;
      }
      const auto k = sample_at<Scalar>(p.k, b, frames[l], position(l, site), p.Hg, p.Wg, 0);
      dots(k, p.k.stride_h, p.q.at<Scalar>(b, i, site, 0), p.q.stride_h, p.H, D, s);
      const auto v = sample_at<Scalar>(p.v, b, frames[l], position(l, site), p.Hg, p.Wg, 0);
      dots(v, p.v.stride_h, p.d_o.at<Scalar>(b, i, site, 0), p.d_o.stride_h, p.H, D, g);
    }
  }
  softmax_gradient(p, scratch, b, i, sites);

  auto* samples = static_cast<Sample<Scalar>*>(scratch.samples);
  for (int64_t n = 0; n < sites.count(); ++n) {
    const int64_t site = sites.site(n);
    int count = 0;
    for (int64_t l = 0; l < p.L; ++l) {
      const float* probability = scratch.scores + l * rows + n * p.H;
      const float* ds = scratch.products + l * rows + n * p.H;
      float* kept = weights + ((i * p.L + l) * P + site) * 2 * p.H;
      for (int64_t h = 0; h < p.H; ++h) kept[h] = probability[h], kept[p.H + h] = ds[h];
      float* dposition =
          p.dpositions == nullptr ? nullptr : p.dpositions + 2 * (trajectory + l * P + site);
      if (dposition != nullptr && b < p.Bp) dposition[0] = dposition[1] = 0.0f;
      if (!live(l, site)) continue;
      if (dposition != nullptr) {
        position_gradient<Scalar>(p, b, i, site, frames[l], position(l, site), probability, ds,
                                  dposition);
      }
      samples[count++] =
          sample_at<Scalar>(p.k, b, frames[l], position(l, site), p.Hg, p.Wg, static_cast<int>(l));
    }
    if (p.dq.data == nullptr) continue;
    blend(samples, count, p.k.stride_h, scratch.products + n * p.H, rows, p.scale, p.H, D,
          p.dq.at<Scalar>(b, i, site, 0), p.dq.stride_h);
  }
}

// A decoded inverse-index entry: the query's rows and weights.
template <class Scalar>
struct Entry {
  const Scalar *q, *d_o;
  const float* weights;  // [2, H]: p, ds
  float corner;
};

// sum[0] += corner * ds * q and sum[1] += corner * p * dO, one chunk of one head.
template <class Scalar, int kVecs>
void gather_chunk(const Entry<Scalar>* entries, int count, int64_t q_at, int64_t d_o_at, int64_t h,
                  int64_t H, int last, float* dk, float* dv, bool first) {
  Vec k[kVecs], v[kVecs];
#pragma GCC unroll 4
  for (int n = 0; n < kVecs; ++n) {
    const int lanes = n == kVecs - 1 ? last : kWidth;
    k[n] = first ? zero() : load_first(dk + n * kWidth, lanes);
    v[n] = first ? zero() : load_first(dv + n * kWidth, lanes);
  }
  for (int e = 0; e < count; ++e) {
    const Entry<Scalar>& entry = entries[e];
    const Vec of_v = broadcast(entry.corner * entry.weights[h]);
    const Vec of_k = broadcast(entry.corner * entry.weights[H + h]);
    const Scalar* q = entry.q + q_at;
    const Scalar* d_o = entry.d_o + d_o_at;
#pragma GCC unroll 4
    for (int n = 0; n < kVecs - 1; ++n) {
      k[n] = fma(load(q + n * kWidth), of_k, k[n]);
      v[n] = fma(load(d_o + n * kWidth), of_v, v[n]);
    }
    k[kVecs - 1] = fma(load_first(q + (kVecs - 1) * kWidth, last), of_k, k[kVecs - 1]);
    v[kVecs - 1] = fma(load_first(d_o + (kVecs - 1) * kWidth, last), of_v, v[kVecs - 1]);
  }
#pragma GCC unroll 4
  for (int n = 0; n < kVecs; ++n) {
    const int lanes = n == kVecs - 1 ? last : kWidth;
    store_first(dk + n * kWidth, k[n], lanes);
    store_first(dv + n * kWidth, v[n], lanes);
  }
}

template <class Scalar>
void gather(const Params& p, const Entry<Scalar>* entries, int count, float* row, bool first) {
  for (int64_t h = 0; h < p.H; ++h) {
    for (int64_t c = 0; c < p.D; c += kChunk * kWidth) {
      const int left = p.D - c < kChunk * kWidth ? static_cast<int>(p.D - c) : kChunk * kWidth;
      const int vectors = (left + kWidth - 1) / kWidth;
      const int last = left - (vectors - 1) * kWidth;
      const int64_t q_at = h * p.q.stride_h + c, d_o_at = h * p.d_o.stride_h + c;
      float* dk = row + h * p.D + c;
      float* dv = dk + p.H * p.D;
      if (vectors == 4) {
        gather_chunk<Scalar, 4>(entries, count, q_at, d_o_at, h, p.H, last, dk, dv, first);
      } else if (vectors == 3) {
        gather_chunk<Scalar, 3>(entries, count, q_at, d_o_at, h, p.H, last, dk, dv, first);
      } else if (vectors == 2) {
        gather_chunk<Scalar, 2>(entries, count, q_at, d_o_at, h, p.H, last, dk, dv, first);
      } else {
        gather_chunk<Scalar, 1>(entries, count, q_at, d_o_at, h, p.H, last, dk, dv, first);
      }
    }
  }
}

template <class Scalar>
void write_row(const Params& p, const float* row, float factor, const Tokens& target, int64_t b,
               int64_t j, int64_t site) {
  const Vec scale = broadcast(factor);
  for (int64_t h = 0; h < p.H; ++h) {
    Scalar* out = target.at<Scalar>(b, j, site, h);
    for (int64_t c = 0; c < p.D; c += kWidth) {
      const int lanes = p.D - c < kWidth ? static_cast<int>(p.D - c) : kWidth;
      store_first(out + c, load_first(row + h * p.D + c, lanes) * scale, lanes);
    }
  }
}

template <class Scalar>
void pass_b(const Params& p, int64_t b, int64_t j, int64_t begin, int64_t end,
            const Scratch& scratch, const float* weights) {
  const int64_t P = sites_of(p);
  const uint32_t sites = static_cast<uint32_t>(P), slots = static_cast<uint32_t>(p.L);
  Entry<Scalar> entries[kEntries];
  for (int64_t site = begin; site < end; ++site) {
    const int64_t row = (b % p.Bp * p.Tk + j) * P + site;
    for (int64_t n = 0; n < 2 * p.H * p.D; ++n) scratch.row[n] = 0.0f;
    for (int64_t at = p.offsets[row]; at < p.offsets[row + 1]; at += kEntries) {
      const int64_t left = p.offsets[row + 1] - at;
      const int count = left < kEntries ? static_cast<int>(left) : kEntries;
      for (int n = 0; n < count; ++n) {
        const uint32_t sample = static_cast<uint32_t>(p.samples[at + n]);
        const int64_t query = sample % sites, i = sample / sites / slots;
        entries[n] = {p.q.at<Scalar>(b, i, query, 0), p.d_o.at<Scalar>(b, i, query, 0),
                      weights + static_cast<int64_t>(sample) * 2 * p.H, p.weights[at + n]};
      }
      gather(p, entries, count, scratch.row, at == p.offsets[row]);
    }
    if (p.dk.data != nullptr) write_row<Scalar>(p, scratch.row, p.scale, p.dk, b, j, site);
    if (p.dv.data != nullptr) {
      write_row<Scalar>(p, scratch.row + p.H * p.D, 1.0f, p.dv, b, j, site);
    }
  }
}

template <class Scalar>
void run(const Params& p, const Executor& executor) {
  const Tiling tiling = tiling_of(p.Hg, p.Wg, p.L, p.H);
  const int64_t tiles = tiling.rows * tiling.columns, P = sites_of(p);
  const int64_t blocks = (P + kSourceBlock - 1) / kSourceBlock;
  float* weights = static_cast<float*>(p.workspace);
  for (int64_t b = 0; b < p.B; ++b) {
    run_tasks(executor, p.T * tiles, [&](int64_t task, int worker) {
      pass_a<Scalar>(p, tiling, b, task / tiles, task % tiles, scratch_of(p, tiling, worker),
                     weights);
    });
    if (p.dk.data == nullptr && p.dv.data == nullptr) continue;
    run_tasks(executor, p.Tk * blocks, [&](int64_t task, int worker) {
      const int64_t begin = task % blocks * kSourceBlock;
      const int64_t end = begin + kSourceBlock < P ? begin + kSourceBlock : P;
      pass_b<Scalar>(p, b, task / blocks, begin, end, scratch_of(p, tiling, worker), weights);
    });
  }
}

}  // namespace

int64_t trajectory_attention_bwd_workspace(const TrajectoryAttentionBackwardParams& params,
                                           int threads) {
  const Tiling tiling = tiling_of(params.Hg, params.Wg, params.L, params.H);
  return weight_bytes(params) + threads * scratch_bytes(params, tiling);
}

Status trajectory_attention_bwd(const TrajectoryAttentionBackwardParams& params,
                                const Executor& executor) {
  switch (params.dtype) {
    case DType::kFloat32:
      run<float>(params, executor);
      break;
    case DType::kBFloat16:
      run<BFloat16>(params, executor);
      break;
    case DType::kFloat16:
      run<Float16>(params, executor);
      break;
  }
  return ok_status();
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
