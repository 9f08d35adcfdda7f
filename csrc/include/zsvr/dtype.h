// Storage types. Arithmetic is always float32; these are only loaded and stored.
#pragma once

#include <cstdint>

namespace zsvr {

enum class DType : int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

static_assert(sizeof(BFloat16) == 2 && sizeof(Float16) == 2);

// Calls work(a value of the storage type).
template <class Work>
inline void by_dtype(DType dtype, const Work& work) {
  switch (dtype) {
    case DType::kFloat32:
      return work(float{});
    case DType::kBFloat16:
      return work(BFloat16{});
    case DType::kFloat16:
      return work(Float16{});
  }
}

constexpr int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace zsvr
