// How tasks of cross-frame attention are cut, and the keys of one query frame in blocks; for *_isa.cpp files.
#pragma once

#include "zsvr/tile.h"

namespace zsvr {
namespace ZSVR_ISA {

inline constexpr int kKeys = 96;  // rows of a panel

// Sites that one task may own: every panel is copied once for them. A multiple of kLanes.
ZSVR_INLINE int64_t largest_span(int64_t P, int64_t most) {
  const int64_t rounded = (P + kLanes - 1) / kLanes * kLanes;
  return rounded < most ? rounded : most;
}

// Sites that one task owns: halved while workers would be short of tasks.
ZSVR_INLINE int64_t task_span(int64_t frames, int64_t P, int64_t most, int threads) {
  int64_t span = largest_span(P, most);
  while (span > kLanes && frames * ((P + span - 1) / span) < 4 * threads) {
    span = (span / kLanes + 1) / 2 * kLanes;
  }
  return span;
}

// A number of vectors that a generic lambda can take as a constant.
template <int kCount>
struct Vectors {
  static constexpr int count = kCount;
};

// Calls work(Vectors<n>) with the fewest vectors that hold `count` lanes.
template <class Work>
ZSVR_INLINE void by_width(int count, const Work& work) {
  const int vectors = (count + kWidth - 1) / kWidth;
  if (vectors > 2) return work(Vectors<kVectors>{});
  if (vectors == 2) return work(Vectors<2>{});
  work(Vectors<1>{});
}

// Calls work(block of the scratch, its first site, sites, Vectors<n>) for every kLanes sites of a span.
template <class Scratch, class Work>
ZSVR_INLINE void each_block(const Scratch& scratch, int64_t D, int64_t site, int sites,
                            const Work& work) {
  for (int offset = 0; offset < sites; offset += kLanes) {
    const int count = sites - offset < kLanes ? sites - offset : kLanes;
    const Scratch block = scratch.block(D, offset);
    by_width(count, [&](auto width) { work(block, site + offset, count, width); });
  }
}

// Walks the keys of one query frame: all sites of every listed frame.
template <class Params>
struct KeyWalk {
  const Params& p;
  int64_t b, h;
  const int32_t* row;  // [R]
  int64_t r = 0, site = 0;

  // Calls take(keys, values, rows, row of the panel) for up to kKeys rows in all; returns how many.
  template <class Scalar, class Take>
  ZSVR_INLINE int next(const Take& take) {
    int count = 0;
    while (count < kKeys && r < p.R) {
      if (row[r] < 0) {
        ++r;
        continue;
      }
      const int64_t left = p.P - site;
      const int taken = left < kKeys - count ? static_cast<int>(left) : kKeys - count;
      take(p.k.template at<Scalar>(b, row[r], site, h), p.v.template at<Scalar>(b, row[r], site, h),
           taken, count);
      count += taken;
      site += taken;
      if (site == p.P) {
        site = 0;
        ++r;
      }
    }
    return count;
  }

  // Copies up to kKeys keys and values into panels; returns how many.
  template <class Scalar>
  int next(float* keys, float* values) {
    const int D = static_cast<int>(p.D);
    return next<Scalar>([&](const Scalar* k, const Scalar* v, int rows, int at) {
      copy_rows(k, p.k.stride_p, rows, D, keys + at * panel_stride(D));
      copy_rows(v, p.v.stride_p, rows, D, values + at * panel_stride(D));
    });
  }

  // The rows that next() will copy first.
  template <class Scalar>
  RowsAhead ahead() {
    while (r < p.R && row[r] < 0) ++r;
    if (r == p.R) return {};
    const int64_t left = p.P - site, size = sizeof(Scalar);
    return {reinterpret_cast<const char*>(p.k.template at<Scalar>(b, row[r], site, h)),
            reinterpret_cast<const char*>(p.v.template at<Scalar>(b, row[r], site, h)),
            p.k.stride_p * size,
            p.v.stride_p * size,
            p.D * size,
            static_cast<int>(left < kKeys ? left : kKeys)};
  }
};

}  // namespace ZSVR_ISA
}  // namespace zsvr
