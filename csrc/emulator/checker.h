// Watches every access of a kernel to memory: bounds, writes to inputs, reads of what nothing
// wrote, alignment, asynchronous copies that have not arrived, and races in and between blocks.
// Kernels are compiled with -fsanitize=thread; the functions which the compiler calls then are ours
// (callbacks.cpp), not those of libtsan.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mllama::emulator::checker {

// The thread whose accesses are watched; without one (id < 0) none are.
struct Thread {
    int id = -1;
    const char *stack = nullptr, *stack_end = nullptr;
};
extern Thread thread;

// Nothing is watched while one exists: the emulator's own work for the thread, which may call
// instrumented copies of inline functions.
class Unwatched {
  public:
    Unwatched() : thread_(thread) { thread = {}; }
    ~Unwatched() { thread = thread_; }
    Unwatched(const Unwatched&) = delete;
    Unwatched& operator=(const Unwatched&) = delete;

  private:
    Thread thread_;
};

void begin_launch(const void* arguments, size_t arguments_size);
void begin_block(int threads);
void end_block();
void allow_shared(const void* begin, size_t bytes, const char* name);

void block_barrier();
void warp_barrier(int warp, uint32_t mask);
void fence();

// A copy owns its target from issue to arrival.
enum class Kind { load, store, atomic, copy_issued, copy_arrived };
void access(const void* at, size_t bytes, Kind kind, void* caller);

}  // namespace mllama::emulator::checker
