// Computes:  dq, dk, dv of cross-frame attention from lse, with P = exp(z - lse), dS = P (dO.v - delta),
//            delta = dO.o - dlse:  dq = scale dS K,  dk = scale dS^T Q,  dv = P^T dO.
// Tasks:     1. (clip, query frame) for delta; then, for a group of heads at a time, rounds of (head, source frame,
//            span of keys): a round gives every span of queries to at most one task, so a task owns the dk, dv and
//            dq that it adds to. No atomics, and one order of sums: rounds do not depend on the number of threads.
// Tiles:     keys in lanes, in blocks [D, kLanes]; queries in panels of kQueries rows; P and dS of a block serve
//            all of dv, dk and dq: 5 products of P x P x D per pair of frames.
// Traffic:   q, dO, k, v once per pair of spans; sums of dq, dk, dv in and out once per round.
// Numerics:  float32, sums too whatever the storage (bf16 in pairs: bf16_bwd.h); a row without keys gives zero
//            gradients.
#include <type_traits>

#include "cross_frame_attention/bf16_bwd.h"
#include "cross_frame_attention/bwd_task.h"
#include "cross_frame_attention/cross_frame_attention.h"
#include "cross_frame_attention/key_walk.h"
#include "zsvr/tile.h"

namespace zsvr {
namespace ZSVR_ISA {
namespace {

using Params = CrossFrameAttentionBackwardParams;

constexpr int64_t kTasks = 8;       // of a round, per thread at least
constexpr int64_t kSums = 8 << 20;  // bytes of sums of a group of heads, if tasks suffice

// Whether products of this storage type are of pairs of bf16.
template <class Scalar>
constexpr bool kPairs = ZSVR_ISA_LEVEL >= 3 && std::is_same_v<Scalar, BFloat16>;

// How a launch is cut. Heads are counted through all clips.
struct Plan {
  int64_t span, spans;    // sites of a task; spans of a frame
  int64_t heads;          // of a group
  int64_t q_row;          // floats of a row of dq sums
  int64_t q_sum, kv_sum;  // floats of the sums of one head: dq; dk or dv
};

Plan plan_of(const Params& p, int threads) {
  Plan plan;
  plan.span = largest_span(p.P, kSpan);
  plan.spans = (p.P + plan.span - 1) / plan.span;
  plan.q_row = static_cast<int64_t>(channel_vectors(static_cast<int>(p.D))) * kWidth;
  plan.q_sum = p.dq.data != nullptr ? p.T * p.P * plan.q_row : 0;
  plan.kv_sum = p.Tk * plan.spans * plan.span * p.D;
  const int64_t fields = (p.dk.data != nullptr ? 1 : 0) + (p.dv.data != nullptr ? 1 : 0);
  const int64_t bytes = 4 * (plan.q_sum + fields * plan.kv_sum);
  const int64_t frames = p.T < p.Tk ? p.T : p.Tk;
  const int64_t least = (kTasks * threads + frames * plan.spans - 1) / (frames * plan.spans);
  plan.heads = bytes > 0 && kSums / bytes > least ? kSums / bytes : least;
  if (plan.heads > p.B * p.H) plan.heads = p.B * p.H;
  return plan;
}

// What the tasks share.
struct Shared {
  float *lse, *delta;   // [B, H, T, P]
  int32_t* columns;     // [R, T] source frames by round, -1 where a row has no more
  int32_t* first;       // [Tk] the first column that names a source frame, R if none does
  float *dq, *dk, *dv;  // [heads, T, P, q_row], [heads, Tk, spans, span / kLanes, D, kLanes]
};

int64_t field_bytes(const Params& p) { return aligned(p.B * p.H * p.T * p.P * 4); }

int64_t shared_bytes(const Params& p, const Plan& plan) {
  return 2 * field_bytes(p) + aligned(p.R * p.T * 4) + aligned(p.Tk * 4) +
         aligned(plan.heads * plan.q_sum * 4) +
         (p.dk.data != nullptr ? aligned(plan.heads * plan.kv_sum * 4) : 0) +
         (p.dv.data != nullptr ? aligned(plan.heads * plan.kv_sum * 4) : 0);
}

Shared shared_of(const Params& p, const Plan& plan) {
  char* next = static_cast<char*>(p.workspace);
  const auto take = [&next](int64_t bytes) {
    char* result = next;
    next += aligned(bytes);
    return result;
  };
  Shared shared;
  shared.lse = reinterpret_cast<float*>(take(field_bytes(p)));
  shared.delta = reinterpret_cast<float*>(take(field_bytes(p)));
  shared.columns = reinterpret_cast<int32_t*>(take(p.R * p.T * 4));
  shared.first = reinterpret_cast<int32_t*>(take(p.Tk * 4));
  shared.dq = reinterpret_cast<float*>(take(plan.heads * plan.q_sum * 4));
  const int64_t keys = plan.heads * plan.kv_sum * 4;
  shared.dk = reinterpret_cast<float*>(take(p.dk.data != nullptr ? keys : 0));
  shared.dv = reinterpret_cast<float*>(take(p.dv.data != nullptr ? keys : 0));
  return shared;
}

// Scratch of one worker.
struct Scratch {
  float *k, *v;    // [span / kLanes, D, kLanes]
  float* k_rows;   // [span, panel_stride(D)]
  float *q, *d_o;  // [kQueries, panel_stride(D)]
  float *s, *t;    // [kQueries, kLanes]
};

int64_t scratch_bytes(const Params& p, const Plan& plan) {
#if ZSVR_ISA_LEVEL >= 3
  if (p.dtype == DType::kBFloat16) return PairPanels::bytes(p.D, plan.span);
#endif
  return 4 * (2 * p.D * plan.span + (plan.span + 2 * kQueries) * panel_stride(p.D) +
              2 * kQueries * kLanes);
}

Scratch scratch_of(const Params& p, const Plan& plan, char* base, int worker) {
  float* next = reinterpret_cast<float*>(base + worker * scratch_bytes(p, plan));
  const auto take = [&next](int64_t count) {
    float* result = next;
    next += count;
    return result;
  };
  Scratch scratch;
  scratch.k = take(p.D * plan.span);
  scratch.v = take(p.D * plan.span);
  scratch.k_rows = take(plan.span * panel_stride(p.D));
  scratch.q = take(kQueries * panel_stride(p.D));
  scratch.d_o = take(kQueries * panel_stride(p.D));
  scratch.s = take(kQueries * kLanes);
  scratch.t = take(kQueries * kLanes);
  return scratch;
}

// Row i in the order (source - i) mod Tk, so that a round meets many source frames even where rows are equal.
void order_columns(const Params& p, const Shared& shared) {
  for (int64_t j = 0; j < p.Tk; ++j) shared.first[j] = static_cast<int32_t>(p.R);
  for (int64_t i = 0; i < p.T; ++i) {
    int64_t count = 0;
    const auto distance = [&](int64_t j) { return (j - i % p.Tk + p.Tk) % p.Tk; };
    for (int64_t r = 0; r < p.R; ++r) {
      const int32_t j = p.frames[i * p.R + r];
      if (j < 0) continue;
      int64_t at = count++;
      for (; at > 0 && distance(shared.columns[(at - 1) * p.T + i]) > distance(j); --at) {
        shared.columns[at * p.T + i] = shared.columns[(at - 1) * p.T + i];
      }
      shared.columns[at * p.T + i] = j;
    }
    for (; count < p.R; ++count) shared.columns[count * p.T + i] = -1;
  }
  for (int64_t n = p.R * p.T - 1; n >= 0; --n) {
    if (shared.columns[n] >= 0) shared.first[shared.columns[n]] = static_cast<int32_t>(n / p.T);
  }
}

// a[n] . b[n] of up to kWidth rows, summed in score_block's order: where one key takes all, o is its value, and
// dO.o cancels dO.v with all its rounding.
template <class Scalar>
Vec dots(const Scalar* a, int64_t stride_a, const Scalar* b, int64_t stride_b, int count, int D) {
  const int chain = chain_length(D);
  Vec total = zero(), sum = zero();
  int left = chain;
  for (int c = 0; c < D; c += kWidth) {
    const int channels = D - c < kWidth ? D - c : kWidth;
    Vec x[kWidth], y[kWidth];
    for (int n = 0; n < kWidth; ++n) {
      x[n] = n < count ? load_first(a + n * stride_a + c, channels) : zero();
      y[n] = n < count ? load_first(b + n * stride_b + c, channels) : zero();
    }
    transpose(x);
    transpose(y);
    for (int n = 0; n < channels; ++n) {
      sum = fma(x[n], y[n], sum);
      if (--left > 0) continue;
      total = total + sum;
      sum = zero();
      left = chain;
    }
  }
  return total + sum;
}

template <class Scalar>
void prepare(const Params& p, const Shared& shared, int64_t b, int64_t i) {
  for (int64_t h = 0; h < p.H; ++h) {
    const int64_t row = ((b * p.H + h) * p.T + i) * p.P;
    for (int64_t site = 0; site < p.P; site += kWidth) {
      const int count = p.P - site < kWidth ? static_cast<int>(p.P - site) : kWidth;
      const Vec product =
          dots(p.d_o.at<Scalar>(b, i, site, h), p.d_o.stride_p, p.o.at<Scalar>(b, i, site, h),
               p.o.stride_p, count, static_cast<int>(p.D));
      for (int n = 0; n < count; ++n) {
        const int64_t at = ((b * p.T + i) * p.P + site + n) * p.H + h;
        shared.delta[row + site + n] = product[n] - (p.dlse != nullptr ? p.dlse[at] : 0.0f);
        shared.lse[row + site + n] = p.lse[at];
      }
    }
  }
}

// P into s, and dS into t where it is wanted, of `count` queries by a block of keys.
template <int kVec>
void weigh(const Params& p, const Scratch& scratch, const float* k, const float* v,
           const float* lse, const float* delta, int count) {
  const int D = static_cast<int>(p.D);
  const bool scores = wants_scores(p);
  RowsAhead none;
  score_block<kVec>(scratch.q, count, k, D, scratch.s, nullptr, none);
  if (scores) score_block<kVec>(scratch.d_o, count, v, D, scratch.t, nullptr, none);
  for (int n = 0; n < count; ++n) {
    const Vec top = broadcast(lse[n]), mean = broadcast(delta[n]);
#pragma GCC unroll 4
    for (int w = 0; w < kVec; ++w) {
      float* s = scratch.s + n * kLanes + w * kWidth;
      float* t = scratch.t + n * kLanes + w * kWidth;
      const Vec probability = exp(load(s) - top);
      store(s, probability);
      if (scores) store(t, probability * (load(t) - mean));
    }
  }
}

template <class Scalar>
void differentiate(const Params& p, const Scratch& scratch, const BackwardTask& task) {
  const int D = static_cast<int>(p.D);
  const int64_t row = panel_stride(D);
  for (int at = 0; at < task.keys; at += kLanes) {
    const int count = task.keys - at < kLanes ? task.keys - at : kLanes;
    by_width(count, [&](auto width) {
      pack_transposed(p.k.at<Scalar>(task.b, task.j, task.key + at, task.h), p.k.stride_p, count,
                      width.count, D, 1.0f, scratch.k + at * D);
      pack_transposed(p.v.at<Scalar>(task.b, task.j, task.key + at, task.h), p.v.stride_p, count,
                      width.count, D, 1.0f, scratch.v + at * D);
    });
  }
  if (task.dq != nullptr) {
    copy_rows(p.k.at<Scalar>(task.b, task.j, task.key, task.h), p.k.stride_p, task.keys, D,
              scratch.k_rows);
  }
  bool first = task.first_of_keys;
  for (int64_t i = 0; i < p.T; ++i) {
    if (task.column[i] != task.j) continue;
    const int64_t fields = i * p.P + task.query;
    for (int n = 0; n < task.queries; n += kQueries, first = false) {
      const int count = task.queries - n < kQueries ? task.queries - n : kQueries;
      copy_rows(p.q.at<Scalar>(task.b, i, task.query + n, task.h), p.q.stride_p, count, D,
                scratch.q, p.scale);  // as in the forward: its scores, bit by bit
      copy_rows(p.d_o.at<Scalar>(task.b, i, task.query + n, task.h), p.d_o.stride_p, count, D,
                scratch.d_o);
      for (int at = 0; at < task.keys; at += kLanes) {
        const int keys = task.keys - at < kLanes ? task.keys - at : kLanes;
        by_width(keys, [&](auto width) {
          constexpr int kVec = width.count;
          weigh<kVec>(p, scratch, scratch.k + at * D, scratch.v + at * D, task.lse + fields + n,
                      task.delta + fields + n, count);
          if (task.dv != nullptr) {
            accumulate_block<kVec, Keep::kAll>(scratch.d_o, count, scratch.s, D, first, nullptr,
                                               task.dv + at * D);
          }
          if (task.dk != nullptr) {
            accumulate_block<kVec, Keep::kAll>(scratch.q, count, scratch.t, D, first, nullptr,
                                               task.dk + at * D);
          }
        });
        if (task.dq == nullptr) continue;
        multiply_block(scratch.t, count, keys, scratch.k_rows + at * row, row, D,
                       task.first_of_queries && at == 0, task.dq + (fields + n) * task.q_row,
                       task.q_row);
      }
    }
  }
}

template <class Scalar>
void write_queries(const Params& p, const Plan& plan, const float* sums, bool any, int64_t b,
                   int64_t i, int64_t h) {
  const Vec scale = broadcast(p.scale);
  for (int64_t site = 0; site < p.P; ++site) {
    const float* row = sums + (i * p.P + site) * plan.q_row;
    Scalar* target = p.dq.at<Scalar>(b, i, site, h);
    for (int64_t c = 0; c < p.D; c += kWidth) {
      const int lanes = p.D - c < kWidth ? static_cast<int>(p.D - c) : kWidth;
      const Vec value = any ? load(row + c) * scale : zero();
      store_first(target + c, p.adds ? load_first(target + c, lanes) + value : value, lanes);
    }
  }
}

template <class Scalar>
void write_keys(const Params& p, const Plan& plan, const float* sums, float factor, bool any,
                bool adds, const Tokens& target, int64_t b, int64_t j, int64_t h) {
  if (adds && !any) return;
  float factors[kLanes];
  for (int n = 0; n < kLanes; ++n) factors[n] = factor;
  const float* packed = sums + j * plan.spans * plan.span * p.D;
  for (int64_t site = 0; site < p.P; site += kLanes, packed += p.D * kLanes) {
    const int count = static_cast<int>(p.P - site < kLanes ? p.P - site : kLanes);
    if (adds) {
      float rows[kLanes * kLargestHeadDim];
      unpack_transposed(packed, factors, count, (count + kWidth - 1) / kWidth,
                        static_cast<int>(p.D), rows, p.D);
      for (int n = 0; n < count; ++n) {
        Scalar* to = target.at<Scalar>(b, j, site + n, h);
        for (int64_t c = 0; c < p.D; c += kWidth) {
          const int lanes = p.D - c < kWidth ? static_cast<int>(p.D - c) : kWidth;
          store_first(to + c, load_first(to + c, lanes) + load_first(rows + n * p.D + c, lanes),
                      lanes);
        }
      }
      continue;
    }
    if (any) {
      unpack_transposed(packed, factors, count, (count + kWidth - 1) / kWidth,
                        static_cast<int>(p.D), target.at<Scalar>(b, j, site, h), target.stride_p);
      continue;
    }
    for (int n = 0; n < count; ++n) {
      for (int64_t c = 0; c < p.D; ++c) {
        target.at<Scalar>(b, j, site + n, h)[c] = from_float<Scalar>(0.0f);
      }
    }
  }
}

template <class Scalar>
void run(const Params& p, const Executor& executor) {
  const Plan plan = plan_of(p, executor.threads);
  const Shared shared = shared_of(p, plan);
  char* scratches = static_cast<char*>(p.workspace) + shared_bytes(p, plan);
  order_columns(p, shared);
  run_tasks(executor, p.B * p.T,
            [&](int64_t task, int) { prepare<Scalar>(p, shared, task / p.T, task % p.T); });
  for (int64_t group = 0; group < p.B * p.H; group += plan.heads) {
    const int64_t heads = p.B * p.H - group < plan.heads ? p.B * p.H - group : plan.heads;
    for (int64_t r = 0; r < p.R; ++r) {
      const int32_t* column = shared.columns + r * p.T;
      for (int64_t turn = 0; turn < plan.spans; ++turn) {
        run_tasks(executor, heads * p.Tk * plan.spans, [&](int64_t index, int worker) {
          const int64_t part = index % plan.spans;
          const int64_t head = index / plan.spans / p.Tk;
          BackwardTask task;
          task.j = index / plan.spans % p.Tk;
          bool read = false;
          for (int64_t i = 0; i < p.T; ++i) read = read || column[i] == task.j;
          if (!read) return;
          task.b = (group + head) / p.H;
          task.h = (group + head) % p.H;
          task.key = part * plan.span;
          task.query = (part + turn) % plan.spans * plan.span;
          const auto sites = [&](int64_t from) {
            return static_cast<int>(p.P - from < plan.span ? p.P - from : plan.span);
          };
          task.keys = sites(task.key);
          task.queries = sites(task.query);
          task.column = column;
          task.lse = shared.lse + (task.b * p.H + task.h) * p.T * p.P;
          task.delta = shared.delta + (task.b * p.H + task.h) * p.T * p.P;
          task.q_row = plan.q_row;
          const int64_t at = head * plan.kv_sum + (task.j * plan.spans + part) * plan.span * p.D;
          task.dq = p.dq.data != nullptr ? shared.dq + head * plan.q_sum : nullptr;
          task.dk = p.dk.data != nullptr ? shared.dk + at : nullptr;
          task.dv = p.dv.data != nullptr ? shared.dv + at : nullptr;
          task.first_of_queries = r == 0 && turn == 0;
          task.first_of_keys = r == shared.first[task.j] && turn == 0;
#if ZSVR_ISA_LEVEL >= 3
          if constexpr (kPairs<Scalar>) {
            char* base = scratches + worker * scratch_bytes(p, plan);
            return differentiate_pairs(p, PairPanels(p.D, plan.span, base), task);
          }
#endif
          differentiate<Scalar>(p, scratch_of(p, plan, scratches, worker), task);
        });
      }
    }
    run_tasks(executor, heads * (p.T + p.Tk), [&](int64_t index, int) {
      const int64_t head = index / (p.T + p.Tk), t = index % (p.T + p.Tk);
      const int64_t b = (group + head) / p.H, h = (group + head) % p.H;
      if (t < p.T) {
        if (p.dq.data == nullptr) return;
        return write_queries<Scalar>(p, plan, shared.dq + head * plan.q_sum, shared.columns[t] >= 0,
                                     b, t, h);
      }
      const int64_t j = t - p.T;
      const bool any = shared.first[j] < p.R;
      if (p.dk.data != nullptr) {
        // The vector form has scaled q already.
        write_keys<Scalar>(p, plan, shared.dk + head * plan.kv_sum, kPairs<Scalar> ? p.scale : 1.0f,
                           any, p.adds, p.dk, b, j, h);
      }
      if (p.dv.data != nullptr) {
        write_keys<Scalar>(p, plan, shared.dv + head * plan.kv_sum, 1.0f, any, false, p.dv, b, j,
                           h);
      }
    });
  }
}

}  // namespace

int64_t cross_frame_attention_bwd_workspace(const CrossFrameAttentionBackwardParams& params,
                                            int threads) {
  const Plan plan = plan_of(params, threads);
  return shared_bytes(params, plan) + threads * scratch_bytes(params, plan);
}

Status cross_frame_attention_bwd(const CrossFrameAttentionBackwardParams& params,
                                 const Executor& executor) {
  by_dtype(params.dtype, [&](auto value) { run<decltype(value)>(params, executor); });
  return ok_status();
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
