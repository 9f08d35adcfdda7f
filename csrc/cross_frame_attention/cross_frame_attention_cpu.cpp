// Checks, then hands over to the kernels compiled for the active instruction set.
#include "cross_frame_attention/cross_frame_attention.h"

namespace zsvr {
namespace {

template <class Params>
Status check_common(const Params& p) {
  if (p.B < 0 || p.T < 1 || p.Tk < 1 || p.P < 1 || p.H < 1 || p.R < 1) {
    return make_status(StatusCode::kInvalidArgument,
                       "cross_frame_attention: sizes must be positive, got B=%lld T=%lld Tk=%lld "
                       "P=%lld H=%lld R=%lld",
                       (long long)p.B, (long long)p.T, (long long)p.Tk, (long long)p.P,
                       (long long)p.H, (long long)p.R);
  }
  if (p.D < 8 || p.D > kLargestHeadDim || p.D % 8 != 0) {
    return make_status(
        StatusCode::kUnsupported,
        "cross_frame_attention: head dim must be a multiple of 8 in 8..256, got %lld",
        (long long)p.D);
  }
  for (int64_t i = 0; i < p.T * p.R; ++i) {
    if (p.frames[i] < -1 || p.frames[i] >= p.Tk) {
      return make_status(StatusCode::kInvalidArgument,
                         "cross_frame_attention: frames[%lld, %lld] = %d is outside -1..%lld",
                         (long long)(i / p.R), (long long)(i % p.R), (int)p.frames[i],
                         (long long)(p.Tk - 1));
    }
  }
  return ok_status();
}

}  // namespace

Status check(const CrossFrameAttentionParams& params) { return check_common(params); }
Status check(const CrossFrameAttentionBackwardParams& params) { return check_common(params); }

int64_t cross_frame_attention_fwd_workspace(const CrossFrameAttentionParams& params, int threads){
    ZSVR_DISPATCH(cross_frame_attention_fwd_workspace(params, threads))}

int64_t cross_frame_attention_bwd_workspace(const CrossFrameAttentionBackwardParams& params,
                                            int threads){
    ZSVR_DISPATCH(cross_frame_attention_bwd_workspace(params, threads))}

Status
    cross_frame_attention_fwd(const CrossFrameAttentionParams& params, const Executor& executor) {
  if (const Status status = check(params); !status.ok()) return status;
  ZSVR_DISPATCH(cross_frame_attention_fwd(params, executor))
}

Status cross_frame_attention_bwd(const CrossFrameAttentionBackwardParams& params,
                                 const Executor& executor) {
  if (const Status status = check(params); !status.ok()) return status;
  ZSVR_DISPATCH(cross_frame_attention_bwd(params, executor))
}

}  // namespace zsvr
