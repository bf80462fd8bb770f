// The memory that kernels may touch, and what is known of each byte.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "emulator/emulator.h"

namespace mllama::emulator {

// When an access happened. block 0: never.
struct Stamp {
    uint32_t block = 0;  // by the order in which blocks ran in a launch, from 1
    uint32_t epoch = 0;  // barriers of the block before it
    uint32_t clock = 0;  // barriers of the warp before it
    int32_t thread = -1;
};

struct Cell {
    Stamp write, reads[2];
    bool written = false;  // in this launch or an earlier one
    bool atomic = false;   // the last write was
    bool pending = false;  // an asynchronous copy is on its way
    bool unused = false;   // no padding: cells are compared as bytes
};
static_assert(std::has_unique_object_representations_v<Cell>);

struct Region {
    uintptr_t begin, end;
    Use use;
    bool shared;  // memory of the block that runs
    std::string name;
    std::vector<Cell> cells;  // of each byte; empty until a kernel touches one
    uint64_t launch = 0;      // that touched it last

    size_t size() const { return end - begin; }
    bool holds(uintptr_t at) const { return begin <= at && at < end; }
};

class Regions {
  public:
    void add(const void* begin, size_t bytes, Use use, bool shared, const char* name);
    void forget_shared();
    void forget_all();
    void begin_launch() { ++launch_; }
    // Before its cells are used: forgets when earlier launches accessed them, not that they wrote.
    void touch(Region& region);
    // The region of an address: one that holds all bytes, if any does.
    Region* find(uintptr_t at, size_t bytes);
    // The one that is least far away, or null.
    const Region* nearest(uintptr_t at) const;
    // Of regions of Use::write: "N bytes of NAME", or empty.
    std::string unwritten() const;

  private:
    std::vector<std::unique_ptr<Region>> all_;
    Region* last_ = nullptr;  // found last
    uint64_t launch_ = 0;
};

}  // namespace mllama::emulator
