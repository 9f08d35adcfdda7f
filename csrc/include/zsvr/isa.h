// Instruction sets: which one this process uses, and the switch that calls a kernel compiled for it.
//
// Every *_isa.cpp file is compiled once per level with its own flags, inside namespace zsvr::<level>.
// Such files must not instantiate std:: templates that are not inlined away: the linker keeps one copy of a
// weak symbol, and it could be the one with the widest instructions.
#pragma once

#include <cstdint>

namespace zsvr {

enum class Isa : int32_t { kPortable = 0, kAvx2 = 1, kAvx512 = 2, kAvx512Bf16 = 3, kAmx = 4 };

// Highest level that was compiled in, the processor has, and ZSVR_CPU_CAPABILITY (read once) allows.
Isa active_isa();
const char* isa_name(Isa isa);
// Comma-separated names of the levels compiled into this library.
const char* compiled_isas();
// Lowers or restores the level at run time, for tests; returns false if unknown, not compiled or not on
// this processor.
bool set_isa(const char* name);

}  // namespace zsvr

#if defined(ZSVR_HAVE_AVX2)
#define ZSVR_CASE_AVX2(call) \
  case ::zsvr::Isa::kAvx2:   \
    return ::zsvr::avx2::call;
#else
#define ZSVR_CASE_AVX2(call)
#endif
#if defined(ZSVR_HAVE_AVX512)
#define ZSVR_CASE_AVX512(call) \
  case ::zsvr::Isa::kAvx512:   \
    return ::zsvr::avx512::call;
#else
#define ZSVR_CASE_AVX512(call)
#endif
#if defined(ZSVR_HAVE_AVX512_BF16)
#define ZSVR_CASE_AVX512_BF16(call) \
  case ::zsvr::Isa::kAvx512Bf16:    \
    return ::zsvr::avx512_bf16::call;
#else
#define ZSVR_CASE_AVX512_BF16(call)
#endif
#if defined(ZSVR_HAVE_AMX)
#define ZSVR_CASE_AMX(call) \
  case ::zsvr::Isa::kAmx:   \
    return ::zsvr::amx::call;
#else
#define ZSVR_CASE_AMX(call)
#endif

// Declares `signature` in every level's namespace:
//   ZSVR_DECLARE_ISA(Status cross_frame_attention_fwd(const Params& params, const Executor& executor);)
#define ZSVR_DECLARE_ISA(...) \
  namespace portable {        \
  __VA_ARGS__                 \
  }                           \
  namespace avx2 {            \
  __VA_ARGS__                 \
  }                           \
  namespace avx512 {          \
  __VA_ARGS__                 \
  }                           \
  namespace avx512_bf16 {     \
  __VA_ARGS__                 \
  }                           \
  namespace amx {             \
  __VA_ARGS__                 \
  }

// Returns the call's value at the active level.
#define ZSVR_DISPATCH(...)                  \
  switch (::zsvr::active_isa()) {           \
    ZSVR_CASE_AMX(__VA_ARGS__)              \
    ZSVR_CASE_AVX512_BF16(__VA_ARGS__)      \
    ZSVR_CASE_AVX512(__VA_ARGS__)           \
    ZSVR_CASE_AVX2(__VA_ARGS__)             \
    default:                                \
      return ::zsvr::portable::__VA_ARGS__; \
  }
