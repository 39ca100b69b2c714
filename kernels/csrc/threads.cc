#include "threads.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "float_mode.h"

#if defined(__linux__)
#include <pthread.h>
#include <sched.h>
#endif

namespace bitnet {
namespace {

constexpr int kPauses = 2000;  // of a helper without work, some tens of microseconds, before it begins to yield
constexpr int kYields = 200;   // then before it sleeps: an idle process must not keep a processor busy
constexpr int64_t kAheadBytes = 256 << 10;  // prefetched for the next loop, a part of L2 ...
constexpr int64_t kAheadStep = 1 << 10;     // ... in steps, between which a helper checks for that loop

void pause() {
#if defined(__x86_64__)
  asm volatile("pause");
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

int64_t processors() {
#if defined(__linux__)
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
#endif
  return std::max(1u, std::thread::hardware_concurrency());
}

// The items [begin, end) that are left of one thread's run, as one word: its owner takes the first, others the last.
class Run {
 public:
  void reset(uint32_t begin, uint32_t end) { word_.store(pack(begin, end), std::memory_order_relaxed); }
  // The next item, or -1 where none is left.
  int64_t take_first() {
    return take([](uint32_t& begin, uint32_t&) { return begin++; });
  }
  int64_t take_last() {
    return take([](uint32_t&, uint32_t& end) { return --end; });
  }

 private:
  static uint64_t pack(uint32_t begin, uint32_t end) { return uint64_t{begin} << 32 | end; }

  template <typename Choose>
  int64_t take(Choose choose) {
    uint64_t word = word_.load(std::memory_order_acquire);
    for (;;) {
      uint32_t begin = static_cast<uint32_t>(word >> 32), end = static_cast<uint32_t>(word);
      if (begin >= end) return -1;
      const int64_t item = choose(begin, end);
      if (word_.compare_exchange_weak(word, pack(begin, end), std::memory_order_acq_rel)) return item;
    }
  }

  alignas(64) std::atomic<uint64_t> word_{0};
};

class Pool {
 public:
  // Has fewer threads where the system refuses some. Helpers read threads_ only once a loop is open, which is after the
  // constructor.
  explicit Pool(int64_t wanted) : runs_(wanted) {
    while (threads_ < wanted && start_helper(threads_)) ++threads_;
  }

  int64_t threads() const { return threads_; }

  // False where another caller has the helpers. Throws what an item threw, after all others have run.
  bool run(int64_t items, const std::function<void(int64_t)>& body, const Weights& next) {
    std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (!lock) return false;
    body_ = &body;
    next_ = next;
    float_mode_ = FloatMode::current();
    done_.store(0, std::memory_order_relaxed);
    const int64_t threads = this->threads();
    for (int64_t i = 0; i < threads; ++i) {
      runs_[i].reset(static_cast<uint32_t>(items * i / threads), static_cast<uint32_t>(items * (i + 1) / threads));
    }
    loop_.store(loop_.load(std::memory_order_relaxed) + 1);  // odd: open
    if (sleepers_.load() > 0) {
      { std::lock_guard<std::mutex> guard(sleep_); }
      wake_.notify_all();
    }
    work(0);
    // Helpers are microseconds from the end of their last item; yield in case one lost its processor.
    for (int spins = 0; done_.load(std::memory_order_acquire) < items; ++spins) {
      spins < kPauses ? pause() : std::this_thread::yield();
    }
    loop_.store(loop_.load(std::memory_order_relaxed) + 1);  // even: closed
    // A helper that saw the loop open may still look for items; afterwards no thread uses body.
    for (int spins = 0; inside_.load() > 0; ++spins) spins < kPauses ? pause() : std::this_thread::yield();
    if (failure_ != nullptr) std::rethrow_exception(std::exchange(failure_, nullptr));
    return true;
  }

  void retire() {
    retired_.store(true);
    { std::lock_guard<std::mutex> guard(sleep_); }
    wake_.notify_all();
  }

 private:
  bool start_helper(int64_t self) {
    try {
      std::thread([this, self] { help(self); }).detach();
      return true;
    } catch (const std::exception&) {  // a limit on threads or processes, or no memory
      return false;
    }
  }

  void work(int64_t self) {
    const FloatMode of_the_caller(float_mode_);
    int64_t finished = 0;
    for (int64_t item; (item = runs_[self].take_first()) >= 0; ++finished) run_item(item);
    for (int64_t i = 1; i < threads(); ++i) {
      Run& other = runs_[(self + i) % threads()];
      for (int64_t item; (item = other.take_last()) >= 0; ++finished) run_item(item);
    }
    done_.fetch_add(finished, std::memory_order_acq_rel);
  }

  // An exception that left a helper would end the process; the caller gets it instead.
  void run_item(int64_t item) {
    try {
      (*body_)(item);
    } catch (...) {
      std::lock_guard<std::mutex> guard(failing_);
      if (failure_ == nullptr) failure_ = std::current_exception();
    }
  }

  void help(int64_t self) {
    for (uint64_t seen = 0; !retired_.load(std::memory_order_relaxed);) {
      const uint64_t loop = wait_for_other_than(seen);
      Weights next;
      inside_.fetch_add(1);
      // Counted before loop_ is read again: the caller closes the loop before it reads the count.
      if (loop % 2 == 1 && loop_.load() == loop) {
        work(self);
        next = next_;
      }
      inside_.fetch_sub(1);
      seen = loop;
      fetch_share(self, next, seen);
    }
  }

  // Until a loop other than `seen` opens.
  void fetch_share(int64_t self, const Weights& next, uint64_t seen) {
    const int64_t total = next.total(), begin = total * self / threads();
    const int64_t end = std::min(total * (self + 1) / threads(), begin + kAheadBytes);
    for (int64_t at = begin; at < end; at += kAheadStep) {
      if (loop_.load(std::memory_order_relaxed) > seen + 1) return;
      next.prefetch(at, std::min(end, at + kAheadStep));
    }
  }

  // The number of an open loop that is not `seen`; 0 when the pool retires.
  uint64_t wait_for_other_than(uint64_t seen) {
    const auto ready = [&](uint64_t loop) { return (loop % 2 == 1 && loop != seen) || retired_.load(); };
    for (int spins = 0; spins < kPauses + kYields; ++spins) {
      const uint64_t loop = loop_.load(std::memory_order_acquire);
      if (ready(loop)) return loop;
      spins < kPauses ? pause() : std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(sleep_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return ready(loop_.load()); });
    sleepers_.fetch_sub(1);
    return loop_.load();
  }

  std::mutex busy_;                                // held by the caller whose loop runs
  const std::function<void(int64_t)>* body_ = nullptr;
  uint64_t float_mode_ = 0;
  Weights next_;
  std::vector<Run> runs_;
  int64_t threads_ = 1;                            // the caller among them
  std::mutex failing_;
  std::exception_ptr failure_;                     // the first of the loop
  alignas(64) std::atomic<uint64_t> loop_{0};      // number of the loop, odd while it is open
  alignas(64) std::atomic<int64_t> done_{0};       // items
  alignas(64) std::atomic<int64_t> inside_{0};     // helpers that may use the loop
  std::atomic<bool> retired_{false};
  std::atomic<int64_t> sleepers_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

// Pools are never deleted: detached helpers may use them until the process ends.
std::atomic<Pool*> current{nullptr};
std::atomic<int64_t> wanted{0};  // threads; 0: the number of processors
std::mutex creation;

// Null where there is no memory for one: the caller is alone then.
Pool* pool() {
  if (Pool* existing = current.load(std::memory_order_acquire)) return existing;
  std::lock_guard<std::mutex> lock(creation);
  if (Pool* existing = current.load(std::memory_order_acquire)) return existing;
#if defined(__linux__)
  static const int registered = pthread_atfork(
      [] { creation.lock(); }, [] { creation.unlock(); },
      [] {
        current.store(nullptr);  // the child has no helpers
        creation.unlock();
      });
  (void)registered;
#endif
  const int64_t count = wanted.load();
  try {
    Pool* made = new Pool(count > 0 ? count : processors());
    current.store(made, std::memory_order_release);
    return made;
  } catch (const std::exception&) {
    return nullptr;
  }
}

}  // namespace

int64_t thread_count() {
  const Pool* helpers = pool();
  return helpers == nullptr ? 1 : helpers->threads();
}

void run_parallel(int64_t items, const std::function<void(int64_t)>& body, const Weights& next) {
  Pool* helpers = items > 1 ? pool() : nullptr;
  if (helpers != nullptr && helpers->threads() > 1 && helpers->run(items, body, next)) return;
  for (int64_t i = 0; i < items; ++i) body(i);
}

}  // namespace bitnet

extern "C" void bitnet_kernels_set_thread_count(int64_t count) noexcept {
  std::lock_guard<std::mutex> lock(bitnet::creation);
  bitnet::wanted.store(std::max<int64_t>(1, count));
  if (bitnet::Pool* old = bitnet::current.exchange(nullptr)) old->retire();
}
