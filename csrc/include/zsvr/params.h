// Views shared by every operator's Params: raw pointers, sizes and int64 element strides.
#pragma once

#include <cstdint>

#include "zsvr/dtype.h"

namespace zsvr {

// A token tensor [B, T, P, H, D]. Strides count elements; D is dense (stride 1). Strides may be zero
// (expanded views) on inputs; outputs never alias themselves.
struct ConstTokens {
  const void* data = nullptr;
  int64_t stride_b = 0, stride_t = 0, stride_p = 0, stride_h = 0;

  template <class Scalar>
  const Scalar* at(int64_t b, int64_t t, int64_t p, int64_t h) const {
    return static_cast<const Scalar*>(data) + b * stride_b + t * stride_t + p * stride_p +
           h * stride_h;
  }
};

struct Tokens {
  void* data = nullptr;
  int64_t stride_b = 0, stride_t = 0, stride_p = 0, stride_h = 0;

  template <class Scalar>
  Scalar* at(int64_t b, int64_t t, int64_t p, int64_t h) const {
    return static_cast<Scalar*>(data) + b * stride_b + t * stride_t + p * stride_p + h * stride_h;
  }
};

}  // namespace zsvr
