#include "emulator/checker.h"

#include <algorithm>
#include <cstring>
#include <sstream>
#include <unordered_map>
#include <utility>

#include "emulator/regions.h"
#include "emulator/scheduler.h"
#include "emulator/source.h"

namespace mllama::emulator {

namespace checker {

Thread thread;

namespace {

// Up to which epoch the accesses of other blocks come before something. The key is a block's
// number with a thread, whose own accesses of that epoch are included, or with kAnyThread.
using Known = std::unordered_map<uint64_t, uint32_t>;
constexpr uint32_t kAnyThread = ~0u;

uint64_t key(uint32_t block, uint32_t thread) { return uint64_t{block} << 32 | thread; }

void join(Known& into, const Known& from) {
    for (auto [who, epoch] : from) into[who] = std::max(into[who], epoch);
}

struct ThreadState {
    uint32_t clocks[32] = {};  // of the warp's lanes, as this one knows them
    bool fenced = false;       // since its last write to a tensor and the last barrier
    Known observed;            // by atomics, not followed by a fence yet
    Known acquired;            // by a fence after them
};

struct BlockState {
    uint32_t number = 0;  // from 1, in the order in which blocks run
    uint32_t epoch = 1;   // barriers before now, and 1
    std::vector<ThreadState> threads;
    Known acquired;  // before the last barrier
};

Regions regions;
BlockState block;
std::unordered_map<uintptr_t, Known> released;  // by the address of an atomic
const char *arguments_begin, *arguments_end;    // of the kernel: on the launcher's stack

bool knows(const Known& known, const Stamp& s) {
    auto any = known.find(key(s.block, kAnyThread));
    if (any != known.end() && any->second > s.epoch) return true;
    auto own = known.find(key(s.block, s.thread));
    return own != known.end() && own->second >= s.epoch;
}

// Whether an access comes before what the running thread does now.
bool is_before(const Stamp& s) {
    if (s.block == 0) return true;
    const ThreadState& me = block.threads[thread.id];
    if (s.block != block.number) return knows(block.acquired, s) || knows(me.acquired, s);
    if (s.epoch < block.epoch || s.thread == thread.id) return true;
    return s.thread / 32 == thread.id / 32 && me.clocks[s.thread % 32] > s.clock;
}

struct Access {
    uintptr_t at;
    size_t bytes;
    Kind kind;
    void* caller;
    bool writes() const { return kind != Kind::load; }
};

[[noreturn]] void fail(const char* what, const Access& a, const Region* region,
                       const Stamp* other = nullptr) {
    thread = {};  // what follows may call instrumented copies of inline functions
    std::ostringstream text;
    text << what << ": " << (a.writes() ? "write" : "read") << " of " << a.bytes << " bytes";
    if (region) {
        text << " at offset " << static_cast<int64_t>(a.at - region->begin) << " of "
             << region->name << " (" << region->size() << " bytes)";
    }
    if (other && other->block) {
        text << ", against thread " << other->thread << " of block number " << other->block - 1;
    }
    stop(text.str() + source_of(a.caller));
}

// An atomic function hands on what its thread fenced, and observes what others handed on.
void exchange_order(uintptr_t at) {
    ThreadState& me = block.threads[thread.id];
    Known& there = released[at];
    join(me.observed, there);
    if (!me.fenced) return;
    join(there, block.acquired);
    join(there, me.acquired);
    there[key(block.number, kAnyThread)] = there[key(block.number, thread.id)] = block.epoch;
}

void note_read(Cell& cell, const Stamp& now) {
    Stamp* slot = nullptr;
    for (Stamp& s : cell.reads) {
        if (s.block == now.block && s.thread == now.thread) slot = &s;
    }
    if (!slot) slot = is_before(cell.reads[0]) ? &cell.reads[0] : &cell.reads[1];
    *slot = now;
}

void check_byte(Cell& cell, const Region& region, const Access& a, const Stamp& now) {
    if (cell.pending && a.kind != Kind::copy_arrived)
        fail("asynchronous copy has not arrived", a, &region, &cell.write);
    bool known = region.use == Use::read || region.use == Use::update || cell.written;
    if (!known && (a.kind == Kind::load || a.kind == Kind::atomic))
        fail("uninitialized read", a, &region);
    bool both_atomic = a.kind == Kind::atomic && cell.atomic;
    if (!both_atomic && !is_before(cell.write)) fail("race", a, &region, &cell.write);
    if (!a.writes()) return note_read(cell, now);
    for (const Stamp& read : cell.reads) {
        if (!both_atomic && !is_before(read)) fail("race", a, &region, &read);
    }
    cell.write = now;
    cell.written = true;
    cell.atomic = a.kind == Kind::atomic;
    cell.pending = a.kind == Kind::copy_issued;
}

bool is_argument_or_constant(const Access& a) {
    auto* at = reinterpret_cast<const char*>(a.at);
    return !a.writes() && ((arguments_begin <= at && at < arguments_end) || in_this_module(at));
}

}  // namespace

void begin_launch(const void* arguments, size_t arguments_size) {
    regions.begin_launch();
    released.clear();
    block = {};
    arguments_begin = static_cast<const char*>(arguments);
    arguments_end = arguments_begin + arguments_size;
}

void begin_block(int threads) {
    block = {block.number + 1, 1, std::vector<ThreadState>(threads), {}};
}

void end_block() { regions.forget_shared(); }

void allow_shared(const void* begin, size_t bytes, const char* name) {
    regions.add(begin, bytes, Use::write, true, name);
}

void block_barrier() {
    ++block.epoch;
    for (ThreadState& t : block.threads) {
        t.fenced = false;
        join(block.acquired, std::exchange(t.acquired, {}));
    }
}

void warp_barrier(int warp, uint32_t mask) {
    ThreadState* lanes = &block.threads[warp * 32];
    uint32_t joined[32] = {};
    auto for_mask = [mask](auto body) {
        for (int i = 0; i < 32; ++i) {
            if (mask >> i & 1) body(i);
        }
    };
    for_mask([&](int i) {
        ++lanes[i].clocks[i];
        for (int j = 0; j < 32; ++j) joined[j] = std::max(joined[j], lanes[i].clocks[j]);
    });
    for_mask([&](int i) { std::copy_n(joined, 32, lanes[i].clocks); });
}

void fence() {
    if (thread.id < 0) return;
    ThreadState& me = block.threads[thread.id];
    me.fenced = true;
    join(me.acquired, std::exchange(me.observed, {}));
}

void access(const void* address, size_t bytes, Kind kind, void* caller) {
    auto* place = static_cast<const char*>(address);
    if (thread.id < 0 || bytes == 0 || (thread.stack <= place && place < thread.stack_end)) return;
    Access a{reinterpret_cast<uintptr_t>(address), bytes, kind, caller};
    Region* region = regions.find(a.at, bytes);
    if (!region && is_argument_or_constant(a)) return;
    ++counters().accesses;
    if (!region || a.at + bytes > region->end)
        fail("out of bounds", a, region ? region : regions.nearest(a.at));
    if (bytes <= 16 && a.at % bytes) fail("misaligned", a, region);
    if (a.writes() && region->use == Use::read) fail("write to an input", a, region);
    regions.touch(*region);
    if (kind == Kind::atomic) {
        exchange_order(a.at);
    } else if (a.writes() && !region->shared) {
        block.threads[thread.id].fenced = false;
    }
    Stamp now{block.number, block.epoch, block.threads[thread.id].clocks[thread.id % 32],
              thread.id};
    Cell* cells = &region->cells[a.at - region->begin];
    const Cell before = cells[0];
    check_byte(cells[0], *region, a, now);
    for (size_t i = 1; i < bytes; ++i) {  // most know what their neighbor knows
        if (std::memcmp(&cells[i], &before, sizeof before) == 0) {
            cells[i] = cells[0];
        } else {
            check_byte(cells[i], *region, a, now);
        }
    }
}

}  // namespace checker

void allow_tensor(const void* begin, size_t bytes, Use use, const char* name) {
    checker::regions.add(begin, bytes, use, false, name);
}

void forget_tensors() { checker::regions.forget_all(); }

void check_written() {
    std::string missing = checker::regions.unwritten();
    if (!missing.empty()) throw Error(missing + " were never written");
}

}  // namespace mllama::emulator
