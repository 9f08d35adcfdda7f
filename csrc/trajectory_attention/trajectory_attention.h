// Trajectory attention on the CPU: every query attends to bilinear samples of K and V along its trajectory.
//
//   slot l is live iff frames[i,l] >= 0 and valid[b,i,l,p]; j = frames[i,l]; (x, y) = positions[b,i,l,p]
//   K_l = S(k[b,j,:,h]; x, y)   z_l = scale * q . K_l   lse = ln sum_live exp z_l   o = sum exp(z_l - lse) V_l
//
// S clamps to the border and blends four corners. No live slot: o = 0, lse = -inf, zero gradients.
// One live slot: o = V_l exactly. Clip b reads entry b mod Bp of positions and valid.
#pragma once

#include "zsvr/isa.h"
#include "zsvr/parallel.h"
#include "zsvr/params.h"
#include "zsvr/status.h"

namespace zsvr {

struct TrajectoryAttentionParams {
  int64_t B = 0, Bp = 0, T = 0, Tk = 0, Hg = 0, Wg = 0, H = 0, D = 0, L = 0;  // P = Hg * Wg
  DType dtype = DType::kFloat32;
  float scale = 0.0f;
  ConstTokens q;     // [B, T, P, H, D]
  ConstTokens k, v;  // [B, Tk, P, H, D]
  const float* positions =
      nullptr;                     // [Bp, T, L, P, 2] dense (x, y), token-grid pixels; may hold NaN
  const uint8_t* valid = nullptr;  // [Bp, T, L, P] dense, 0 or 1
  const int32_t* frames = nullptr;  // [T, L] dense; -1 absent, else < Tk
  Tokens o;                         // [B, T, P, H, D]
  float* lse = nullptr;             // [B, T, P, H] dense, natural log
  void* workspace = nullptr;        // trajectory_attention_fwd_workspace() bytes, 64-byte aligned
};

// Inverse of the corner gather: for each source site (bp, j, site), the samples that read it.
//   offsets [Bp * Tk * P + 1]; entries offsets[r] .. offsets[r+1] belong to row r = (bp * Tk + j) * P + site,
//   ordered by sample. sample = (i * L + l) * P + p within its bp. Corners of weight 0 and dead slots are
//   left out, corners that coincide after clamping are merged into one entry.
struct TrajectoryInverseParams {
  int64_t Bp = 0, T = 0, Tk = 0, Hg = 0, Wg = 0, L = 0;
  const float* positions = nullptr;  // [Bp, T, L, P, 2] dense
  const uint8_t* valid = nullptr;    // [Bp, T, L, P] dense
  const int32_t* frames = nullptr;   // [T, L] dense
  int64_t* offsets = nullptr;        // [Bp * Tk * P + 1], written by _count, read by _fill
  int32_t* samples = nullptr;        // [offsets[last]], written by _fill
  float* weights = nullptr;          // [offsets[last]], written by _fill
};

struct TrajectoryAttentionBackwardParams {
  int64_t B = 0, Bp = 0, T = 0, Tk = 0, Hg = 0, Wg = 0, H = 0, D = 0, L = 0;
  DType dtype = DType::kFloat32;
  float scale = 0.0f;
  ConstTokens q, k, v, d_o;          // as forward; d_o is the gradient of o, same dtype
  const float* positions = nullptr;  // [Bp, T, L, P, 2] dense
  const uint8_t* valid = nullptr;    // [Bp, T, L, P] dense
  const int32_t* frames = nullptr;   // [T, L] dense
  const float* lse = nullptr;        // [B, T, P, H] dense
  const float* dlse = nullptr;       // [B, T, P, H] dense, or nullptr for zero
  const int64_t* offsets = nullptr;  // inverse index; needed for dk, dv
  const int32_t* samples = nullptr;
  const float* weights = nullptr;
  Tokens dq, dk, dv;            // written in full; data == nullptr: not wanted
  float* dpositions = nullptr;  // [Bp, T, L, P, 2] dense, summed over clips; nullptr: not wanted
  void* workspace = nullptr;    // trajectory_attention_bwd_workspace() bytes, 64-byte aligned
};

Status check(const TrajectoryAttentionParams& params);
Status check(const TrajectoryInverseParams& params);
Status check(const TrajectoryAttentionBackwardParams& params);

int64_t trajectory_attention_fwd_workspace(const TrajectoryAttentionParams& params, int threads);
int64_t trajectory_attention_bwd_workspace(const TrajectoryAttentionBackwardParams& params,
                                           int threads);

Status trajectory_attention_fwd(const TrajectoryAttentionParams& params, const Executor& executor);
Status trajectory_inverse_count(const TrajectoryInverseParams& params, const Executor& executor);
Status trajectory_inverse_fill(const TrajectoryInverseParams& params, const Executor& executor);
Status trajectory_attention_bwd(const TrajectoryAttentionBackwardParams& params,
                                const Executor& executor);

ZSVR_DECLARE_ISA(int64_t trajectory_attention_fwd_workspace(const TrajectoryAttentionParams& params,
                                                            int threads);
                 int64_t trajectory_attention_bwd_workspace(
                     const TrajectoryAttentionBackwardParams& params, int threads);
                 Status trajectory_attention_fwd(const TrajectoryAttentionParams& params,
                                                 const Executor& executor);
                 Status trajectory_attention_bwd(const TrajectoryAttentionBackwardParams& params,
                                                 const Executor& executor);)

}  // namespace zsvr
