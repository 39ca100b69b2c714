// The parallel loop where the system fails it: threads that cannot be made, items that throw, and calls after the static
// objects of the library would be gone. Exit code 0 where every item still ran once and nothing ended the process.

#include <dlfcn.h>

#include <atomic>
#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

#include "lookahead.h"
#include "threads.h"

using namespace bitnet;

std::atomic<int> allowed{1 << 30};  // threads that can still be made

// The function of libstdc++ through which std::thread makes one, with a limit as that of a container.
void std::thread::_M_start_thread(_State_ptr state, void (*depend)()) {
  if (allowed.fetch_sub(1) <= 0) throw std::system_error(EAGAIN, std::generic_category());
  using Start = void (*)(std::thread*, _State_ptr, void (*)());
  static const auto start =
      reinterpret_cast<Start>(dlsym(RTLD_NEXT, "_ZNSt6thread15_M_start_threadESt10unique_ptrINS_6_StateESt14default_deleteIS1_EEPFvvE"));
  start(this, std::move(state), depend);
}

bool each_item_once(int64_t items) {
  std::vector<std::atomic<int>> runs(items);
  parallel_for(items, [&](int64_t item) { runs[item].fetch_add(1); });
  for (const std::atomic<int>& count : runs) {
    if (count != 1) return false;
  }
  return true;
}

bool fewer_threads_than_wanted() {
  for (int makeable : {0, 1, 2, 6}) {
    bitnet_kernels_set_thread_count(8);
    allowed = makeable;
    for (int loop = 0; loop < 300; ++loop) {
      if (!each_item_once(loop % 37)) return false;
    }
    if (thread_count() != 1 + makeable) return false;
  }
  allowed = 1 << 30;
  return true;
}

bool thrown_items_reach_the_caller() {
  for (int64_t threads : {1, 4}) {
    bitnet_kernels_set_thread_count(threads);
    for (int64_t bad = 0; bad < 64; ++bad) {
      std::string caught;
      try {
        parallel_for(64, [&](int64_t item) {
          if (item == bad) throw std::runtime_error(std::to_string(item));
        });
      } catch (const std::runtime_error& error) {
        caught = error.what();
      }
      if (caught != std::to_string(bad) || !each_item_once(64)) return false;
    }
  }
  return true;
}

// Made before every static object of the library's functions, so destroyed after they would be.
struct Last {
  ~Last() {
    Weights call;
    const uint8_t matrix[64] = {};
    call.add(matrix, sizeof(matrix));
    expected_after(call);
    if (!each_item_once(9)) std::puts("wrong at the end of the process");
  }
} last;

int main() {
  if (!fewer_threads_than_wanted()) return std::puts("fewer threads: wrong items or number"), 1;
  if (!thrown_items_reach_the_caller()) return std::puts("an item threw: not caught once, or wrong items after"), 1;
  Weights call;
  for (uintptr_t matrix = 64; matrix < 64 * 100; matrix += 64) {
    call.data[0] = reinterpret_cast<const uint8_t*>(matrix), call.bytes[0] = 64;
    expected_after(call);
  }
}
