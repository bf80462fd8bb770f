// Runs CUDA kernels on the CPU, for tests: the threads of a block are fibers, blocks run one after
// another, and the checker watches every access to memory. emulator/cuda.h has CUDA's names for
// what is declared here.
#pragma once

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <stdexcept>
#include <string>

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

namespace mllama::emulator {

using Where = std::source_location;

// A mistake of a kernel or of its launch; the text names it.
struct Error : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// ---- what a test may choose

enum class Order : int { forward, reverse, random };  // in which ready threads and blocks run
enum class Arrival : int { late, early };  // of asynchronous copies: at the wait, or at the issue

struct Options {
    int architecture = 80;  // 75, 80, 86 or 90: limits shared memory, selects variants of kernels
    bool rotate = true;     // every launch has another order, arrival and seed
    Order order = Order::forward;
    Arrival arrival = Arrival::late;
    unsigned seed = 0;
};
Options& options();

struct Counters {
    uint64_t launches, blocks, threads, switches, collectives, accesses;
};
Counters& counters();

// Ends the running launch with this error.
[[noreturn]] void stop(const std::string& text);
[[noreturn]] void stop(const char* text);  // for kernels, whose strings would be watched

// ---- memory that kernels may touch

// write and scratch: nothing is there yet; all of the former must be written.
enum class Use { read, write, update, scratch };
// Allows memory of a tensor until forget_tensors.
void allow_tensor(const void* begin, size_t bytes, Use use, const char* name);
void forget_tensors();
// Throws unless kernels have written every byte of the tensors of Use::write. `extent` is what has
// no gaps: outputs are contiguous.
void check_written();

// ---- launching

// Runs body(arguments) for every thread.
void launch(const char* name, dim3 grid, dim3 block, size_t dynamic_bytes, void (*body)(void*),
            void* arguments, size_t arguments_size);

// ---- what the running thread sees

extern dim3 thread_index, block_index, block_size, grid_size;

// Memory of the block, by the variable that declares it: fresh for each block, filled with NaN.
void* shared_memory(const void* variable, size_t bytes, size_t align, const char* name);
void* dynamic_shared_memory();

// Functions of a warp. `in` and `out` point to the caller's own variables; the lane that arrives
// last computes all results by `compute`.
enum class Function { barrier, shuffle, vote, ldmatrix, mma };
struct Lanes {
    uint32_t mask;
    const void* in[32];
    void* out[32];
};
void warp_function(Function function, uint32_t mask, const void* in, void* out,
                   void (*compute)(Lanes&), Where where);
void warp_barrier(uint32_t mask, Where where);
int lane_index();

enum class Reduction { none, count, all, any };
// Waits for all threads of the block; returns the reduction of their predicates.
int block_barrier(Reduction reduction, int predicate, Where where);

// Asynchronous copies to shared memory: `valid` of `bytes` bytes, then zeros.
void copy_async(void* to, const void* from, int bytes, int valid);
void commit_copies();
void wait_for_copies(int pending_groups);

// Accesses that the compiler does not report.
void check_load(const void* from, size_t bytes);
void check_store(void* to, size_t bytes);
void check_atomic(void* at, size_t bytes);
void fence();

// Tensor-core instructions on the registers of the calling warp, for f16 or bf16.
struct MatrixRegisters {
    uint32_t a[4], b[2];
    int depth;  // columns of A: 8 or 16; of codes 16 or 32
    bool is_bf16;
};
void mma(float (&d)[4], const MatrixRegisters& registers, Where where);
void mma_codes(int (&d)[4], const MatrixRegisters& registers, Where where);  // signed bytes
// `matrices` is 1, 2 or 4; `row` is where this lane's row of 16 bytes begins.
void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed, Where where);

}  // namespace mllama::emulator
