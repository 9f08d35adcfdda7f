// Computes: nothing of use; keeps one execution unit, or one level of memory, busy.
// Tasks: one per worker.
// Tiles: kChains independent accumulators hide the latency of a multiply-add on both its ports.
// Traffic: none, or `floats` floats per pass.
// Numerics: accumulators converge to 1; no denormals.
#include "probes/probes.h"
#include "zsvr/simd.h"

namespace zsvr {
namespace ZSVR_ISA {

inline constexpr int kChains = 12;
inline constexpr int kInner = 64;

ZSVR_INLINE float lane_sum(const Vec* values, int count) {
  Vec total = zero();
  for (int i = 0; i < count; ++i) total = total + values[i];
  float result = 0.0f;
  for (int lane = 0; lane < kWidth; ++lane) result += total[lane];
  return result;
}

static float run_fma(int64_t iterations) {
  Vec factor = broadcast(0.5f), summand = broadcast(0.5f);
  Vec sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = broadcast(1.0f + 0.01f * static_cast<float>(i));
  for (int64_t n = 0; n < iterations * kInner; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) sums[i] = sums[i] * factor + summand;
  }
  return lane_sum(sums, kChains);
}

#if ZSVR_ISA_LEVEL >= 3
static float run_dot_bf16(int64_t iterations) {
  const __m512bh factor = (__m512bh)_mm512_set1_epi32(0x3f003f00);  // 0.5, 0.5
  Vec sums[kChains];
  for (int i = 0; i < kChains; ++i) sums[i] = zero();
  for (int64_t n = 0; n < iterations * kInner; ++n) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = (Vec)_mm512_dpbf16_ps((__m512)sums[i], factor, factor);
    }
  }
  return lane_sum(sums, kChains);
}
#endif

#if ZSVR_ISA_LEVEL >= 4
struct TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};
static_assert(sizeof(TileConfig) == 64);

static float run_tile_bf16(int64_t iterations) {
  alignas(64) TileConfig config;
  for (int tile = 0; tile < 8; ++tile) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = 16;
  }
  _tile_loadconfig(&config);
  alignas(64) uint16_t ones[16][32];
  for (auto& row : ones) {
    for (auto& x : row) x = 0x3f80;  // 1.0
  }
  _tile_loadd(6, ones, 64);
  _tile_loadd(7, ones, 64);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t n = 0; n < iterations; ++n) {
    _tile_dpbf16ps(0, 6, 7);
    _tile_dpbf16ps(1, 6, 7);
    _tile_dpbf16ps(2, 6, 7);
    _tile_dpbf16ps(3, 6, 7);
  }
  alignas(64) float result[16][16];
  _tile_stored(3, result, 64);
  _tile_release();
  return result[0][0];
}
#endif

static float run_read(const float* data, int64_t floats, int64_t iterations) {
  constexpr int kLoads = 8;
  Vec sums[kLoads];
  for (auto& sum : sums) sum = zero();
  for (int64_t n = 0; n < iterations; ++n) {
    for (int64_t at = 0; at < floats; at += kLoads * kWidth) {
#pragma GCC unroll 8
      for (int i = 0; i < kLoads; ++i) sums[i] = sums[i] + load(data + at + i * kWidth);
    }
    __asm__ volatile("" ::: "memory");  // the next pass reads again
  }
  return lane_sum(sums, kLoads);
}

Status probe(const ProbeParams& p, const Executor& executor, int64_t* work) {
  int64_t unit = 0;  // work of one iteration of one worker
  switch (p.probe) {
    case Probe::kFma:
      unit = int64_t{2} * kInner * kChains * kWidth;
      break;
    case Probe::kDotBf16:
      unit = ZSVR_ISA_LEVEL >= 3 ? int64_t{4} * kInner * kChains * kWidth : 0;
      break;
    case Probe::kTileBf16:
      unit = ZSVR_ISA_LEVEL >= 4 ? int64_t{4} * 2 * 16 * 16 * 32 : 0;
      break;
    case Probe::kRead:
      unit = p.floats * 4;
      break;
  }
  if (unit == 0) {
    return make_status(StatusCode::kUnsupported, "probe: this instruction set has no bf16 product");
  }
  run_tasks(executor, executor.threads, [&](int64_t task, int) {
    switch (p.probe) {
      case Probe::kFma:
        p.sink[task] = run_fma(p.iterations);
        return;
      case Probe::kRead:
        p.sink[task] = run_read(p.data + task * p.floats, p.floats, p.iterations);
        return;
#if ZSVR_ISA_LEVEL >= 3
      case Probe::kDotBf16:
        p.sink[task] = run_dot_bf16(p.iterations);
        return;
#endif
#if ZSVR_ISA_LEVEL >= 4
      case Probe::kTileBf16:
        p.sink[task] = run_tile_bf16(p.iterations);
        return;
#endif
      default:
        return;
    }
  });
  *work = unit * p.iterations * executor.threads;
  return ok_status();
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
