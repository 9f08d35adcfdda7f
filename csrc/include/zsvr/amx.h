// Matrix tiles (Intel AMX) for *_isa.cpp files; empty below that level.
//
// All eight tiles are 16 rows of 64 bytes: C is 16x16 float32, A is 16 rows of 32 bf16, and B holds
// pairs, B[k/2][2n + k%2]. multiply_tiles() adds A B to the accumulators 0..kTiles-1, one per group
// of 16 columns; it uses tile 4 for A and tiles 5 to 7 for B.
#pragma once

#include "zsvr/bf16_pairs.h"

#if ZSVR_ISA_LEVEL >= 4
namespace zsvr {
namespace ZSVR_ISA {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
static_assert(sizeof(TileConfig) == 64);

// Tiles belong to the thread for the lifetime of this object.
class TileScope {
 public:
  TileScope() {
    const TileConfig config;
    _tile_loadconfig(&config);
  }
  ~TileScope() { _tile_release(); }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
};

// The tile loads do not tell the compiler that they read memory.
ZSVR_INLINE void finish_stores() { __asm__ volatile("" ::: "memory"); }

template <int kTiles>
ZSVR_INLINE void zero_tiles() {
  _tile_zero(0);
  if constexpr (kTiles > 1) _tile_zero(1);
  if constexpr (kTiles > 2) _tile_zero(2);
  if constexpr (kTiles > 3) _tile_zero(3);
}

// c: [16, 16 * kTiles] float32, rows kLanes apart.
template <int kTiles>
ZSVR_INLINE void load_tiles(const float* c) {
  _tile_loadd(0, c, kLanes * 4);
  if constexpr (kTiles > 1) _tile_loadd(1, c + 16, kLanes * 4);
  if constexpr (kTiles > 2) _tile_loadd(2, c + 32, kLanes * 4);
  if constexpr (kTiles > 3) _tile_loadd(3, c + 48, kLanes * 4);
}

template <int kTiles>
ZSVR_INLINE void store_tiles(float* c) {
  _tile_stored(0, c, kLanes * 4);
  if constexpr (kTiles > 1) _tile_stored(1, c + 16, kLanes * 4);
  if constexpr (kTiles > 2) _tile_stored(2, c + 32, kLanes * 4);
  if constexpr (kTiles > 3) _tile_stored(3, c + 48, kLanes * 4);
}

// a: 16 rows of 32 bf16, `stride` bytes apart; b: [16, 16 * kTiles] pairs, rows kLanes pairs apart.
template <int kTiles>
ZSVR_INLINE void multiply_tiles(const void* a, int64_t stride, const uint32_t* b) {
  _tile_loadd(4, a, stride);
  _tile_loadd(5, b, kLanes * 4);
  _tile_dpbf16ps(0, 4, 5);
  if constexpr (kTiles > 1) {
    _tile_loadd(6, b + 16, kLanes * 4);
    _tile_dpbf16ps(1, 4, 6);
  }
  if constexpr (kTiles > 2) {
    _tile_loadd(7, b + 32, kLanes * 4);
    _tile_dpbf16ps(2, 4, 7);
  }
  if constexpr (kTiles > 3) {
    _tile_loadd(5, b + 48, kLanes * 4);
    _tile_dpbf16ps(3, 4, 5);
  }
}

}  // namespace ZSVR_ISA
}  // namespace zsvr
#endif
