// Checks and dispatch.
#include "correspondence_search/correspondence_search.h"

namespace zsvr {
namespace {

template <class Params>
Status check_sizes(const char* op, const Params& p) {
  if (p.N < 0 || p.Hg < 1 || p.Wg < 1 || p.C < 1) {
    return make_status(StatusCode::kInvalidArgument,
                       "%s: sizes must be positive, got N=%lld C=%lld on a %lldx%lld grid", op,
                       (long long)p.N, (long long)p.C, (long long)p.Hg, (long long)p.Wg);
  }
  constexpr int64_t kSide = 1 << 24;
  if (p.Hg > kSide || p.Wg > kSide || p.Hg * p.Wg >= int64_t{1} << 31) {
    return make_status(StatusCode::kInvalidArgument,
                       "%s: grid sides must be at most 2^24 and sites below 2^31, got %lldx%lld",
                       op, (long long)p.Hg, (long long)p.Wg);
  }
  return ok_status();
}

}  // namespace

Status check(const CorrespondenceSearchParams& p) {
  if (const Status status = check_sizes("correspondence_search", p); !status.ok()) return status;
  if (p.radius < 0 || p.radius > 65535) {
    return make_status(StatusCode::kInvalidArgument,
                       "correspondence_search: the radius must be within 0..65535, got %lld",
                       (long long)p.radius);
  }
  return ok_status();
}

Status check(const LinkScoreParams& p) { return check_sizes("link_score", p); }

// Inverse lengths of f_dst, and room to read a whole vector from the last.
int64_t correspondence_search_workspace(const CorrespondenceSearchParams& p) {
  return 4 * (p.N * p.Hg * p.Wg + 16);
}

Status correspondence_search(const CorrespondenceSearchParams& params, const Executor& executor) {
  if (const Status status = check(params); !status.ok()) return status;
  ZSVR_DISPATCH(correspondence_search(params, executor))
}

Status link_score(const LinkScoreParams& params, const Executor& executor) {
  if (const Status status = check(params); !status.ok()) return status;
  ZSVR_DISPATCH(link_score(params, executor))
}

}  // namespace zsvr
