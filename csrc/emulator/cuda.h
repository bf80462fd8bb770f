// CUDA's names for a C++ compiler: those that the kernels use. Compile with -fno-strict-aliasing,
// since kernels read arrays as vectors.
#pragma once

#include <bit>
#include <cmath>
#include <type_traits>

#include "emulator/emulator.h"

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

#define threadIdx (::mllama::emulator::thread_index)
#define blockIdx (::mllama::emulator::block_index)
#define blockDim (::mllama::emulator::block_size)
#define gridDim (::mllama::emulator::grid_size)

// The call's own place, which errors name.
#define MLLAMA_HERE ::mllama::emulator::Where where = ::mllama::emulator::Where::current()

// ---- barriers, shuffles and votes

inline void __syncthreads(MLLAMA_HERE) {
    mllama::emulator::block_barrier(mllama::emulator::Reduction::none, 0, where);
}
inline int __syncthreads_count(int predicate, MLLAMA_HERE) {
    return mllama::emulator::block_barrier(mllama::emulator::Reduction::count, predicate, where);
}
inline int __syncthreads_and(int predicate, MLLAMA_HERE) {
    return mllama::emulator::block_barrier(mllama::emulator::Reduction::all, predicate, where);
}
inline int __syncthreads_or(int predicate, MLLAMA_HERE) {
    return mllama::emulator::block_barrier(mllama::emulator::Reduction::any, predicate, where);
}
inline void __syncwarp(uint32_t mask = ~0u, MLLAMA_HERE) {
    mllama::emulator::warp_barrier(mask, where);
}

namespace mllama::emulator {

[[noreturn]] void stop_shuffle(int lane, Where where);

// Every lane gets the value of the lane that it names.
template <class T>
T shuffle(uint32_t mask, T value, int source, Where where) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    struct In {
        T value;
        int source;
        Where where;
    } in{value, source, where};
    T out;
    auto compute = [](Lanes& lanes) {
        for (int i = 0; i < 32; ++i) {
            if (!(lanes.mask >> i & 1)) continue;
            const In& me = *static_cast<const In*>(lanes.in[i]);
            if (!(lanes.mask >> me.source & 1)) stop_shuffle(me.source, me.where);
            *static_cast<T*>(lanes.out[i]) = static_cast<const In*>(lanes.in[me.source])->value;
        }
    };
    warp_function(Function::shuffle, mask, &in, &out, compute, where);
    return out;
}

}  // namespace mllama::emulator

// Within groups of `width` lanes; a lane whose source would be outside of its group keeps its own.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, MLLAMA_HERE) {
    int first = mllama::emulator::lane_index() & ~(width - 1);
    return mllama::emulator::shuffle(mask, value, first + (source & (width - 1)), where);
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, int delta, int width = 32, MLLAMA_HERE) {
    int lane = mllama::emulator::lane_index(), place = lane & (width - 1);
    return mllama::emulator::shuffle(mask, value, place >= delta ? lane - delta : lane, where);
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, int delta, int width = 32, MLLAMA_HERE) {
    int lane = mllama::emulator::lane_index(), place = lane & (width - 1);
    return mllama::emulator::shuffle(mask, value, place + delta < width ? lane + delta : lane,
                                     where);
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, MLLAMA_HERE) {
    int lane = mllama::emulator::lane_index();
    bool in_group = (lane & ~(width - 1)) == ((lane ^ bits) & ~(width - 1));
    return mllama::emulator::shuffle(mask, value, in_group ? lane ^ bits : lane, where);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, MLLAMA_HERE) {
    uint32_t out;
    auto compute = [](mllama::emulator::Lanes& lanes) {
        uint32_t bits = 0;
        for (int i = 0; i < 32; ++i) {
            if (lanes.mask >> i & 1 && *static_cast<const int*>(lanes.in[i])) bits |= 1u << i;
        }
        for (int i = 0; i < 32; ++i) {
            if (lanes.mask >> i & 1) *static_cast<uint32_t*>(lanes.out[i]) = bits;
        }
    };
    mllama::emulator::warp_function(mllama::emulator::Function::vote, mask, &predicate, &out,
                                    compute, where);
    return out;
}
inline int __any_sync(uint32_t mask, int predicate, MLLAMA_HERE) {
    return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(uint32_t mask, int predicate, MLLAMA_HERE) {
    return __ballot_sync(mask, !predicate, where) == 0;
}

// ---- atomics: fibers are never interrupted, so that a plain update is one

namespace mllama::emulator {

template <class T, class F>
__attribute__((noinline, no_sanitize("thread"))) T update(T* at, F&& change) {
    check_atomic(at, sizeof(T));
    T old = *at;
    *at = change(old);
    return old;
}

}  // namespace mllama::emulator

template <class T>
T atomicAdd(T* at, std::type_identity_t<T> value) {
    return mllama::emulator::update(at, [=](T old) -> T { return old + value; });
}
template <class T>
T atomicMax(T* at, std::type_identity_t<T> value) {
    return mllama::emulator::update(at, [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomicExch(T* at, std::type_identity_t<T> value) {
    return mllama::emulator::update(at, [=](T) { return value; });
}
template <class T>
T atomicCAS(T* at, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
    return mllama::emulator::update(at, [=](T old) { return old == expected ? value : old; });
}
inline void __threadfence() { mllama::emulator::fence(); }

// ---- arithmetic

inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float sinpif(float x) { return static_cast<float>(std::sin(M_PI * x)); }
inline float cospif(float x) { return static_cast<float>(std::cos(M_PI * x)); }
inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __dp4a(int a, int b, int sum) {  // of four signed bytes
    for (int i = 0; i < 32; i += 8)
        sum += static_cast<int8_t>(a >> i) * static_cast<int8_t>(b >> i);
    return sum;
}
inline int __clz(int bits) { return std::countl_zero(static_cast<uint32_t>(bits)); }
