// The keys of one query frame in blocks of row pointers; for *_isa.cpp files.
#pragma once

#include "zsvr/tile.h"

namespace zsvr {
namespace ZSVR_ISA {

inline constexpr int kKeys = 192;

// Walks the keys of one query frame: all sites of every listed frame.
template <class Params>
struct KeyWalk {
  const Params& p;
  int64_t b, h;
  const int32_t* row;  // [R]
  int64_t r = 0, site = 0;

  // Fills up to kKeys row pointers; returns how many.
  template <class Scalar>
  int next(const Scalar** k, const Scalar** v) {
    int count = 0;
    while (count < kKeys && r < p.R) {
      if (row[r] < 0) {
        ++r;
        continue;
      }
      const Scalar* key = p.k.template at<Scalar>(b, row[r], site, h);
      const Scalar* value = p.v.template at<Scalar>(b, row[r], site, h);
      const int64_t left = p.P - site;
      const int taken = left < kKeys - count ? static_cast<int>(left) : kKeys - count;
      for (int n = 0; n < taken; ++n) {
        k[count + n] = key + n * p.k.stride_p;
        v[count + n] = value + n * p.v.stride_p;
      }
      count += taken;
      site += taken;
      if (site == p.P) {
        site = 0;
        ++r;
      }
    }
    return count;
  }
};

}  // namespace ZSVR_ISA
}  // namespace zsvr
