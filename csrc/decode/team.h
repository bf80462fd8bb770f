// Threads that walk through the phases of one step together: opening a parallel region for each of
// a model's products would cost more than waiting inside of one.
#pragma once

#include <atomic>
#include <exception>
#include <thread>

#include "core/threads.h"

namespace mllama {

class Team {
  public:
    // One thread's place in the team.
    class Member {
      public:
        Member(Team& team, int64_t index) : team_(team), index_(index) {}

        // Runs body(begin, end) on this member's share of [0, tasks), then waits for the others.
        // After a body threw, no other one runs; the members meet at every end all the same.
        template <class Body>
        void share(int64_t tasks, Body&& body) {
            int64_t members = team_.members_.load(std::memory_order_relaxed);
            int64_t begin = tasks * index_ / members, end = tasks * (index_ + 1) / members;
            if (begin < end && !team_.failed_.load(std::memory_order_relaxed)) {
                try {
                    body(begin, end);
                } catch (...) {
                    team_.fail(std::current_exception());
                }
            }
            team_.wait(members);
        }

      private:
        Team& team_;
        int64_t index_;
    };

    // Runs body(member) on each of torch's threads; throws what one of the bodies of `share` threw.
    template <class Body>
    void run(Body&& body) {
        int64_t threads = thread_count();
        if (threads == 1) {
            members_ = 1;
            body(Member(*this, 0));
        } else {
            torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
                // Where torch runs fewer threads than asked for (inside another region one), each
                // gets several places: the first call says how many, and so how many members there
                // are.
                if (begin == 0) {
                    size_.store(end, std::memory_order_relaxed);
                    members_.store((threads + end - 1) / end, std::memory_order_release);
                }
                while (members_.load(std::memory_order_acquire) == 0) std::this_thread::yield();
                body(Member(*this, begin / size_.load(std::memory_order_relaxed)));
            });
        }
        if (error_) std::rethrow_exception(error_);
    }

  private:
    static constexpr int kSpins = 4096;  // before other programs get the core

    void fail(std::exception_ptr error) {
        if (!failed_.exchange(true)) error_ = std::move(error);
    }

    void wait(int64_t members) {
        if (members == 1) return;
        int64_t round = round_.load(std::memory_order_relaxed);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) == members - 1) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; round_.load(std::memory_order_acquire) == round; ++i) {
            if (i > kSpins) std::this_thread::yield();
            pause();
        }
    }

    // Leaves the core's other thread, if it has one, more of the core.
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    std::atomic<int64_t> members_{0}, size_{1};
    alignas(64) std::atomic<int64_t> arrived_{0};
    alignas(64) std::atomic<int64_t> round_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;  // the first one; written before the end of a phase
};

}  // namespace mllama
