#include "emulator/stack.h"

#include <sys/mman.h>

#include <new>

#if !defined(__x86_64__)
#error "the emulator's switch of stacks is written for x86-64 only"
#endif

// Callee-saved registers go to the old stack and come from the new one.
asm(R"(
.text
.globl mllama_switch_stack
.hidden mllama_switch_stack
.type mllama_switch_stack,@function
mllama_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size mllama_switch_stack,.-mllama_switch_stack
)");

namespace mllama::emulator {

Stack::Stack() {
    void* memory = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    memory_ = static_cast<char*>(memory);
}

Stack::~Stack() { munmap(memory_, kBytes); }

void* Stack::prepare(void (*entry)()) {
    constexpr int kSaved = 6;  // registers that mllama_switch_stack restores
    void** top = reinterpret_cast<void**>(memory_ + kBytes);
    *--top = nullptr;  // where a return address would be, so that the stack is aligned
    *--top = reinterpret_cast<void*>(entry);
    for (int i = 0; i < kSaved; ++i) *--top = nullptr;
    return top;
}

}  // namespace mllama::emulator
