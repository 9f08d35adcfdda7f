// Computes:  dq, dk, dv of cross-frame attention from lse, with P = exp(z - lse), dS = P (dO.v - delta),
//            delta = dO.o - dlse:  dq = scale dS K,  dk = scale dS^T Q,  dv = P^T dO.
// Tasks:     1. (clip, query frame) for delta; 2. (clip, head, query frame, span of queries) for dq;
//            3. (clip, head, source frame, span of keys) for dk and dv, walking the query frames that read the
//            source (inverse frame table). A task owns every output it writes: no atomics, one order of sums.
// Tiles:     the owned side in lanes, in blocks [D, kLanes]; the other side in panels of kKeys rows, each of which
//            meets every block of the span; scores are recomputed in both passes (7 products of P x P x D, not 5).
// Traffic:   the other side's rows once per span of kSpan sites, outputs once.
// Numerics:  float32; a row without keys gives zero gradients. A block's arithmetic does not depend on its span.
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

constexpr int64_t kSpan = 256;  // queries or keys of a task

// Scratch of one worker; a span is a whole number of blocks of kLanes sites.
struct Scratch {
  float *packed_a, *packed_b, *sum_a, *sum_b;  // [span / kLanes, D, kLanes]
  float *s, *t;                                // [kKeys, kLanes]
  float *panel_a, *panel_b;                    // [kKeys, panel_stride(D)]

  // With the part that belongs to the block of kLanes sites at an offset in the span.
  Scratch block(int64_t D, int64_t offset) const {
    Scratch result = *this;
    result.packed_a += offset * D;
    result.packed_b += offset * D;
    result.sum_a += offset * D;
    result.sum_b += offset * D;
    return result;
  }
};

int64_t shared_bytes(const Params& p) {
  return 2 * aligned(p.B * p.H * p.T * p.P * 4) + aligned((p.Tk + 1) * 8) + aligned(p.T * p.R * 4);
}

int64_t scratch_bytes(const Params& p) {
  return 4 *
         (4 * p.D * largest_span(p.P, kSpan) + 2 * kKeys * kLanes + 2 * kKeys * panel_stride(p.D));
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
  const int64_t span = largest_span(p.P, kSpan);
  float* next = reinterpret_cast<float*>(static_cast<char*>(p.workspace) + shared_bytes(p) +
                                         worker * scratch_bytes(p));
  const auto take = [&next](int64_t count) {
    float* result = next;
    next += count;
    return result;
  };
  Scratch scratch;
  scratch.packed_a = take(p.D * span);
  scratch.packed_b = take(p.D * span);
  scratch.sum_a = take(p.D * span);
  scratch.sum_b = take(p.D * span);
  scratch.s = take(kKeys * kLanes);
  scratch.t = take(kKeys * kLanes);
  scratch.panel_a = take(kKeys * panel_stride(p.D));
  scratch.panel_b = take(kKeys * panel_stride(p.D));
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

// dq of a block takes in a panel of keys and one of values.
template <int kVec>
void absorb_keys(const Shared& shared, const Scratch& block, int64_t row, int queries, int count,
                 int D, Keep keep, RowsAhead& ahead) {
  Vec lse[kVec], delta[kVec];
  for (int n = 0; n < kVec; ++n) {
    const int left = queries - n * kWidth < 0 ? 0 : queries - n * kWidth;
    lse[n] = load_first(shared.lse + row + n * kWidth, left);
    delta[n] = load_first(shared.delta + row + n * kWidth, left);
  }
  const Vec minus_log2e = broadcast(-kLog2E);
  score_block<kVec>(block.panel_a, count, block.packed_a, D, block.s, nullptr, ahead);
  score_block<kVec>(block.panel_b, count, block.packed_b, D, block.t, nullptr, ahead);
  for (int n = 0; n < count; ++n) {
#pragma GCC unroll 4
    for (int w = 0; w < kVec; ++w) {
      float* s = block.s + n * kLanes + w * kWidth;
      const Vec dp = load(block.t + n * kLanes + w * kWidth);
      store(s, exp2(fma(lse[w], minus_log2e, load(s))) * (dp - delta[w]));
    }
  }
  accumulate_block<kVec>(block.panel_a, count, block.s, D, keep, nullptr, block.sum_a);
}

template <class Scalar>
void query_gradient(const Params& p, const Shared& shared, const Scratch& scratch, int64_t b,
                    int64_t i, int64_t h, int64_t query, int queries) {
  const int D = static_cast<int>(p.D);
  each_block(scratch, D, query, queries, [&](const Scratch& block, int64_t at, int n, auto width) {
    pack_transposed(p.q.at<Scalar>(b, i, at, h), p.q.stride_p, n, width.count, D, p.scale * kLog2E,
                    block.packed_a);
    pack_transposed(p.d_o.at<Scalar>(b, i, at, h), p.d_o.stride_p, n, width.count, D, 1.0f,
                    block.packed_b);
  });
  const int64_t row = ((b * p.H + h) * p.T + i) * p.P;
  KeyWalk<Params> walk{p, b, h, p.frames + i * p.R};
  Keep keep = Keep::kNothing;
  for (int count; (count = walk.next<Scalar>(scratch.panel_a, scratch.panel_b)) > 0;
       keep = Keep::kAll) {
    RowsAhead ahead = walk.template ahead<Scalar>();
    each_block(scratch, D, query, queries,
               [&](const Scratch& block, int64_t at, int n, auto width) {
                 absorb_keys<width.count>(shared, block, row + at, n, count, D, keep, ahead);
               });
  }
  if (keep == Keep::kNothing) return write_zeros<Scalar>(p.dq, b, i, h, query, queries, p.D);
  each_block(scratch, D, query, queries, [&](const Scratch& block, int64_t at, int n, auto width) {
    write<width.count, Scalar>(block.sum_a, p.scale, n, p, p.dq, b, i, h, at);
  });
}

// dk and dv of a block take in a panel of queries and one of output gradients.
template <int kVec>
void absorb_queries(const Params& p, const Shared& shared, const Scratch& block, int64_t row,
                    int count, int D, Keep keep, RowsAhead& ahead) {
  const bool wants_dk = p.dk.data != nullptr, wants_dv = p.dv.data != nullptr;
  const Vec minus_log2e = broadcast(-kLog2E);
  score_block<kVec>(block.panel_a, count, block.packed_a, D, block.s, nullptr, ahead);
  if (wants_dk) score_block<kVec>(block.panel_b, count, block.packed_b, D, block.t, nullptr, ahead);
  for (int n = 0; n < count; ++n) {
    const Vec lse = broadcast(shared.lse[row + n]);
    const Vec delta = broadcast(shared.delta[row + n]);
#pragma GCC unroll 4
    for (int w = 0; w < kVec; ++w) {
      float* s = block.s + n * kLanes + w * kWidth;
      float* t = block.t + n * kLanes + w * kWidth;
      const Vec probability = exp2(fma(lse, minus_log2e, load(s)));
      store(s, probability);
      if (wants_dk) store(t, probability * (load(t) - delta));
    }
  }
  if (wants_dv) {
    accumulate_block<kVec>(block.panel_b, count, block.s, D, keep, nullptr, block.sum_b);
  }
  if (wants_dk) {
    accumulate_block<kVec>(block.panel_a, count, block.t, D, keep, nullptr, block.sum_a);
  }
}

// Queries and output gradients of a frame from a site on.
template <class Scalar>
RowsAhead rows_ahead(const Params& p, int64_t b, int64_t i, int64_t h, int64_t site) {
  if (site >= p.P) return {};
  const int64_t left = p.P - site, size = sizeof(Scalar);
  return {reinterpret_cast<const char*>(p.q.at<Scalar>(b, i, site, h)),
          reinterpret_cast<const char*>(p.d_o.at<Scalar>(b, i, site, h)),
          p.q.stride_p * size,
          p.d_o.stride_p * size,
          p.D * size,
          static_cast<int>(left < kKeys ? left : kKeys)};
}

template <class Scalar>
void key_gradients(const Params& p, const Shared& shared, const Scratch& scratch, int64_t b,
                   int64_t j, int64_t h, int64_t key, int keys) {
  const int D = static_cast<int>(p.D);
  const bool wants_dk = p.dk.data != nullptr, wants_dv = p.dv.data != nullptr;
  if (shared.offsets[j] == shared.offsets[j + 1]) {
    if (wants_dk) write_zeros<Scalar>(p.dk, b, j, h, key, keys, p.D);
    if (wants_dv) write_zeros<Scalar>(p.dv, b, j, h, key, keys, p.D);
    return;
  }
  each_block(scratch, D, key, keys, [&](const Scratch& block, int64_t at, int n, auto width) {
    pack_transposed(p.k.at<Scalar>(b, j, at, h), p.k.stride_p, n, width.count, D, p.scale * kLog2E,
                    block.packed_a);
    if (!wants_dk) return;
    pack_transposed(p.v.at<Scalar>(b, j, at, h), p.v.stride_p, n, width.count, D, 1.0f,
                    block.packed_b);
  });
  Keep keep = Keep::kNothing;
  for (int64_t entry = shared.offsets[j]; entry < shared.offsets[j + 1]; ++entry) {
    const int64_t i = shared.readers[entry];
    const int64_t row = ((b * p.H + h) * p.T + i) * p.P;
    for (int64_t site = 0; site < p.P; site += kKeys, keep = Keep::kAll) {
      const int count = static_cast<int>(p.P - site < kKeys ? p.P - site : kKeys);
      copy_rows(p.q.at<Scalar>(b, i, site, h), p.q.stride_p, count, D, scratch.panel_a);
      copy_rows(p.d_o.at<Scalar>(b, i, site, h), p.d_o.stride_p, count, D, scratch.panel_b);
      RowsAhead ahead = rows_ahead<Scalar>(p, b, i, h, site + kKeys);
      each_block(scratch, D, key, keys, [&](const Scratch& block, int64_t, int, auto width) {
        absorb_queries<width.count>(p, shared, block, row + site, count, D, keep, ahead);
      });
    }
  }
  each_block(scratch, D, key, keys, [&](const Scratch& block, int64_t at, int n, auto width) {
    if (wants_dk) write<width.count, Scalar>(block.sum_a, p.scale, n, p, p.dk, b, j, h, at);
    if (wants_dv) write<width.count, Scalar>(block.sum_b, 1.0f, n, p, p.dv, b, j, h, at);
  });
}

template <class Scalar>
void run(const Params& p, const Executor& executor) {
  const Shared shared = shared_of(p);
  invert_table(p, shared);
  run_tasks(executor, p.B * p.T,
            [&](int64_t task, int) { prepare<Scalar>(p, shared, task / p.T, task % p.T); });
  const int64_t shorter = p.T < p.Tk ? p.T : p.Tk;
  const int64_t span = task_span(p.B * p.H * shorter, p.P, kSpan, executor.threads);
  const int64_t spans = (p.P + span - 1) / span;
  const int64_t query_tasks = p.dq.data != nullptr ? p.B * p.H * p.T * spans : 0;
  const bool wants_keys = p.dk.data != nullptr || p.dv.data != nullptr;
  const int64_t key_tasks = wants_keys ? p.B * p.H * p.Tk * spans : 0;
  run_tasks(executor, key_tasks + query_tasks, [&](int64_t task, int worker) {
    const bool is_key = task < key_tasks;
    const int64_t frames = is_key ? p.Tk : p.T;
    const int64_t rest = is_key ? task : task - key_tasks;
    const int64_t site = rest % spans * span;
    const int64_t t = rest / spans % frames;
    const int64_t h = rest / (spans * frames) % p.H;
    const int64_t b = rest / (spans * frames * p.H);
    const int count = static_cast<int>(p.P - site < span ? p.P - site : span);
    const Scratch scratch = scratch_of(p, worker);
    if (is_key) {
      key_gradients<Scalar>(p, shared, scratch, b, t, h, site, count);
    } else {
      query_gradient<Scalar>(p, shared, scratch, b, t, h, site, count);
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
