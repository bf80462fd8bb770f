#include "emulator/scheduler.h"

#include <cstring>
#include <deque>
#include <numeric>

#include "emulator/checker.h"

namespace mllama::emulator {

dim3 thread_index, block_index, block_size, grid_size;

Options& options() {
    static Options options;
    return options;
}
Counters& counters() {
    static Counters counters{};
    return counters;
}

namespace {

std::vector<std::unique_ptr<Fiber>> fibers;  // of one block, used by all
Fiber* current = nullptr;
void* launcher_place;
std::deque<Fiber*> ready;
std::string failure;
Schedule current_schedule;
uint64_t random_state;
struct {
    void (*body)(void*);
    void* arguments;
    size_t dynamic_bytes;
} kernel;

uint64_t next_random() {  // xorshift64
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

// Takes the fiber that goes on next, or null, from those that are ready.
Fiber* next_fiber() {
    if (ready.empty() || !failure.empty()) return nullptr;
    size_t last = ready.size() - 1, chosen = 0;
    if (current_schedule.order == Order::reverse) chosen = last;
    if (current_schedule.order == Order::random) chosen = next_random() % ready.size();
    Fiber* fiber = ready[chosen];
    if (chosen == 0) {
        ready.pop_front();
    } else {
        ready[chosen] = ready[last];
        ready.pop_back();
    }
    return fiber;
}

// Goes on with a fiber, or, without one, with the launcher.
void switch_to(Fiber* to, void** save) {
    current = to;
    checker::thread = {};
    if (to) {
        thread_index = to->index;
        block_index = to->block->index;
        checker::thread = {to->id, to->stack.begin(), to->stack.end()};
        ++counters().switches;
    }
    mllama_switch_stack(save, to ? to->place : launcher_place);
}

void suspend() {
    Fiber* me = current;
    Fiber* next = next_fiber();
    if (next != me) switch_to(next, &me->place);
}

void run_thread() {
    kernel.body(kernel.arguments);
    checker::thread = {};
    Fiber& me = *current;
    require_no_copies(me);
    me.ended = true;
    leave_warp(me);
    leave_barrier(*me.block);
    suspend();
    __builtin_unreachable();
}

void begin(Block& block, dim3 index, int threads) {
    block.index = index;
    block.alive = threads;
    block.warps.resize((threads + 31) / 32);
    checker::begin_block(threads);
    for (int id = 0; id < threads; ++id) {
        if (fibers.size() <= static_cast<size_t>(id)) fibers.push_back(std::make_unique<Fiber>());
        Fiber& fiber = *fibers[id];
        fiber.place = fiber.stack.prepare(&run_thread);
        fiber.block = &block;
        fiber.id = id;
        fiber.index = dim3(id % block_size.x, id / block_size.x % block_size.y,
                           id / (block_size.x * block_size.y));
        fiber.ended = false;
        fiber.copies.clear();
        block.fibers.push_back(&fiber);
        block.warps[id / 32].alive |= 1u << id % 32;
        ready.push_back(&fiber);
    }
}

void run_block(dim3 index, int threads) {
    Block block;
    begin(block, index, threads);
    switch_to(next_fiber(), &launcher_place);
    if (failure.empty() && block.alive) {
        for (Fiber* fiber : block.fibers) {
            if (fiber->ended) continue;
            failure = "deadlock: " + std::to_string(block.alive) + " threads wait, " +
                      describe(*fiber) + " for a " + fiber->waits_for + describe(fiber->where);
            break;
        }
    }
    ready.clear();
    checker::end_block();
    counters().threads += threads;
    ++counters().blocks;
}

// The place of block i in the order in which blocks run: a permutation.
uint64_t ordered(uint64_t i, uint64_t count, uint64_t stride) {
    return current_schedule.order == Order::reverse ? count - 1 - i : i * stride % count;
}

uint64_t random_stride(uint64_t count) {
    if (current_schedule.order != Order::random || count > UINT32_MAX) return 1;
    uint64_t stride = next_random() % count + 1;
    while (std::gcd(stride, count) != 1) ++stride;
    return stride;
}

void check_sizes(const char* name, dim3 grid, dim3 block, size_t dynamic_bytes) {
    uint64_t threads = uint64_t{block.x} * block.y * block.z;
    if (threads == 0 || threads > 1024 || block.z > 64 || grid.x > INT32_MAX || grid.y > 65535 ||
        grid.z > 65535 || uint64_t{grid.x} * grid.y * grid.z == 0)
        throw Error(std::string(name) + ": impossible size of the grid or of a block");
    if (dynamic_bytes > static_cast<size_t>(shared_limit(options().architecture)))
        throw Error(std::string(name) + ": too much shared memory for sm_" +
                    std::to_string(options().architecture));
}

void choose_schedule() {
    Options& o = options();
    uint64_t launch = ++counters().launches;
    current_schedule = {o.order, o.arrival, o.seed};
    if (o.rotate) {
        current_schedule.order = static_cast<Order>(launch % 3);
        current_schedule.arrival = static_cast<Arrival>(launch / 3 % 2);
        current_schedule.seed = o.seed + static_cast<unsigned>(launch);
    }
    random_state = 0x9e3779b97f4a7c15ull * (current_schedule.seed + 1ull);
}

std::string describe(const Schedule& s) {
    const char* orders[] = {"forward", "reverse", "random"};
    return std::string(" (order ") + orders[static_cast<int>(s.order)] + ", copies " +
           (s.arrival == Arrival::late ? "late" : "early") + ", seed " + std::to_string(s.seed) +
           ")";
}

}  // namespace

const Schedule& schedule() { return current_schedule; }
Fiber& running() { return *current; }
void make_ready(Fiber& fiber) { ready.push_back(&fiber); }
int lane_index() { return current->id % 32; }

void wait(const char* for_what, Where where) {
    current->waits_for = for_what;
    current->where = where;
    suspend();
}

void give_way() {
    if (current_schedule.order == Order::forward) return;
    make_ready(*current);
    suspend();
}

void stop(const std::string& text) {
    if (failure.empty()) failure = (current ? describe(*current) + ": " : "") + text;
    void* abandoned;
    switch_to(nullptr, &abandoned);
    __builtin_unreachable();
}

void stop(const char* text) {
    checker::thread = {};
    stop(std::string(text));
}

std::string describe(const Fiber& fiber) {
    auto part = [](unsigned value) { return std::to_string(value); };
    dim3 b = fiber.block->index;
    return "block (" + part(b.x) + "," + part(b.y) + "," + part(b.z) + ") thread " + part(fiber.id);
}

std::string describe(Where where) {
    return std::string(" at ") + where.file_name() + ":" + std::to_string(where.line());
}

int shared_limit(int architecture) {
    switch (architecture) {
        case 75: return 64 << 10;
        case 80: return 163 << 10;
        case 86: return 99 << 10;
        case 90: return 227 << 10;
        default: throw Error("no such architecture: sm_" + std::to_string(architecture));
    }
}

void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_bytes, void (*body)(void*),
            void* arguments, size_t arguments_size) {
    check_sizes(name, grid, block, dynamic_bytes);
    choose_schedule();
    kernel = {body, arguments, dynamic_bytes};
    grid_size = grid;
    block_size = block;
    failure.clear();
    checker::begin_launch(arguments, arguments_size);
    uint64_t count = uint64_t{grid.x} * grid.y * grid.z, stride = random_stride(count);
    for (uint64_t i = 0; i < count && failure.empty(); ++i) {
        uint64_t b = ordered(i, count, stride);
        run_block(dim3(b % grid.x, b / grid.x % grid.y, b / (uint64_t{grid.x} * grid.y)),
                  block.x * block.y * block.z);
    }
    if (!failure.empty()) throw Error(std::string(name) + ": " + failure + describe(schedule()));
}

void* dynamic_shared_memory() {
    static const char variable = 0;
    return shared_memory(&variable, kernel.dynamic_bytes, 128, "dynamic shared memory");
}

}  // namespace mllama::emulator
