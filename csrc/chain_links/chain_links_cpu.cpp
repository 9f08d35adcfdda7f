// Computes:  positions and validity of every token along its chain of links, forward and backward.
// Tasks:     (clip, start frame, direction, block of 1024 sites); a task owns its slots of those sites.
// Tiles:     the current position and liveness of a block stay on the stack while the frames go by.
// Traffic:   reads 4 corners of 8 bytes and 1 byte of validity per step (cache), writes 9 bytes per slot.
// Numerics:  float32, products and sums in the order of the reference, no contraction: bit-equal to it.
#include <cmath>
#include <cstring>

#include "chain_links/chain_links.h"

namespace zsvr {
namespace {

constexpr int64_t kBlock = 1024;

struct Cell {
  int64_t x0, y0, x1, y1;
  float fx, fy;
};

// Clamps so that NaN becomes 0; then x1, y1 are the next column and row, clamped.
inline float clamp_coordinate(float x, float last) {
  return x > 0.0f ? (x < last ? x : last) : 0.0f;
}

inline Cell locate(float x, float y, int64_t Hg, int64_t Wg) {
  const float cx = clamp_coordinate(x, static_cast<float>(Wg - 1));
  const float cy = clamp_coordinate(y, static_cast<float>(Hg - 1));
  Cell cell;
  cell.x0 = static_cast<int64_t>(cx);
  cell.y0 = static_cast<int64_t>(cy);
  cell.fx = cx - static_cast<float>(cell.x0);
  cell.fy = cy - static_cast<float>(cell.y0);
  cell.x1 = cell.x0 + 1 < Wg ? cell.x0 + 1 : Wg - 1;
  cell.y1 = cell.y0 + 1 < Hg ? cell.y0 + 1 : Hg - 1;
  return cell;
}

inline float rounded(float x) { return std::floor(x + 0.5f); }

struct Field {
  const float* links;    // [P, 2]
  const uint8_t* valid;  // [P]
  int64_t Hg, Wg;
  bool round_to_nearest;

  float displacement(int64_t x, int64_t y, int axis) const {
    const float position = links[2 * (y * Wg + x) + axis];
    return (round_to_nearest ? rounded(position) : position) -
           static_cast<float>(axis == 0 ? x : y);
  }

  float sample(const Cell& c, int axis) const {
    const float gx = 1.0f - c.fx, gy = 1.0f - c.fy;
    float sum = (gx * gy) * displacement(c.x0, c.y0, axis);
    sum = sum + (c.fx * gy) * displacement(c.x1, c.y0, axis);
    sum = sum + (gx * c.fy) * displacement(c.x0, c.y1, axis);
    return sum + (c.fx * c.fy) * displacement(c.x1, c.y1, axis);
  }

  bool is_valid(float x, float y, const Cell& c, bool check_corners) const {
    if (!check_corners) {
      const float nx = clamp_coordinate(rounded(x), static_cast<float>(Wg - 1));
      const float ny = clamp_coordinate(rounded(y), static_cast<float>(Hg - 1));
      return valid[static_cast<int64_t>(ny) * Wg + static_cast<int64_t>(nx)] != 0;
    }
    const int64_t right = c.fx > 0.0f ? c.x1 : c.x0;
    const int64_t below = c.fy > 0.0f ? c.y1 : c.y0;
    return valid[c.y0 * Wg + c.x0] && valid[c.y0 * Wg + right] && valid[below * Wg + c.x0] &&
           valid[below * Wg + right];
  }
};

void write_own(const ChainLinksParams& p, int64_t slot, int64_t begin, int64_t end, bool valid) {
  const int64_t P = p.Hg * p.Wg;
  for (int64_t site = begin; site < end; ++site) {
    float* position = p.positions + 2 * (slot * P + site);
    position[0] = static_cast<float>(site % p.Wg);
    position[1] = static_cast<float>(site / p.Wg);
  }
  std::memset(p.valid + slot * P + begin, valid ? 1 : 0, static_cast<size_t>(end - begin));
}

// Slots of frames i+step, i+2*step, ... of one block of sites; step is 1 or -1.
void follow(const ChainLinksParams& p, int64_t b, int64_t i, int64_t step, int64_t begin,
            int64_t end) {
  const int64_t P = p.Hg * p.Wg;
  const int64_t L = p.window < 0 ? p.T : 2 * p.window + 1;
  const int64_t first = p.window < 0 ? 0 : i - p.window;
  float x[kBlock], y[kBlock];
  uint8_t alive[kBlock];
  for (int64_t n = 0; n < end - begin; ++n) {
    x[n] = static_cast<float>((begin + n) % p.Wg);
    y[n] = static_cast<float>((begin + n) / p.Wg);
    alive[n] = 1;
  }
  const float right = static_cast<float>(p.Wg) - 0.5f, bottom = static_cast<float>(p.Hg) - 0.5f;
  for (int64_t j = i + step; j - first >= 0 && j - first < L; j += step) {
    const int64_t slot = (b * p.T + i) * L + (j - first);
    if (j < 0 || j >= p.T) {
      write_own(p, slot, begin, end, false);
      continue;
    }
    const int64_t pair = b * (p.T - 1) + (step > 0 ? j - 1 : j);
    const Field field{(step > 0 ? p.forward : p.backward) + pair * P * 2,
                      (step > 0 ? p.valid_forward : p.valid_backward) + pair * P, p.Hg, p.Wg,
                      p.round_to_nearest};
    float* positions = p.positions + 2 * slot * P;
    uint8_t* valid = p.valid + slot * P;
    for (int64_t n = 0; n < end - begin; ++n) {
      const int64_t site = begin + n;
      if (alive[n]) {
        const Cell cell = locate(x[n], y[n], p.Hg, p.Wg);
        bool ok = field.is_valid(x[n], y[n], cell, p.check_corners);
        x[n] = x[n] + field.sample(cell, 0);
        y[n] = y[n] + field.sample(cell, 1);
        ok = ok && x[n] >= -0.5f && x[n] <= right && y[n] >= -0.5f && y[n] <= bottom;
        alive[n] = ok ? 1 : 0;
      }
      positions[2 * site] = alive[n] ? x[n] : static_cast<float>(site % p.Wg);
      positions[2 * site + 1] = alive[n] ? y[n] : static_cast<float>(site / p.Wg);
      valid[site] = alive[n];
    }
  }
}

}  // namespace

Status chain_links(const ChainLinksParams& p, const Executor& executor) {
  if (p.B < 0 || p.T < 1 || p.Hg < 1 || p.Wg < 1 || p.window < -1) {
    return make_status(StatusCode::kInvalidArgument,
                       "chain_links: sizes must be positive, got B=%lld T=%lld grid %lldx%lld "
                       "window %lld",
                       (long long)p.B, (long long)p.T, (long long)p.Hg, (long long)p.Wg,
                       (long long)p.window);
  }
  const int64_t P = p.Hg * p.Wg;
  const int64_t L = p.window < 0 ? p.T : 2 * p.window + 1;
  const int64_t blocks = (P + kBlock - 1) / kBlock;
  run_tasks(executor, p.B * p.T * 2 * blocks, [&](int64_t task, int) {
    const int64_t begin = task % blocks * kBlock;
    const int64_t end = begin + kBlock < P ? begin + kBlock : P;
    const int64_t direction = task / blocks % 2;
    const int64_t i = task / (blocks * 2) % p.T;
    const int64_t b = task / (blocks * 2 * p.T);
    if (direction == 0) {
      const int64_t own = p.window < 0 ? i : p.window;
      write_own(p, (b * p.T + i) * L + own, begin, end, true);
    }
    follow(p, b, i, direction == 0 ? 1 : -1, begin, end);
  });
  return ok_status();
}

}  // namespace zsvr
