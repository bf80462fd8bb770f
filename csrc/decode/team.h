// Threads that walk through the phases of one step together: opening a parallel region for each of
// a model's products would cost more than waiting inside of one.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <memory>
#include <thread>

#include "core/threads.h"

namespace mllama {

// All threads call `share` for the same phases in the same order. Each has a range of a phase's
// tasks of its own, which it reads through in order; who is done takes pieces of the others'. So a
// thread that has lost its core to another program is not waited for: when it comes back, it passes
// over the phases that are done.
class Team {
  public:
    // One thread's place in the team.
    class Member {
      public:
        Member(Team& team, int64_t index) : team_(team), index_(index) {}

        // One phase of at least one task: body(begin, end) for all of [0, tasks), in pieces that
        // begin at multiples of `grain`. The thread that finishes the phase then calls last(),
        // once; the others call idle() and wait for it. If body or last throws, later calls of them
        // are left out.
        template <class Body, class Last, class Idle>
        void share(int64_t tasks, int64_t grain, Body&& body, Last&& last, Idle&& idle) {
            if (!team_.work(phase_, index_, tasks, grain, body, last)) {
                if (team_.open(phase_)) idle();
                team_.wait(phase_);
            }
            ++phase_;
        }

        // Where this thread's own range of a phase's tasks begins.
        int64_t begin(int64_t tasks, int64_t grain) const {
            return team_.bound(tasks, grain, index_);
        }

      private:
        Team& team_;
        int64_t index_;
        uint32_t phase_ = 0;
    };

    Team() : size_(thread_count()), ranges_(new Range[size_]) {}

    // Runs body(member) on torch's threads; throws what a phase threw.
    template <class Body>
    void run(Body&& body) {
        parallel_for(size_, 1, [&](int64_t begin, int64_t) { body(Member(*this, begin)); });
        if (error_) std::rethrow_exception(error_);
    }

  private:
    static constexpr int kSpins = 4096;    // before other programs get the core
    static constexpr int64_t kPieces = 4;  // of a range

    // What is left of a member's range: the phase, and how many of its tasks are taken.
    struct alignas(64) Range {
        std::atomic<uint64_t> taken{0};
    };
    static constexpr uint64_t pack(uint32_t phase, int64_t tasks) {
        return uint64_t{phase} << 32 | static_cast<uint64_t>(tasks);
    }

    bool open(uint32_t phase) const { return phase_.load(std::memory_order_acquire) == phase; }

    int64_t bound(int64_t tasks, int64_t grain, int64_t index) const {
        int64_t pieces = (tasks + grain - 1) / grain;
        return std::min(pieces * index / size_ * grain, tasks);
    }

    // Whether this thread has ended the phase.
    template <class Body, class Last>
    bool work(uint32_t phase, int64_t index, int64_t tasks, int64_t grain, Body& body, Last& last) {
        for (int64_t n = 0; n < size_; ++n) {
            int64_t owner = (index + n) % size_;
            int64_t first = bound(tasks, grain, owner),
                    own = bound(tasks, grain, owner + 1) - first;
            int64_t piece = (own + kPieces * grain - 1) / (kPieces * grain) * grain;
            std::atomic<uint64_t>& taken = ranges_[owner].taken;
            uint64_t now = taken.load(std::memory_order_acquire);
            while (now >> 32 == phase) {
                int64_t begin = static_cast<uint32_t>(now), end = std::min(begin + piece, own);
                if (begin >= own) break;
                if (!taken.compare_exchange_weak(now, pack(phase, end), std::memory_order_acq_rel))
                    continue;
                attempt([&] { body(first + begin, first + end); });
                int64_t done = end - begin;
                if (done_.fetch_add(done, std::memory_order_acq_rel) + done == tasks) {
                    attempt(last);
                    end_phase(phase);
                    return true;
                }
                now = taken.load(std::memory_order_acquire);
            }
        }
        return false;
    }

    void end_phase(uint32_t phase) {
        done_.store(0, std::memory_order_relaxed);
        for (int64_t i = 0; i < size_; ++i)
            ranges_[i].taken.store(pack(phase + 1, 0), std::memory_order_release);
        phase_.store(phase + 1, std::memory_order_release);
    }

    void wait(uint32_t phase) const {
        for (int i = 0; open(phase); ++i) {
            if (i > kSpins) std::this_thread::yield();
            pause();
        }
    }

    template <class Body>
    void attempt(Body&& body) {
        if (failed_.load(std::memory_order_relaxed)) return;
        try {
            body();
        } catch (...) {
            if (!failed_.exchange(true)) error_ = std::current_exception();
        }
    }

    // Leaves the core's other thread, if it has one, more of the core.
    static void pause() {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
    }

    const int64_t size_;
    const std::unique_ptr<Range[]> ranges_;
    alignas(64) std::atomic<uint32_t> phase_{0};
    alignas(64) std::atomic<int64_t> done_{0};
    std::atomic<bool> failed_{false};
    std::exception_ptr error_;  // the first one; written before the end of a phase
};

}  // namespace mllama
