// What the native tests share: random exact-size buffers, rounding, a thread pool, and the
// comparison.
//
// These tests look for memory errors (they run under sanitizers), for wrong results by a wide
// margin, and for results that depend on the thread count. The tight error budget is in
// tests/kernels.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "zsvr/dtype.h"
#include "zsvr/parallel.h"
#include "zsvr/params.h"
#include "zsvr/status.h"

namespace zsvr::test {

inline float round_to(DType dtype, float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (dtype == DType::kBFloat16) {
    bits = (bits + 0x7fffu + (bits >> 16 & 1u)) & 0xffff0000u;
  } else if (dtype == DType::kFloat16) {  // normal range only
    bits = (bits + 0xfffu + (bits >> 13 & 1u)) & 0xffffe000u;
  }
  std::memcpy(&x, &bits, 4);
  return x;
}

inline void encode(DType dtype, float x, void* at) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (dtype == DType::kFloat32) {
    std::memcpy(at, &x, 4);
  } else if (dtype == DType::kBFloat16) {
    const uint16_t half = static_cast<uint16_t>(bits >> 16);
    std::memcpy(at, &half, 2);
  } else {
    const uint32_t magnitude = bits & 0x7fffffffu;
    const uint16_t half = static_cast<uint16_t>(
        (bits >> 16 & 0x8000u) | (magnitude < 0x38800000u ? 0 : (magnitude - 0x38000000u) >> 13));
    std::memcpy(at, &half, 2);
  }
}

inline double decode(DType dtype, const void* at) {
  if (dtype == DType::kFloat32) {
    float x;
    std::memcpy(&x, at, 4);
    return x;
  }
  uint16_t half;
  std::memcpy(&half, at, 2);
  if (dtype == DType::kBFloat16) {
    const uint32_t bits = static_cast<uint32_t>(half) << 16;
    float x;
    std::memcpy(&x, &bits, 4);
    return x;
  }
  const int exponent = half >> 10 & 31;
  const double fraction = half & 1023;
  const double sign = half & 0x8000 ? -1.0 : 1.0;
  if (exponent == 31) return fraction != 0 ? NAN : sign * INFINITY;
  return sign *
         (exponent == 0 ? std::ldexp(fraction, -24) : std::ldexp(1024 + fraction, exponent - 25));
}

// A dense [B, T, P, H, D] tensor in its own allocation of exactly its size, so that ASan sees any
// overrun.
class Buffer {
 public:
  Buffer(DType dtype, int64_t B, int64_t T, int64_t P, int64_t H, int64_t D)
      : dtype_(dtype),
        T_(T),
        P_(P),
        H_(H),
        D_(D),
        count_(B * T * P * H * D),
        bytes_(new unsigned char[static_cast<size_t>(count_ * dtype_bytes(dtype))]) {
    std::memset(bytes_.get(), 0xff, static_cast<size_t>(count_ * dtype_bytes(dtype)));  // NaN
  }

  void fill(std::mt19937& random) {
    std::normal_distribution<float> normal;
    for (int64_t n = 0; n < count_; ++n) {
      float x = normal(random);
      if (std::fabs(x) < 1e-3f) x = 0.25f;
      encode(dtype_, round_to(dtype_, x), bytes_.get() + n * dtype_bytes(dtype_));
    }
  }

  template <class View>
  View view() const {
    View view;
    view.data = bytes_.get();
    view.stride_h = D_;
    view.stride_p = H_ * D_;
    view.stride_t = P_ * H_ * D_;
    view.stride_b = T_ * P_ * H_ * D_;
    return view;
  }

  double at(int64_t b, int64_t t, int64_t p, int64_t h, int64_t d) const {
    const int64_t n = (((b * T_ + t) * P_ + p) * H_ + h) * D_ + d;
    return decode(dtype_, bytes_.get() + n * dtype_bytes(dtype_));
  }

  int64_t count() const { return count_; }
  double element(int64_t n) const { return decode(dtype_, bytes_.get() + n * dtype_bytes(dtype_)); }
  bool same_bits(const Buffer& other) const {
    return std::memcmp(bytes_.get(), other.bytes_.get(),
                       static_cast<size_t>(count_ * dtype_bytes(dtype_))) == 0;
  }

 private:
  DType dtype_;
  int64_t T_, P_, H_, D_, count_;
  std::unique_ptr<unsigned char[]> bytes_;
};

// torch's parallel_for splits statically; so does this one, into real threads.
inline int threads_parallel_for(int64_t begin, int64_t end, int64_t,
                                void (*body)(int64_t, int64_t, void*), void* context) {
  std::vector<std::thread> threads;
  for (int64_t n = begin; n < end; ++n) threads.emplace_back(body, n, n + 1, context);
  for (auto& thread : threads) thread.join();
  return 0;
}

inline Executor executor_of(int threads) {
  Executor executor;
  executor.parallel_for = threads > 1 ? threads_parallel_for : nullptr;
  executor.threads = threads;
  return executor;
}

// 64-byte aligned scratch of exactly the asked size, filled with NaN.
class Workspace {
 public:
  explicit Workspace(int64_t bytes)
      : size_(static_cast<size_t>((bytes + 63) / 64 * 64)),
        data_(std::aligned_alloc(64, size_ ? size_ : 64)) {
    std::memset(data_, 0xff, size_);
  }
  ~Workspace() { std::free(data_); }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  void* data() const { return data_; }

 private:
  size_t size_;
  void* data_;
};

inline double tolerance(DType dtype) {
  return dtype == DType::kFloat32 ? 2e-5 : dtype == DType::kBFloat16 ? 3e-2 : 4e-3;
}

// Compares got(n) with expected[n] for all n, relative to the largest expected value; returns 1 on
// failure.
inline int compare(const char* what, int64_t count, const std::function<double(int64_t)>& got,
                   const std::vector<double>& expected, double limit) {
  double largest = 1e-3, worst = 0.0;
  int64_t where = 0;
  for (const double x : expected)
    largest = std::isfinite(x) ? std::fmax(largest, std::fabs(x)) : largest;
  for (int64_t n = 0; n < count; ++n) {
    const double x = expected[static_cast<size_t>(n)];
    const double error = std::isinf(x) ? (got(n) == x ? 0.0 : INFINITY) : std::fabs(got(n) - x);
    if (!(error <= worst)) worst = error, where = n;
  }
  if (worst <= limit * largest) return 0;
  std::printf("FAILED %s: element %lld is %g, expected %g (error %g, budget %g)\n", what,
              (long long)where, got(where), expected[static_cast<size_t>(where)], worst,
              limit * largest);
  return 1;
}

inline int expect(bool condition, const char* what) {
  if (condition) return 0;
  std::printf("FAILED %s\n", what);
  return 1;
}

}  // namespace zsvr::test

int test_cross_frame_attention();
int test_trajectory_attention();
int test_chain_links();
int test_correspondence_search();
