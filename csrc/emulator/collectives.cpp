// Where threads meet: barriers, functions of a warp, and the memory that a block shares.
#include <cstdlib>
#include <cstring>
#include <new>

#include "emulator/checker.h"
#include "emulator/scheduler.h"

namespace mllama::emulator {
namespace {

void open_barrier(Block& block) {
    checker::block_barrier();
    block.barrier.arrived = 0;
    for (Fiber* fiber : block.fibers) {
        if (fiber->ended || fiber == &running()) continue;
        fiber->result = block.barrier.value;
        make_ready(*fiber);
    }
}

// The mask without lanes that the last warp of a block never had: devices ignore them.
uint32_t existing(uint32_t mask, const Fiber& fiber) {
    size_t first = fiber.id / 32 * 32, lanes = fiber.block->fibers.size() - first;
    return lanes >= 32 ? mask : mask & ((1u << lanes) - 1);
}

Meeting& join(Warp& warp, Function function, uint32_t mask, int lane, Where where) {
    for (Meeting& m : warp.meetings) {
        bool same = m.lanes.mask == mask && m.function == function;
        if (same && !(m.arrived >> lane & 1)) return m;
        if (m.lanes.mask & mask)
            stop("wrong mask: it calls a function of the warp" + describe(where) +
                 ", where other lanes of its mask are" + describe(m.where) +
                 ", with another mask or function");
    }
    warp.meetings.push_back({function, 0, {.mask = mask, .in = {}, .out = {}}, where});
    return warp.meetings.back();
}

}  // namespace

void SharedVariable::Free::operator()(void* memory) const { std::free(memory); }

int block_barrier(Reduction reduction, int predicate, Where where) {
    checker::Unwatched unwatched;
    Fiber& me = running();
    Block& block = *me.block;
    auto& b = block.barrier;
    ++counters().collectives;
    if (b.arrived == 0) {
        b = {.arrived = 0,
             .value = reduction == Reduction::all,
             .reduction = reduction,
             .where = where};
    } else if (b.where.line() != where.line() || b.reduction != reduction) {
        stop("divergent barrier: it is" + describe(where) + ", others are" + describe(b.where));
    }
    if (reduction == Reduction::count) b.value += predicate != 0;
    if (reduction == Reduction::all) b.value &= predicate != 0;
    if (reduction == Reduction::any) b.value |= predicate != 0;
    if (++b.arrived == block.alive) {
        me.result = b.value;
        open_barrier(block);
        give_way();
    } else {
        wait("barrier", where);
    }
    return me.result;
}

void leave_barrier(Block& block) {
    --block.alive;
    if (block.alive && block.barrier.arrived == block.alive) open_barrier(block);
}

void warp_function(Function function, uint32_t mask, const void* in, void* out,
                   void (*compute)(Lanes&), Where where) {
    checker::Unwatched unwatched;
    Fiber& me = running();
    int lane = me.id % 32, warp_number = me.id / 32;
    Warp& warp = me.block->warps[warp_number];
    ++counters().collectives;
    if (!(mask >> lane & 1)) stop("wrong mask: it does not name the lane itself" + describe(where));
    mask = existing(mask, me);
    if (mask & ~warp.alive) stop("wrong mask: it names lanes that have ended" + describe(where));
    Meeting& meeting = join(warp, function, mask, lane, where);
    meeting.arrived |= 1u << lane;
    meeting.lanes.in[lane] = in;
    meeting.lanes.out[lane] = out;
    if (meeting.arrived != mask) return wait("function of the warp", where);

    Lanes lanes = meeting.lanes;
    warp.meetings.erase(warp.meetings.begin() + (&meeting - warp.meetings.data()));
    if (compute) compute(lanes);
    if (function == Function::barrier) checker::warp_barrier(warp_number, mask);
    for (int i = 0; i < 32; ++i) {
        if (i != lane && mask >> i & 1) make_ready(*me.block->fibers[warp_number * 32 + i]);
    }
    give_way();
}

void warp_barrier(uint32_t mask, Where where) {
    warp_function(Function::barrier, mask, nullptr, nullptr, nullptr, where);
}

void leave_warp(Fiber& fiber) {
    Warp& warp = fiber.block->warps[fiber.id / 32];
    uint32_t lane = 1u << fiber.id % 32;
    warp.alive &= ~lane;
    for (const Meeting& m : warp.meetings) {
        if (m.lanes.mask & lane)
            stop("wrong mask: it ends, but lanes wait for it" + describe(m.where));
    }
}

void* shared_memory(const void* variable, size_t bytes, size_t align, const char* name) {
    checker::Unwatched unwatched;
    Block& block = *running().block;
    size_t used = bytes;
    for (const SharedVariable& s : block.shared) {
        if (s.variable == variable) return s.memory.get();
        used += s.bytes;
    }
    if (used > static_cast<size_t>(shared_limit(options().architecture)))
        stop("too much shared memory for sm_" + std::to_string(options().architecture));
    void* memory = nullptr;
    if (posix_memalign(&memory, align < 16 ? 16 : align, bytes ? bytes : 1)) throw std::bad_alloc();
    std::memset(memory, 0xff, bytes);
    block.shared.push_back({variable, std::unique_ptr<void, SharedVariable::Free>(memory), bytes});
    checker::allow_shared(memory, bytes, name);
    return memory;
}

void stop_shuffle(int lane, Where where) {
    stop("shuffle from lane " + std::to_string(lane) + ", which is not in the mask" +
         describe(where));
}

// ---- asynchronous copies

namespace {

void arrive(const Copy& copy) {
    checker::access(copy.to, copy.bytes, checker::Kind::copy_arrived, nullptr);
    if (schedule().arrival == Arrival::early) return;  // the bytes are there already
    std::memcpy(copy.to, copy.from, copy.valid);
    std::memset(static_cast<char*>(copy.to) + copy.valid, 0, copy.bytes - copy.valid);
}

}  // namespace

void copy_async(void* to, const void* from, int bytes, int valid) {
    void* caller = __builtin_return_address(0);
    checker::access(from, valid, checker::Kind::load, caller);
    checker::access(to, bytes, checker::Kind::copy_issued, caller);
    if (schedule().arrival == Arrival::early) {
        std::memcpy(to, from, valid);
        std::memset(static_cast<char*>(to) + valid, 0, bytes - valid);
    }
    running().copies.push_back({to, from, bytes, valid});
}

void commit_copies() { running().copies.push_back({nullptr, nullptr, 0, 0}); }

void wait_for_copies(int pending_groups) {
    auto& copies = running().copies;
    int groups = 0;
    for (const Copy& copy : copies) groups += copy.ends_group();
    size_t done = 0;
    for (; groups > pending_groups; ++done) {
        if (copies[done].ends_group()) {
            --groups;
        } else {
            arrive(copies[done]);
        }
    }
    copies.erase(copies.begin(), copies.begin() + done);
}

void require_no_copies(const Fiber& fiber) {
    for (const Copy& copy : fiber.copies) {
        if (!copy.ends_group()) stop("asynchronous copy that nobody waits for");
    }
}

// ---- accesses that the compiler does not report

void check_load(const void* from, size_t bytes) {
    checker::access(from, bytes, checker::Kind::load, __builtin_return_address(0));
}
void check_store(void* to, size_t bytes) {
    checker::access(to, bytes, checker::Kind::store, __builtin_return_address(0));
}
void check_atomic(void* at, size_t bytes) {
    checker::access(at, bytes, checker::Kind::atomic, __builtin_return_address(0));
}
void fence() { checker::fence(); }

}  // namespace mllama::emulator
