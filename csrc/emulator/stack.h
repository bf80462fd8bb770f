// The switch from one stack to another: what makes a fiber.
#pragma once

#include <cstddef>

namespace mllama::emulator {

// Saves the caller's place on its stack in *save and goes on at `load`, saved before or prepared.
extern "C" void mllama_switch_stack(void** save, void* load);

class Stack {
  public:
    Stack();
    ~Stack();
    Stack(const Stack&) = delete;
    Stack& operator=(const Stack&) = delete;

    // A place from which `entry`, which never returns, begins on this stack.
    void* prepare(void (*entry)());
    const char* begin() const { return memory_; }
    const char* end() const { return memory_ + kBytes; }

  private:
    static constexpr size_t kBytes = size_t{256} << 10;
    char* memory_;
};

}  // namespace mllama::emulator
