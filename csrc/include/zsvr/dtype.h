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

constexpr int64_t dtype_bytes(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

}  // namespace zsvr
