// Task parallelism over a thread pool that the caller owns.
//
// The core has no threads of its own. Python hands over torch's pool (torch_parallel_for), tests hand over
// nothing (serial) or std::thread. Tasks are pulled from a counter, so which worker runs a task varies: a
// task must own the outputs it writes, and results then do not depend on the thread count.
#pragma once

#include <atomic>
#include <cstdint>

namespace zsvr {

// Calls body(chunk_begin, chunk_end, context) over a partition of [begin, end); returns 0 on success.
using ParallelFor = int (*)(int64_t begin, int64_t end, int64_t grain,
                            void (*body)(int64_t, int64_t, void*), void* context);

struct Executor {
  ParallelFor parallel_for = nullptr;  // nullptr: run on the calling thread
  int threads = 1;  // upper bound on concurrent workers; sizes per-worker scratch
};

// Runs task(index, worker) for index in [0, count), worker in [0, executor.threads).
template <class Task>
inline void run_tasks(const Executor& executor, int64_t count, Task task) {
  const int64_t workers = executor.threads < count ? executor.threads : count;
  if (executor.parallel_for == nullptr || workers <= 1) {
    for (int64_t index = 0; index < count; ++index) task(index, 0);
    return;
  }
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t count;
    Task* task;
  } context;
  context.count = count;
  context.task = &task;
  auto body = [](int64_t begin, int64_t, void* opaque) {
    auto* shared = static_cast<Context*>(opaque);
    for (;;) {
      const int64_t index = shared->next.fetch_add(1, std::memory_order_relaxed);
      if (index >= shared->count) return;
      (*shared->task)(index, static_cast<int>(begin));
    }
  };
  const int failed = executor.parallel_for(0, workers, 1, body, &context);
  if (failed != 0) body(0, workers, &context);  // the pool refused: finish what is left here
}

}  // namespace zsvr
