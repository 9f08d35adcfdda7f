// Computes:  dq, dk, dv of cross-frame attention from lse, with P = exp(z - lse), dS = P (dO.v - delta),
//            delta = dO.o - dlse:  dq = scale dS K,  dk = scale dS^T Q,  dv = P^T dO.
// Tasks:     1. (clip, query frame) for delta; 2. (clip, head, query frame, block of queries) for dq;
//            3. (clip, head, source frame, block of keys) for dk and dv, walking the query frames that read the
//            source (inverse frame table). A task owns every output it writes: no atomics, one order of sums.
// Tiles:     the owned side in lanes [D, kLanes], the other side in blocks of kKeys rows read in place; scores
//            are recomputed in both passes (7 products of P x P x D instead of 5).
// Traffic:   per task the other side's rows twice (from the second-level cache), outputs once.
// Numerics:  float32; 16-bit rows are converted once per block; a row without keys gives zero gradients.
#include "cross_frame_attention/cross_frame_attention.h"
#include "cross_frame_attention/key_walk.h"
#include "zsvr/tile.h"

namespace zsvr {
namespace ZSVR_ISA {
namespace {

using Params = CrossFrameAttentionBackwardParams;

// What the tasks share: lse and delta as [B, H, T, P], and the inverse frame table.
struct Shared {
  float* lse;
  float* delta;
  int64_t* offsets;  // [Tk + 1]
  int32_t* readers;  // [T * R] query frames by source frame, in order, repeated as often as listed
};

// Scratch of one worker.
struct Scratch {
  float *packed_a, *packed_b, *sum_a, *sum_b;  // [D, kLanes]
  float *s, *t;                                // [kKeys, kLanes]
  float *rows_a, *rows_b;                      // [kKeys, D], 16-bit storage only
};

int64_t shared_bytes(const Params& p) {
  return 2 * aligned(p.B * p.H * p.T * p.P * 4) + aligned((p.Tk + 1) * 8) + aligned(p.T * p.R * 4);
}

int64_t scratch_bytes(const Params& p) {
  const int64_t rows = p.dtype == DType::kFloat32 ? 0 : 2 * aligned(kKeys * p.D * 4);
  return 4 * aligned(p.D * kLanes * 4) + 2 * aligned(kKeys * kLanes * 4) + rows;
}

Shared shared_of(const Params& p) {
  char* base = static_cast<char*>(p.workspace);
  const int64_t field = aligned(p.B * p.H * p.T * p.P * 4);
  Shared shared;
  shared.lse = reinterpret_cast<float*>(base);
  shared.delta = reinterpret_cast<float*>(base + field);
  shared.offsets = reinterpret_cast<int64_t*>(base + 2 * field);
  shared.readers = reinterpret_cast<int32_t*>(base + 2 * field + aligned((p.Tk + 1) * 8));
  return shared;
}

Scratch scratch_of(const Params& p, int worker) {
  char* base = static_cast<char*>(p.workspace) + shared_bytes(p) + worker * scratch_bytes(p);
  const auto take = [&base](int64_t bytes) {
    float* result = reinterpret_cast<float*>(base);
    base += aligned(bytes);
    return result;
  };
  Scratch scratch;
  scratch.packed_a = take(p.D * kLanes * 4);
  scratch.packed_b = take(p.D * kLanes * 4);
  scratch.sum_a = take(p.D * kLanes * 4);
  scratch.sum_b = take(p.D * kLanes * 4);
  scratch.s = take(kKeys * kLanes * 4);
  scratch.t = take(kKeys * kLanes * 4);
  scratch.rows_a = take(kKeys * p.D * 4);
  scratch.rows_b = scratch.rows_a + aligned(kKeys * p.D * 4) / 4;
  return scratch;
}

void invert_table(const Params& p, const Shared& shared) {
  for (int64_t j = 0; j <= p.Tk; ++j) shared.offsets[j] = 0;
  for (int64_t n = 0; n < p.T * p.R; ++n) {
    if (p.frames[n] >= 0) ++shared.offsets[p.frames[n] + 1];
  }
  for (int64_t j = 0; j < p.Tk; ++j) shared.offsets[j + 1] += shared.offsets[j];
  // Filling moves each offset to the end of its row, which is the start of the next: shift back after.
  for (int64_t n = 0; n < p.T * p.R; ++n) {
    if (p.frames[n] >= 0) {
      shared.readers[shared.offsets[p.frames[n]]++] = static_cast<int32_t>(n / p.R);
    }
  }
  for (int64_t j = p.Tk; j > 0; --j) shared.offsets[j] = shared.offsets[j - 1];
  shared.offsets[0] = 0;
}

template <class Scalar>
float dot(const Scalar* a, const Scalar* b, int D) {
  Vec sum = zero();
  for (int c = 0; c < D; c += kWidth) {
    const int channels = D - c < kWidth ? D - c : kWidth;
    sum = fma(load_first(a + c, channels), load_first(b + c, channels), sum);
  }
  return reduce_add(sum);
}

template <class Scalar>
void prepare(const Params& p, const Shared& shared, int64_t b, int64_t i) {
  for (int64_t h = 0; h < p.H; ++h) {
    const int64_t row = ((b * p.H + h) * p.T + i) * p.P;
    for (int64_t site = 0; site < p.P; ++site) {
      const int64_t at = ((b * p.T + i) * p.P + site) * p.H + h;
      const float product = dot(p.o.at<Scalar>(b, i, site, h), p.d_o.at<Scalar>(b, i, site, h),
                                static_cast<int>(p.D));
      shared.delta[row + site] = product - (p.dlse != nullptr ? p.dlse[at] : 0.0f);
      shared.lse[row + site] = p.lse[at];
    }
  }
}

template <class Scalar>
void write_zeros(const Tokens& target, int64_t b, int64_t t, int64_t h, int64_t site, int count,
                 int64_t D) {
  for (int n = 0; n < count; ++n) {
    Scalar* row = target.at<Scalar>(b, t, site + n, h);
    for (int64_t c = 0; c < D; ++c) row[c] = from_float<Scalar>(0.0f);
  }
}

template <int kVec, class Scalar>
void write(const float* sum, float factor, int count, const Params& p, const Tokens& target,
           int64_t b, int64_t t, int64_t h, int64_t site) {
  float factors[kLanes];
  for (int n = 0; n < kVec; ++n) store(factors + n * kWidth, broadcast(factor));
  unpack_transposed(sum, factors, count, kVec, static_cast<int>(p.D),
                    target.at<Scalar>(b, t, site, h), target.stride_p);
}

template <class Scalar, int kVec>
void query_gradient(const Params& p, const Shared& shared, const Scratch& scratch, int64_t b,
                    int64_t i, int64_t h, int64_t query, int queries) {
  const int D = static_cast<int>(p.D);
  pack_transposed(p.q.at<Scalar>(b, i, query, h), p.q.stride_p, queries, kVec, D, p.scale * kLog2E,
                  scratch.packed_a);
  pack_transposed(p.d_o.at<Scalar>(b, i, query, h), p.d_o.stride_p, queries, kVec, D, 1.0f,
                  scratch.packed_b);
  const int64_t row = ((b * p.H + h) * p.T + i) * p.P + query;
  Vec lse[kVec], delta[kVec];
  for (int n = 0; n < kVec; ++n) {
    const int left = queries - n * kWidth < 0 ? 0 : queries - n * kWidth;
    lse[n] = load_first(shared.lse + row + n * kWidth, left);
    delta[n] = load_first(shared.delta + row + n * kWidth, left);
  }
  const Scalar* k[kKeys];
  const Scalar* v[kKeys];
  const float* keys[kKeys];
  const float* values[kKeys];
  const Vec minus_log2e = broadcast(-kLog2E);
  KeyWalk<Params> walk{p, b, h, p.frames + i * p.R};
  Keep keep = Keep::kNothing;
  for (int count; (count = walk.next(k, v)) > 0; keep = Keep::kAll) {
    float_rows(k, count, D, scratch.rows_a, keys);
    float_rows(v, count, D, scratch.rows_b, values);
    score_block<kVec>(keys, count, scratch.packed_a, D, scratch.s, nullptr);
    score_block<kVec>(values, count, scratch.packed_b, D, scratch.t, nullptr);
    for (int n = 0; n < count; ++n) {
#pragma GCC unroll 4
      for (int w = 0; w < kVec; ++w) {
        float* s = scratch.s + n * kLanes + w * kWidth;
        const Vec dp = load(scratch.t + n * kLanes + w * kWidth);
        store(s, exp2(fma(lse[w], minus_log2e, load(s))) * (dp - delta[w]));
      }
    }
    accumulate_block<kVec>(keys, count, scratch.s, D, keep, nullptr, scratch.sum_a);
  }
  if (keep == Keep::kNothing) return write_zeros<Scalar>(p.dq, b, i, h, query, queries, p.D);
  write<kVec, Scalar>(scratch.sum_a, p.scale, queries, p, p.dq, b, i, h, query);
}

template <class Scalar, int kVec>
void key_gradients(const Params& p, const Shared& shared, const Scratch& scratch, int64_t b,
                   int64_t j, int64_t h, int64_t key, int keys) {
  const int D = static_cast<int>(p.D);
  const bool wants_dk = p.dk.data != nullptr, wants_dv = p.dv.data != nullptr;
  if (shared.offsets[j] == shared.offsets[j + 1]) {
    if (wants_dk) write_zeros<Scalar>(p.dk, b, j, h, key, keys, p.D);
    if (wants_dv) write_zeros<Scalar>(p.dv, b, j, h, key, keys, p.D);
    return;
  }
  pack_transposed(p.k.at<Scalar>(b, j, key, h), p.k.stride_p, keys, kVec, D, p.scale * kLog2E,
                  scratch.packed_a);
  if (wants_dk) {
    pack_transposed(p.v.at<Scalar>(b, j, key, h), p.v.stride_p, keys, kVec, D, 1.0f,
                    scratch.packed_b);
  }
  const Scalar* q[kKeys];
  const Scalar* d_o[kKeys];
  const float* queries[kKeys];
  const float* gradients[kKeys];
  const Vec minus_log2e = broadcast(-kLog2E);
  Keep keep = Keep::kNothing;
  for (int64_t entry = shared.offsets[j]; entry < shared.offsets[j + 1]; ++entry) {
    const int64_t i = shared.readers[entry];
    const int64_t row = ((b * p.H + h) * p.T + i) * p.P;
    for (int64_t site = 0; site < p.P; site += kKeys) {
      const int count = static_cast<int>(p.P - site < kKeys ? p.P - site : kKeys);
      for (int n = 0; n < count; ++n) {
        q[n] = p.q.at<Scalar>(b, i, site + n, h);
        d_o[n] = p.d_o.at<Scalar>(b, i, site + n, h);
      }
      float_rows(q, count, D, scratch.rows_a, queries);
      float_rows(d_o, count, D, scratch.rows_b, gradients);
      score_block<kVec>(queries, count, scratch.packed_a, D, scratch.s, nullptr);
      if (wants_dk) {
        score_block<kVec>(gradients, count, scratch.packed_b, D, scratch.t, nullptr);
      }
      for (int n = 0; n < count; ++n) {
        const Vec lse = broadcast(shared.lse[row + site + n]);
        const Vec delta = broadcast(shared.delta[row + site + n]);
#pragma GCC unroll 4
        for (int w = 0; w < kVec; ++w) {
          float* s = scratch.s + n * kLanes + w * kWidth;
          float* t = scratch.t + n * kLanes + w * kWidth;
          const Vec probability = exp2(fma(lse, minus_log2e, load(s)));
          store(s, probability);
          if (wants_dk) store(t, probability * (load(t) - delta));
        }
      }
      if (wants_dv) {
        accumulate_block<kVec>(gradients, count, scratch.s, D, keep, nullptr, scratch.sum_b);
      }
      if (wants_dk) {
        accumulate_block<kVec>(queries, count, scratch.t, D, keep, nullptr, scratch.sum_a);
      }
      keep = Keep::kAll;
    }
  }
  if (wants_dk) write<kVec, Scalar>(scratch.sum_a, p.scale, keys, p, p.dk, b, j, h, key);
  if (wants_dv) write<kVec, Scalar>(scratch.sum_b, 1.0f, keys, p, p.dv, b, j, h, key);
}

// Splits one token axis into blocks of kLanes sites and calls the widest instance that is not wasteful.
template <class Narrow, class Middle, class Wide>
ZSVR_INLINE void by_width(int count, Narrow narrow, Middle middle, Wide wide) {
  const int vectors = (count + kWidth - 1) / kWidth;
  if (vectors > 2) return wide();
  if (vectors == 2) return middle();
  narrow();
}

template <class Scalar>
void run(const Params& p, const Executor& executor) {
  const Shared shared = shared_of(p);
  invert_table(p, shared);
  run_tasks(executor, p.B * p.T,
            [&](int64_t task, int) { prepare<Scalar>(p, shared, task / p.T, task % p.T); });
  const int64_t blocks = (p.P + kLanes - 1) / kLanes;
  const int64_t query_tasks = p.dq.data != nullptr ? p.B * p.H * p.T * blocks : 0;
  const bool wants_keys = p.dk.data != nullptr || p.dv.data != nullptr;
  const int64_t key_tasks = wants_keys ? p.B * p.H * p.Tk * blocks : 0;
  run_tasks(executor, key_tasks + query_tasks, [&](int64_t task, int worker) {
    const bool is_key = task < key_tasks;
    const int64_t frames = is_key ? p.Tk : p.T;
    const int64_t rest = is_key ? task : task - key_tasks;
    const int64_t site = rest % blocks * kLanes;
    const int64_t t = rest / blocks % frames;
    const int64_t h = rest / (blocks * frames) % p.H;
    const int64_t b = rest / (blocks * frames * p.H);
    const int count = static_cast<int>(p.P - site < kLanes ? p.P - site : kLanes);
    const Scratch scratch = scratch_of(p, worker);
    if (is_key) {
      by_width(
          count, [&] { key_gradients<Scalar, 1>(p, shared, scratch, b, t, h, site, count); },
          [&] { key_gradients<Scalar, 2>(p, shared, scratch, b, t, h, site, count); },
          [&] { key_gradients<Scalar, kVectors>(p, shared, scratch, b, t, h, site, count); });
    } else {
      by_width(
          count, [&] { query_gradient<Scalar, 1>(p, shared, scratch, b, t, h, site, count); },
          [&] { query_gradient<Scalar, 2>(p, shared, scratch, b, t, h, site, count); },
          [&] { query_gradient<Scalar, kVectors>(p, shared, scratch, b, t, h, site, count); });
    }
  });
}

}  // namespace

int64_t cross_frame_attention_bwd_workspace(const CrossFrameAttentionBackwardParams& params,
                                            int threads) {
  return shared_bytes(params) + threads * scratch_bytes(params);
}

Status cross_frame_attention_bwd(const CrossFrameAttentionBackwardParams& params,
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
