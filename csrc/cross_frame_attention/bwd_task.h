// What a task of the backward pass is; its two forms, vectors of float32 and pairs of bf16, include it.
#pragma once

#include "cross_frame_attention/cross_frame_attention.h"
#include "zsvr/simd.h"

namespace zsvr {
namespace ZSVR_ISA {
namespace {

constexpr int64_t kSpan = 256;  // keys, and queries, of a task; part of the order of sums
constexpr int kQueries = 96;    // rows of a panel

// The keys of a span of source frame j against one span of queries of every frame that reads j.
struct BackwardTask {
  int64_t b, h;
  int64_t j, key;  // source frame, first key
  int keys;
  int64_t query;  // first query
  int queries;
  const int32_t* column;     // [T]
  const float *lse, *delta;  // of the head: [T, P]
  float* dq;                 // of the head: [T, P, q_row]
  float *dk, *dv;            // of the key span: [span / kLanes, D, kLanes]
  int64_t q_row;             // floats of a row of dq
  bool first_of_queries;     // nothing was added to dq yet
  bool first_of_keys;        // nor to dk and dv
};

ZSVR_INLINE bool wants_scores(const CrossFrameAttentionBackwardParams& p) {
  return p.dk.data != nullptr || p.dq.data != nullptr;
}

}  // namespace
}  // namespace ZSVR_ISA
}  // namespace zsvr
