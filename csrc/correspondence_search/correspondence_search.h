// Correspondence search and link scores on the CPU: cosines between tokens of two frames.
//
//   cos(a, b) = a.b / (max(|a|, 1e-6) max(|b|, 1e-6))
//   search:  candidates are the sites of the grid at most `radius` away in x and in y from the centre, which is clamped
//            into the grid first; the largest cosine wins, of equals the lowest site, NaN never. Where no candidate has a
//            number: the lowest site of the window and -inf.
//   score:   cos(f_src[p], S(f_dst; positions[p])), S the bilinear sample with border clamp. NaN positions become 0.
#pragma once

#include "zsvr/isa.h"
#include "zsvr/parallel.h"
#include "zsvr/params.h"
#include "zsvr/status.h"

namespace zsvr {

// Features [N, P, C]. Strides count elements; C is dense.
struct ConstFeatures {
  const void* data = nullptr;
  int64_t stride_n = 0, stride_p = 0;

  template <class Scalar>
  const Scalar* at(int64_t n, int64_t p) const {
    return static_cast<const Scalar*>(data) + n * stride_n + p * stride_p;
  }
};

struct CorrespondenceSearchParams {
  int64_t N = 0, Hg = 0, Wg = 0, C = 0, radius = 0;  // P = Hg * Wg
  DType dtype = DType::kFloat32;
  ConstFeatures f_src, f_dst;       // [N, P, C]
  const int32_t* centre = nullptr;  // [N, P, 2] dense (x, y), any value
  int32_t* site = nullptr;          // [N, P] dense
  float* score = nullptr;           // [N, P] dense
  void* workspace = nullptr;        // correspondence_search_workspace() bytes, 64-byte aligned
};

struct LinkScoreParams {
  int64_t N = 0, Hg = 0, Wg = 0, C = 0;
  DType dtype = DType::kFloat32;
  ConstFeatures f_src, f_dst;        // [N, P, C]
  const float* positions = nullptr;  // [N, P, 2] dense (x, y), any value
  float* score = nullptr;            // [N, P] dense
};

Status check(const CorrespondenceSearchParams& params);
Status check(const LinkScoreParams& params);

int64_t correspondence_search_workspace(const CorrespondenceSearchParams& params);

Status correspondence_search(const CorrespondenceSearchParams& params, const Executor& executor);
Status link_score(const LinkScoreParams& params, const Executor& executor);

ZSVR_DECLARE_ISA(Status correspondence_search(const CorrespondenceSearchParams& params,
                                              const Executor& executor);
                 Status link_score(const LinkScoreParams& params, const Executor& executor);)

}  // namespace zsvr
