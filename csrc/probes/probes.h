// Ceilings of this machine, measured by the benchmark beside the kernels: arithmetic from registers
// alone and plain reads.
#pragma once

#include "zsvr/isa.h"
#include "zsvr/parallel.h"
#include "zsvr/status.h"

namespace zsvr {

enum class Probe : int32_t {
  kFma = 0,       // float32 multiply-adds; work is counted in FLOP
  kDotBf16 = 1,   // vdpbf16ps, avx512_bf16 and above; FLOP
  kTileBf16 = 2,  // tdpbf16ps, amx; FLOP
  kRead = 3,      // vector loads; bytes
};

struct ProbeParams {
  Probe probe = Probe::kFma;
  int64_t iterations = 0;       // passes of every worker
  const float* data = nullptr;  // [threads, floats] dense, 64-byte aligned: what each worker reads
  int64_t floats = 0;           // a multiple of 128; kRead only
  float* sink = nullptr;        // [threads], written so that nothing is optimised away
};

// Runs the probe on every worker and returns the work done through `work`, in FLOP or bytes.
// Unsupported where the active instruction set lacks the instruction.
Status probe(const ProbeParams& params, const Executor& executor, int64_t* work);

ZSVR_DECLARE_ISA(Status probe(const ProbeParams& params, const Executor& executor, int64_t* work);)

}  // namespace zsvr
