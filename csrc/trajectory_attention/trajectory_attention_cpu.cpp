// Checks and dispatch, and the inverse index of the corner gather.
#include "trajectory_attention/cell.h"
#include "trajectory_attention/trajectory_attention.h"

namespace zsvr {
namespace {

constexpr int64_t kMaxSamples = int64_t{1} << 31;

Status invalid(const char* what, int64_t got) {
  return make_status(StatusCode::kInvalidArgument, "trajectory_attention: %s, got %lld", what,
                     (long long)got);
}

template <class Params>
Status check_trajectory(const Params& p) {
  if (p.Bp < 1) return invalid("the number of trajectory clips must be at least 1", p.Bp);
  if (p.T < 1) return invalid("T must be at least 1", p.T);
  if (p.Tk < 1) return invalid("k and v must have at least 1 frame", p.Tk);
  if (p.Hg < 1) return invalid("Hg must be at least 1", p.Hg);
  if (p.Wg < 1) return invalid("Wg must be at least 1", p.Wg);
  if (p.Hg > (1 << 24) || p.Wg > (1 << 24)) {
    return invalid("grid sides must be at most 2^24 (float32 positions)",
                   p.Hg > p.Wg ? p.Hg : p.Wg);
  }
  if (p.L < 1) return invalid("trajectories need at least 1 slot", p.L);
  for (int64_t n = 0; n < p.T * p.L; ++n) {
    if (p.frames[n] < -1 || p.frames[n] >= p.Tk) {
      return make_status(StatusCode::kInvalidArgument,
                         "trajectory_attention: frames[%lld, %lld] = %d is outside -1..%lld",
                         (long long)(n / p.L), (long long)(n % p.L), (int)p.frames[n],
                         (long long)(p.Tk - 1));
    }
  }
  return ok_status();
}

template <class Params>
Status check_attention(const Params& p) {
  if (const Status status = check_trajectory(p); !status.ok()) return status;
  if (p.B < 0 || p.B % p.Bp != 0) {
    return invalid("B must be a multiple of the trajectories' clips", p.B);
  }
  if (p.H < 1) return invalid("H must be at least 1", p.H);
  if (p.D < 8 || p.D > 256 || p.D % 8 != 0) {
    return make_status(StatusCode::kUnsupported,
                       "trajectory_attention: head dim must be a multiple of 8 in 8..256, got %lld",
                       (long long)p.D);
  }
  return ok_status();
}

// Calls visit(sample, cell) for every live sample of source frame j of clip bp, in order of samples.
template <class Visit>
void for_each_sample(const TrajectoryInverseParams& p, int64_t bp, int64_t j, Visit visit) {
  const int64_t P = p.Hg * p.Wg;
  for (int64_t slot = 0; slot < p.T * p.L; ++slot) {
    if (p.frames[slot] != j) continue;
    const int64_t base = (bp * p.T * p.L + slot) * P;
    for (int64_t site = 0; site < P; ++site) {
      if (p.valid[base + site] == 0) continue;
      visit(slot * P + site, cell_of(p.positions + 2 * (base + site), p.Hg, p.Wg));
    }
  }
}

}  // namespace

Status check(const TrajectoryAttentionParams& params) { return check_attention(params); }

Status check(const TrajectoryInverseParams& p) {
  if (const Status status = check_trajectory(p); !status.ok()) return status;
  if (p.T * p.L * p.Hg * p.Wg >= kMaxSamples) {
    return invalid("the backward takes T*L*P below 2^31 samples; chain links with a window",
                   p.T * p.L * p.Hg * p.Wg);
  }
  return ok_status();
}

Status check(const TrajectoryAttentionBackwardParams& p) {
  if (const Status status = check_attention(p); !status.ok()) return status;
  const bool wants_sources = p.dk.data != nullptr || p.dv.data != nullptr;
  if (wants_sources &&
      p.offsets == nullptr) {  // samples and weights are null where nothing is live
    return make_status(StatusCode::kInvalidArgument,
                       "trajectory_attention: dk and dv need the inverse index");
  }
  return ok_status();
}

Status trajectory_inverse_count(const TrajectoryInverseParams& p, const Executor& executor) {
  if (const Status status = check(p); !status.ok()) return status;
  const int64_t P = p.Hg * p.Wg;
  run_tasks(executor, p.Bp * p.Tk, [&](int64_t row, int) {
    int64_t* counts = p.offsets + row * P + 1;
    for (int64_t site = 0; site < P; ++site) counts[site] = 0;
    for_each_sample(p, row / p.Tk, row % p.Tk, [&](int64_t, const Cell& cell) {
      for (int c = 0; c < cell.corners; ++c) ++counts[cell.site[c]];
    });
  });
  p.offsets[0] = 0;
  for (int64_t row = 0; row < p.Bp * p.Tk * P; ++row) p.offsets[row + 1] += p.offsets[row];
  return ok_status();
}

Status trajectory_inverse_fill(const TrajectoryInverseParams& p, const Executor& executor) {
  if (const Status status = check(p); !status.ok()) return status;
  const int64_t P = p.Hg * p.Wg;
  run_tasks(executor, p.Bp * p.Tk, [&](int64_t row, int) {
    // The offsets of this source frame serve as cursors; each ends where the next row starts.
    int64_t* cursor = p.offsets + row * P;
    const int64_t start = cursor[0];
    for_each_sample(p, row / p.Tk, row % p.Tk, [&](int64_t sample, const Cell& cell) {
      for (int c = 0; c < cell.corners; ++c) {
        const int64_t at = cursor[cell.site[c]]++;
        p.samples[at] = static_cast<int32_t>(sample);
        p.weights[at] = cell.weight[c];
      }
    });
    for (int64_t site = P - 1; site > 0; --site) cursor[site] = cursor[site - 1];
    cursor[0] = start;
  });
  return ok_status();
}

int64_t trajectory_attention_fwd_workspace(const TrajectoryAttentionParams& params, int threads){
    ZSVR_DISPATCH(trajectory_attention_fwd_workspace(params, threads))}

int64_t trajectory_attention_bwd_workspace(const TrajectoryAttentionBackwardParams& params,
                                           int threads){
    ZSVR_DISPATCH(trajectory_attention_bwd_workspace(params, threads))}

Status trajectory_attention_fwd(const TrajectoryAttentionParams& params, const Executor& executor) {
  if (const Status status = check(params); !status.ok()) return status;
  ZSVR_DISPATCH(trajectory_attention_fwd(params, executor))
}

Status trajectory_attention_bwd(const TrajectoryAttentionBackwardParams& params,
                                const Executor& executor) {
  if (const Status status = check(params); !status.ok()) return status;
  ZSVR_DISPATCH(trajectory_attention_bwd(params, executor))
}

}  // namespace zsvr
