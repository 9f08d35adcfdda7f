// Cross-frame attention on the CPU: softmax attention of every frame's tokens over listed frames' tokens.
//
//   z[r,n] = scale * q[b,i,p,h] . k[b,frames[i,r],n,h]       lse = ln sum exp z       o = sum exp(z - lse) v
//
// A row without a present entry gives o = 0, lse = -inf, zero gradients. Duplicates count.
#pragma once

#include "zsvr/isa.h"
#include "zsvr/parallel.h"
#include "zsvr/params.h"
#include "zsvr/status.h"

namespace zsvr {

struct CrossFrameAttentionParams {
  int64_t B = 0, T = 0, Tk = 0, P = 0, H = 0, D = 0, R = 0;
  DType dtype = DType::kFloat32;
  float scale = 0.0f;
  ConstTokens q;                    // [B, T, P, H, D]
  ConstTokens k, v;                 // [B, Tk, P, H, D]
  const int32_t* frames = nullptr;  // [T, R] dense; -1 absent, else < Tk
  Tokens o;                         // [B, T, P, H, D]
  float* lse = nullptr;             // [B, T, P, H] dense, natural log
  void* workspace = nullptr;        // cross_frame_attention_fwd_workspace() bytes, 64-byte aligned
};

inline constexpr int kLargestHeadDim = 256;

struct CrossFrameAttentionBackwardParams {
  int64_t B = 0, T = 0, Tk = 0, P = 0, H = 0, D = 0, R = 0;
  DType dtype = DType::kFloat32;
  float scale = 0.0f;
  ConstTokens q, k, v, o, d_o;      // as forward; d_o is the gradient of o, same dtype
  const int32_t* frames = nullptr;  // [T, R] dense
  const float* lse = nullptr;       // [B, T, P, H] dense
  const float* dlse = nullptr;      // [B, T, P, H] dense, or nullptr for zero
  Tokens dq, dk, dv;                // written in full; data == nullptr: not wanted
  bool adds = false;                // dq and dk are added to what is there
  void* workspace = nullptr;        // cross_frame_attention_bwd_workspace() bytes, 64-byte aligned
};

// Refuses sizes, head dims and frame indices the kernels do not take. The launchers call it first.
Status check(const CrossFrameAttentionParams& params);
Status check(const CrossFrameAttentionBackwardParams& params);

// Scratch bytes for a launch with `threads` workers at the active instruction set.
int64_t cross_frame_attention_fwd_workspace(const CrossFrameAttentionParams& params, int threads);
int64_t cross_frame_attention_bwd_workspace(const CrossFrameAttentionBackwardParams& params,
                                            int threads);

Status cross_frame_attention_fwd(const CrossFrameAttentionParams& params, const Executor& executor);
Status cross_frame_attention_bwd(const CrossFrameAttentionBackwardParams& params,
                                 const Executor& executor);

ZSVR_DECLARE_ISA(
    int64_t cross_frame_attention_fwd_workspace(const CrossFrameAttentionParams& params,
                                                int threads);
    int64_t cross_frame_attention_bwd_workspace(const CrossFrameAttentionBackwardParams& params,
                                                int threads);
    Status cross_frame_attention_fwd(const CrossFrameAttentionParams& params,
                                     const Executor& executor);
    Status cross_frame_attention_bwd(const CrossFrameAttentionBackwardParams& params,
                                     const Executor& executor);)

}  // namespace zsvr
