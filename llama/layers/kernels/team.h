// Threads that share the work of many short stages inside one parallel region. A stage is complete
// when all of its units are done, not when all threads have arrived: a thread that lost its
// processor delays the others only if it holds units. Knows nothing about the work.
#pragma once

#include "processor.h"

#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <exception>
#include <memory>

namespace llama3 {
class Team {
 public:
  // One thread's place in the sequence of stages, which is the same for all threads.
  class Member {
   public:
    const int64_t index;

    // Calls work(begin, end) for parts of the units [0, count), each on one thread, and returns
    // when all parts are done. Parts are large first and small last, but no less than `least`.
    template <class F>
    void share(int64_t count, int64_t least, const F& work) {
      Stage& stage = team_.stages_[stage_++];
      int64_t begin, end;
      while (stage.claim(begin, end, count, least, team_.threads_)) {
        try {
          work(begin, end);
        } catch (...) {  // the other threads must not wait for ever; `run` throws it
          if (!team_.failed_.exchange(true)) team_.error_ = std::current_exception();
        }
        stage.complete(end - begin, count);
      }
      stage.wait(count);
    }

    // Whether a call of `share` now would find the stage complete. What a thread prepares for a
    // complete stage is not used, and what it would prepare it from may be changing.
    bool late(int64_t count) const { return team_.stages_[stage_].done.load() == count; }

   private:
    friend Team;
    Member(Team& team, int64_t index) : index(index), team_(team) {}
    Team& team_;
    int64_t stage_ = 0;
  };

  // For at most `stages` calls of `share`.
  Team(int threads, int64_t stages) : threads_(threads), stages_(new Stage[stages]) {}

  // Calls work(member) on each thread of a parallel region. There may be fewer threads than asked
  // for, such as one inside another parallel region. Throws what a stage has thrown.
  template <class F>
  void run(const F& work) {
    at::parallel_for(0, threads_, 1, [&](int64_t begin, int64_t) {
      Member member(*this, begin);
      work(member);
    });
    if (error_) std::rethrow_exception(error_);
  }

 private:
  struct Stage {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int> done{0};

    bool claim(int64_t& begin, int64_t& end, int64_t count, int64_t least, int threads) {
      begin = next.load(std::memory_order_relaxed);
      do {
        if (begin >= count) return false;
        end = begin + std::max(least, (count - begin) / (2 * threads));
        end = std::min(end, count);
      } while (!next.compare_exchange_weak(begin, end));
      return true;
    }

    void complete(int64_t units, int64_t count) {
      if (done.fetch_add(units) + units == count) done.notify_all();
    }

    // Spins for some tens of microseconds, then sleeps: the processor may be needed for the rest.
    void wait(int64_t count) {
      using clock = std::chrono::steady_clock;
      for (int i = 0; i < 64; i++) {
        if (done.load() == count) return;
        pause();
      }
      const auto end = clock::now() + std::chrono::microseconds(50);
      while (clock::now() < end)
        for (int i = 0; i < 16; i++) {
          if (done.load() == count) return;
          pause();
        }
      for (int now = done.load(); now != count; now = done.load()) done.wait(now);
    }
  };

  const int threads_;
  const std::unique_ptr<Stage[]> stages_;
  std::atomic<bool> failed_{false};
  std::exception_ptr error_;
};
}  // namespace llama3
