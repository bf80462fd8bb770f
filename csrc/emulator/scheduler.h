// Fibers, warps and blocks: what the emulator's own files share.
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "emulator/emulator.h"
#include "emulator/stack.h"

namespace mllama::emulator {

// An asynchronous copy under way, or, without bytes, the end of a group of them.
struct Copy {
    void* to;
    const void* from;
    int bytes, valid;
    bool ends_group() const { return bytes == 0; }
};

struct Block;

struct Fiber {
    Stack stack;
    void* place = nullptr;  // on its stack
    Block* block = nullptr;
    int id = 0;  // of the thread in its block
    dim3 index;
    bool ended = false;
    const char* waits_for = "";
    Where where;     // it waits
    int result = 0;  // of the barrier it waited for
    std::vector<Copy> copies;
};

// Lanes that meet at one function.
struct Meeting {
    Function function;
    uint32_t arrived;
    Lanes lanes;
    Where where;
};

struct Warp {
    uint32_t alive = 0;
    std::vector<Meeting> meetings;
};

struct SharedVariable {
    struct Free {
        void operator()(void* memory) const;
    };
    const void* variable;
    std::unique_ptr<void, Free> memory;
    size_t bytes;
};

struct Block {
    dim3 index;
    int alive = 0;
    std::vector<Fiber*> fibers;
    std::vector<Warp> warps;
    std::vector<SharedVariable> shared;
    struct {
        int arrived = 0, value = 0;
        Reduction reduction{};
        Where where;
    } barrier;
};

// How the launch that runs schedules.
struct Schedule {
    Order order;
    Arrival arrival;
    unsigned seed;
};
const Schedule& schedule();

Fiber& running();
// Adds a fiber to those that can go on.
void make_ready(Fiber& fiber);
// Waits until somebody makes the running fiber ready.
void wait(const char* for_what, Where where);
// Lets others go first, unless the order is forward.
void give_way();

std::string describe(const Fiber& fiber);
std::string describe(Where where);

// The running fiber's thread ends: whoever still counts on it is an error.
void leave_warp(Fiber& fiber);
void leave_barrier(Block& block);
void require_no_copies(const Fiber& fiber);

int shared_limit(int architecture);  // bytes of a block

}  // namespace mllama::emulator
