// The four corners of a bilinear sample and their weights. Included by every translation unit of the operator,
// so everything here is forced inline.
#pragma once

#include <cstdint>

namespace zsvr {

// Corners with weight zero are left out: 1 at integer positions, 2 on grid lines, else 4.
struct Cell {
  int corners;
  int64_t site[4];
  float weight[4];
};

// The unclamped coordinate of which x is the clamped value decides whether a gradient passes.
struct Located {
  int64_t x0, y0, x1, y1;
  float fx, fy;
};

// NaN becomes 0.
inline __attribute__((always_inline)) float clamp_coordinate(float x, float last) {
  return x > 0.0f ? (x < last ? x : last) : 0.0f;
}

inline __attribute__((always_inline)) Located locate(const float* position, int64_t Hg,
                                                     int64_t Wg) {
  const float x = clamp_coordinate(position[0], static_cast<float>(Wg - 1));
  const float y = clamp_coordinate(position[1], static_cast<float>(Hg - 1));
  Located at;
  at.x0 = static_cast<int64_t>(x);
  at.y0 = static_cast<int64_t>(y);
  at.fx = x - static_cast<float>(at.x0);
  at.fy = y - static_cast<float>(at.y0);
  at.x1 = at.x0 + 1 < Wg ? at.x0 + 1 : Wg - 1;
  at.y1 = at.y0 + 1 < Hg ? at.y0 + 1 : Hg - 1;
  return at;
}

inline __attribute__((always_inline)) Cell cell_of(const float* position, int64_t Hg, int64_t Wg) {
  const Located at = locate(position, Hg, Wg);
  const bool right = at.fx > 0.0f, below = at.fy > 0.0f;
  Cell cell;
  cell.corners = 1;
  cell.site[0] = at.y0 * Wg + at.x0;
  cell.weight[0] = (1.0f - at.fx) * (1.0f - at.fy);
  if (right) {
    cell.site[cell.corners] = at.y0 * Wg + at.x1;
    cell.weight[cell.corners++] = at.fx * (1.0f - at.fy);
  }
  if (below) {
    cell.site[cell.corners] = at.y1 * Wg + at.x0;
    cell.weight[cell.corners++] = (1.0f - at.fx) * at.fy;
  }
  if (right && below) {
    cell.site[cell.corners] = at.y1 * Wg + at.x1;
    cell.weight[cell.corners++] = at.fx * at.fy;
  }
  return cell;
}

}  // namespace zsvr
