// Runs the native tests at the active instruction set; exits with 1 if any failed.
#include "tests/oracle.h"
#include "zsvr/isa.h"

int main() {
  std::printf("instruction set %s of %s\n", zsvr::isa_name(zsvr::active_isa()),
              zsvr::compiled_isas());
  int failures = 0;
  const auto run = [&failures](const char* name, int (*test)()) {
    const int failed = test();
    std::printf("%-28s %s\n", name, failed == 0 ? "ok" : "FAILED");
    failures += failed;
  };
  run("cross_frame_attention", test_cross_frame_attention);
  run("trajectory_attention", test_trajectory_attention);
  run("chain_links", test_chain_links);
  run("correspondence_search", test_correspondence_search);
  return failures == 0 ? 0 : 1;
}
