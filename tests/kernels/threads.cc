// The parallel loop by itself: exit code 0 where every item of every loop ran exactly once.

#include "threads.h"

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <cstdio>
#include <ctime>
#include <thread>
#include <vector>

using namespace bitnet;

bool each_item_once(int64_t items) {
  std::vector<std::atomic<int>> runs(items);
  parallel_for(items, [&](int64_t item) { runs[item].fetch_add(1); });
  for (const std::atomic<int>& count : runs) {
    if (count != 1) return false;
  }
  return true;
}

bool many_loops(int loops) {
  for (int i = 0; i < loops; ++i) {
    if (!each_item_once(i % 37)) return false;
  }
  return true;
}

int main() {
  for (int64_t threads : {1, 2, 3, 8}) {
    bitnet_kernels_set_thread_count(threads);
    if (thread_count() != threads) return std::printf("got %d threads\n", static_cast<int>(thread_count())), 1;
    if (!many_loops(2000)) return std::puts("one caller: wrong items"), 1;

    std::atomic<bool> right{true};
    std::vector<std::thread> callers;
    for (int i = 0; i < 4; ++i) {
      callers.emplace_back([&] {
        if (!many_loops(500)) right = false;
      });
    }
    for (std::thread& caller : callers) caller.join();
    if (!right) return std::puts("four callers: wrong items"), 1;

    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // the helpers are asleep now
    const std::clock_t before = std::clock();
    std::this_thread::sleep_for(std::chrono::milliseconds(200));
    if (std::clock() - before > CLOCKS_PER_SEC / 20) return std::puts("idle helpers keep a processor busy"), 1;
    if (!many_loops(10)) return std::puts("after sleep: wrong items"), 1;

    const pid_t child = fork();
    if (child == 0) _exit(many_loops(500) && thread_count() == threads ? 0 : 1);
    int status = 0;
    waitpid(child, &status, 0);
    if (status != 0) return std::puts("after fork: wrong items"), 1;
  }
}
