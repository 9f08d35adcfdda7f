// Chains adjacent-frame links into trajectories, on the CPU.
#pragma once

#include "zsvr/parallel.h"
#include "zsvr/params.h"
#include "zsvr/status.h"

namespace zsvr {

struct ChainLinksParams {
  int64_t B = 0, T = 0, Hg = 0, Wg = 0;
  int64_t window = -1;  // -1: L = T slots, slot l is frame l; w: L = 2w+1, slot l is i-w+l
  bool round_to_nearest = false;  // every link position becomes floor(position + 0.5)
  bool check_corners = false;     // link rule 'corners': all corners of non-zero weight valid
  const float* forward =
      nullptr;  // [B, T-1, P, 2] dense, position in frame i+1 of site p of frame i
  const float* backward =
      nullptr;  // [B, T-1, P, 2] dense, position in frame i of site p of frame i+1
  const uint8_t* valid_forward = nullptr;   // [B, T-1, P] dense
  const uint8_t* valid_backward = nullptr;  // [B, T-1, P] dense
  float* positions = nullptr;               // [B, T, L, P, 2] dense
  uint8_t* valid = nullptr;                 // [B, T, L, P] dense
};

Status chain_links(const ChainLinksParams& params, const Executor& executor);

}  // namespace zsvr
