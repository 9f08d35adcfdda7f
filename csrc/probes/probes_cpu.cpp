// Checks, then hands over to the probe compiled for the active instruction set.
#include "probes/probes.h"

namespace zsvr {

Status probe(const ProbeParams& params, const Executor& executor, int64_t* work) {
  const auto kind = static_cast<int32_t>(params.probe);
  if (kind < 0 || kind > 3) {
    return make_status(StatusCode::kInvalidArgument, "probe: unknown probe %d", (int)kind);
  }
  if (params.iterations < 1 || params.sink == nullptr) {
    return make_status(StatusCode::kInvalidArgument,
                       "probe: needs iterations of at least 1 and a sink, got %lld",
                       (long long)params.iterations);
  }
  if (params.probe == Probe::kRead &&
      (params.data == nullptr || params.floats < 128 || params.floats % 128 != 0)) {
    return make_status(StatusCode::kInvalidArgument,
                       "probe: reads need data of a multiple of 128 floats, got %lld",
                       (long long)params.floats);
  }
  ZSVR_DISPATCH(probe(params, executor, work))
}

}  // namespace zsvr
