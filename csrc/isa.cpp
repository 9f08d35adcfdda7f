// Finds the instruction set once per process. Compiled with no special flags.
#include "zsvr/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace zsvr {
namespace {

constexpr const char* kNames[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

bool compiled(Isa isa) {
  switch (isa) {
    case Isa::kPortable:
      return true;
#if defined(ZSVR_HAVE_AVX2)
    case Isa::kAvx2:
      return true;
#endif
#if defined(ZSVR_HAVE_AVX512)
    case Isa::kAvx512:
      return true;
#endif
#if defined(ZSVR_HAVE_AVX512_BF16)
    case Isa::kAvx512Bf16:
      return true;
#endif
#if defined(ZSVR_HAVE_AMX)
    case Isa::kAmx:
      return true;
#endif
    default:
      return false;
  }
}

#if defined(__x86_64__)
// AMX tiles need the kernel's leave, once per process (Linux 5.16 and later).
bool request_amx() {
#if defined(__linux__) && defined(ZSVR_HAVE_AMX)
  constexpr long kArchReqXcompPerm = 0x1023;
  constexpr long kXfeatureTileData = 18;
  unsigned int eax = 7, ebx = 0, ecx = 0, edx = 0;
  __asm__ volatile("cpuid" : "+a"(eax), "=b"(ebx), "+c"(ecx), "=d"(edx));
  const bool has_tiles = (edx >> 24 & 1u) != 0 && (edx >> 22 & 1u) != 0;  // AMX-TILE, AMX-BF16
  return has_tiles && syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureTileData) == 0;
#else
  return false;
#endif
}
#endif

bool supported(Isa isa) {
  if (!compiled(isa)) return false;
  if (isa == Isa::kPortable) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  const bool bf16 = avx512 && __builtin_cpu_supports("avx512bf16");
  switch (isa) {
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return bf16;
    case Isa::kAmx:
      return bf16 && request_amx();
    default:
      return false;
  }
#else
  return false;
#endif
}

int index_of(const char* name) {
  for (int i = 0; i < 5; ++i) {
    if (std::strcmp(name, kNames[i]) == 0) return i;
  }
  return -1;
}

Isa detect() {
  int limit = 4;
  if (const char* requested = std::getenv("ZSVR_CPU_CAPABILITY")) {
    const int index = index_of(requested);
    if (index >= 0) limit = index;
  }
  for (int level = limit; level > 0; --level) {
    if (supported(static_cast<Isa>(level))) return static_cast<Isa>(level);
  }
  return Isa::kPortable;
}

std::atomic<int>& active() {
  static std::atomic<int> level{static_cast<int>(detect())};
  return level;
}

}  // namespace

Isa active_isa() { return static_cast<Isa>(active().load(std::memory_order_relaxed)); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

const char* compiled_isas() {
  return "portable"
#if defined(ZSVR_HAVE_AVX2)
         ",avx2"
#endif
#if defined(ZSVR_HAVE_AVX512)
         ",avx512"
#endif
#if defined(ZSVR_HAVE_AVX512_BF16)
         ",avx512_bf16"
#endif
#if defined(ZSVR_HAVE_AMX)
         ",amx"
#endif
      ;
}

bool set_isa(const char* name) {
  const int index = index_of(name);
  if (index < 0 || !supported(static_cast<Isa>(index))) return false;
  active().store(index, std::memory_order_relaxed);
  return true;
}

}  // namespace zsvr
