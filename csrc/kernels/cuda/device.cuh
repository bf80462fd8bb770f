// What kernels use of a device: CUDA's own under nvcc, the emulator's under a C++ compiler. The
// only file with assembly, and the only one that tells the two apart.
#pragma once

#include <cstdint>
#include <limits>
#include <tuple>
#include <type_traits>

#include "kernels/cuda/stream.h"
#include "simd/types.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#define MLLAMA_UNROLL _Pragma("unroll")
#define MLLAMA_UNROLL_2 _Pragma("unroll 2")
#else
#include "emulator/cuda.h"
#include "emulator/half.h"
#define MLLAMA_UNROLL  // it would take the C++ compiler longer
#define MLLAMA_UNROLL_2
#endif
#define MLLAMA_DEVICE __device__ __forceinline__

namespace mllama::cuda {

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLargest = std::numeric_limits<float>::max();

template <class T, int N>
struct Array {
    T at[N];
    MLLAMA_DEVICE T& operator[](int i) { return at[i]; }
    MLLAMA_DEVICE const T& operator[](int i) const { return at[i]; }
};

// MLLAMA_SHARED(type, name): memory of the block. Arrays are Array<T, N>.
#if defined(__CUDACC__)
#define MLLAMA_SHARED(type, name) __shared__ type name
template <class T>
MLLAMA_DEVICE T* dynamic_shared() {
    extern __shared__ __align__(128) unsigned char mllama_dynamic[];
    return reinterpret_cast<T*>(mllama_dynamic);
}
#else
#define MLLAMA_SHARED(type, name)       \
    static const char name##_place = 0; \
    auto& name = *static_cast<type*>(   \
        ::mllama::emulator::shared_memory(&name##_place, sizeof(type), alignof(type), #name))
template <class T>
T* dynamic_shared() {
    return static_cast<T*>(::mllama::emulator::dynamic_shared_memory());
}
#endif

// ---- conversions

MLLAMA_DEVICE float to_float(float v) { return v; }
MLLAMA_DEVICE float to_float(int8_t v) { return v; }
MLLAMA_DEVICE float to_float(bf16 v) {
    return __uint_as_float(static_cast<uint32_t>(v.bits) << 16);
}
template <class T>
MLLAMA_DEVICE T from_float(float v);
template <>
MLLAMA_DEVICE float from_float<float>(float v) {
    return v;
}
#if defined(__CUDACC__)
MLLAMA_DEVICE float to_float(f16 v) { return __half2float(__ushort_as_half(v.bits)); }
template <>
MLLAMA_DEVICE bf16 from_float<bf16>(float v) {
    return {__bfloat16_as_ushort(__float2bfloat16_rn(v))};
}
template <>
MLLAMA_DEVICE f16 from_float<f16>(float v) {
    return {__half_as_ushort(__float2half_rn(v))};
}
#else
inline float to_float(f16 v) { return emulator::to_float(v); }
template <>
inline bf16 from_float<bf16>(float v) {
    return emulator::to_bf16(v);
}
template <>
inline f16 from_float<f16>(float v) {
    return emulator::to_f16(v);
}
#endif
// v as a T holds it.
template <class T>
MLLAMA_DEVICE float rounded(float v) {
    return to_float(from_float<T>(v));
}
// Two as one register; a in its low half.
template <class T>
MLLAMA_DEVICE uint32_t pack(float a, float b) {
#if defined(__CUDACC__)  // one instruction on sm_80
    if constexpr (std::is_same_v<T, bf16>) {
        __nv_bfloat162 both = __floats2bfloat162_rn(a, b);
        return reinterpret_cast<uint32_t&>(both);
    } else {
        __half2 both = __floats2half2_rn(a, b);
        return reinterpret_cast<uint32_t&>(both);
    }
#else
    return from_float<T>(a).bits | static_cast<uint32_t>(from_float<T>(b).bits) << 16;
#endif
}

// ---- arithmetic

// 2^x with a relative error of 2^-22; 0 for results below the least normal number.
#if defined(__CUDACC__)
MLLAMA_DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
#else
inline float fast_exp2(float x) { return x < -126 ? 0 : std::exp2(x); }
#endif

// sum + the dot product of four signed bytes.
MLLAMA_DEVICE int dot_codes(uint32_t a, uint32_t b, int sum) {
    return __dp4a(static_cast<int>(a), static_cast<int>(b), sum);
}

// ---- loads and stores of several elements

template <class T, int N>
struct alignas(sizeof(T) * N) Vector {
    T at[N];
};

// Elements of T that one instruction moves.
template <class T>
constexpr int kVector = 16 / sizeof(T);

template <int N, class T>
MLLAMA_DEVICE void load(float (&to)[N], const T* from) {
    constexpr int kPart = N < kVector<T> ? N : kVector<T>;
    MLLAMA_UNROLL for (int i = 0; i < N; i += kPart) {
        Vector<T, kPart> v;
#if defined(__CUDACC__)
        v = *reinterpret_cast<const Vector<T, kPart>*>(from + i);
#else
        emulator::check_load(from + i, sizeof v);
        __builtin_memcpy(&v, from + i, sizeof v);
#endif
        MLLAMA_UNROLL for (int j = 0; j < kPart; ++j) to[i + j] = to_float(v.at[j]);
    }
}

template <int N, class T>
MLLAMA_DEVICE void store(T* to, const float (&from)[N]) {
    constexpr int kPart = N < kVector<T> ? N : kVector<T>;
    MLLAMA_UNROLL for (int i = 0; i < N; i += kPart) {
        Vector<T, kPart> v;
        MLLAMA_UNROLL for (int j = 0; j < kPart; ++j) v.at[j] = from_float<T>(from[i + j]);
#if defined(__CUDACC__)
        *reinterpret_cast<Vector<T, kPart>*>(to + i) = v;
#else
        emulator::check_store(to + i, sizeof v);
        __builtin_memcpy(to + i, &v, sizeof v);
#endif
    }
}

// ---- reductions in a fixed order, the result in every thread

struct Sum {
    template <class V>
    MLLAMA_DEVICE V operator()(V a, V b) const {
        return a + b;
    }
};
struct Largest {
    MLLAMA_DEVICE float operator()(float a, float b) const { return fmaxf(a, b); }
    MLLAMA_DEVICE uint64_t operator()(uint64_t a, uint64_t b) const { return a > b ? a : b; }
};

template <class Combine, class V>
MLLAMA_DEVICE V warp_reduce(V v) {
    MLLAMA_UNROLL for (int step = 16; step; step /= 2) {
        v = Combine{}(v, __shfl_xor_sync(kAllLanes, v, step));
    }
    return v;
}
MLLAMA_DEVICE float warp_sum(float v) { return warp_reduce<Sum>(v); }
MLLAMA_DEVICE float warp_max(float v) { return warp_reduce<Largest>(v); }

template <class Combine, int kWarps, class V>
MLLAMA_DEVICE V block_reduce(V v) {
    using Parts = Array<V, kWarps>;
    MLLAMA_SHARED(Parts, parts);
    v = warp_reduce<Combine>(v);
    __syncthreads();  // the last use of parts is over
    if (threadIdx.x % 32 == 0) parts[threadIdx.x / 32] = v;
    __syncthreads();
    v = parts[0];
    MLLAMA_UNROLL for (int i = 1; i < kWarps; ++i) v = Combine{}(v, parts[i]);
    return v;
}

// ---- asynchronous copies, ldmatrix and mma (sm_80; mma_8 and ldmatrix: sm_75)

#if defined(__CUDACC__)

MLLAMA_DEVICE uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// 16 bytes from global to shared memory; zeros unless valid.
MLLAMA_DEVICE void copy_async(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)),
                 "l"(from), "r"(valid ? 16 : 0)
                 : "memory");
#else
    *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
#endif
}
// Ends a group of copies.
MLLAMA_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
// Waits until at most kPending of this thread's groups are under way.
template <int kPending>
MLLAMA_DEVICE void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
#endif
}

// Four 8x8 matrices of 16-bit elements; lane i names row i % 8 of matrix i / 8.
MLLAMA_DEVICE void ldmatrix(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}
MLLAMA_DEVICE void ldmatrix_transposed(uint32_t (&r)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(shared_address(row))
                 : "memory");
}

#define MLLAMA_MMA_16(type)                                                   \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type       \
                 ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]))
// d += a b for a 16x16 by rows, b 16x8 by columns, of f16 or bf16.
template <class T>
MLLAMA_DEVICE void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    if constexpr (std::is_same_v<T, bf16>) {
        MLLAMA_MMA_16("bf16");
    } else {
        MLLAMA_MMA_16("f16");
    }
#else
    __trap();  // hosts select other variants for this device
#endif
}
#undef MLLAMA_MMA_16
// The same for a 16x8 and b 8x8, of f16.
MLLAMA_DEVICE void mma_8(float (&d)[4], const uint32_t (&a)[2], uint32_t b) {
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5}, {%6}, "
        "{%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(b));
}

#define MLLAMA_MMA_CODES(shape, a_registers, b_registers, ...)                                  \
    asm volatile("mma.sync.aligned." shape ".row.col.s32.s8.s8.s32 {%0,%1,%2,%3}, " a_registers \
                 ", " b_registers ", {%0,%1,%2,%3};"                                            \
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                               \
                 : __VA_ARGS__)
// d += a b for a 16x32 by rows, b 32x8 by columns, of signed bytes (sm_80).
MLLAMA_DEVICE void mma_codes_32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
    MLLAMA_MMA_CODES("m16n8k32", "{%4,%5,%6,%7}", "{%8,%9}", "r"(a[0]), "r"(a[1]), "r"(a[2]),
                     "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
    __trap();
#endif
}
// The same for a 16x16 and b 16x8.
MLLAMA_DEVICE void mma_codes_16(int (&d)[4], const uint32_t (&a)[2], uint32_t b) {
#if __CUDA_ARCH__ >= 800
    MLLAMA_MMA_CODES("m16n8k16", "{%4,%5}", "{%6}", "r"(a[0]), "r"(a[1]), "r"(b));
#else
    __trap();
#endif
}
#undef MLLAMA_MMA_CODES
// Ends the kernel with an error.
MLLAMA_DEVICE void trap(const char*) { __trap(); }
constexpr int64_t kMostBlocks = 1 << 20;

#else

inline void copy_async(void* to, const void* from, bool valid) {
    emulator::copy_async(to, from, 16, valid ? 16 : 0);
}
inline void commit_copies() { emulator::commit_copies(); }
template <int kPending>
void wait_for_copies() {
    emulator::wait_for_copies(kPending);
}
inline void ldmatrix(uint32_t (&r)[4], const void* row, MLLAMA_HERE) {
    emulator::ldmatrix(r, row, 4, false, where);
}
inline void ldmatrix_transposed(uint32_t (&r)[4], const void* row, MLLAMA_HERE) {
    emulator::ldmatrix(r, row, 4, true, where);
}
template <class T>
void mma_16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MLLAMA_HERE) {
    constexpr bool kIsBf16 = std::is_same_v<T, bf16>;
    emulator::mma(d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, 16, kIsBf16}, where);
}
inline void mma_8(float (&d)[4], const uint32_t (&a)[2], uint32_t b, MLLAMA_HERE) {
    emulator::mma(d, {{a[0], a[1]}, {b}, 8, false}, where);
}
inline void mma_codes_32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], MLLAMA_HERE) {
    emulator::mma_codes(d, {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}, 32, false}, where);
}
inline void mma_codes_16(int (&d)[4], const uint32_t (&a)[2], uint32_t b, MLLAMA_HERE) {
    emulator::mma_codes(d, {{a[0], a[1]}, {b}, 16, false}, where);
}
inline void trap(const char* why) { emulator::stop(why); }
constexpr int64_t kMostBlocks = 5;  // so that tests reach the second stride

#endif

// ---- architectures: hosts select variants of kernels by `architecture`

// Whether the variant for sm_75, or that for later devices, is compiled in this pass: elsewhere its
// kernels only stop.
#if defined(__CUDA_ARCH__)
template <bool kTuring>
constexpr bool kRunsHere = kTuring == (__CUDA_ARCH__ < 800);
#else
template <bool kTuring>
constexpr bool kRunsHere = true;
#endif

// The current device's compute capability: 75, 80, ...
inline int architecture() {
#if defined(__CUDACC__)
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    return 10 * major + minor;
#else
    return emulator::options().architecture;
#endif
}

// ---- launching

// How many blocks have `size` units of work, `per_block` in each. If there would be more than
// kMostBlocks, kernels go through their work in strides of the grid.
inline unsigned blocks_for(int64_t size, int64_t per_block) {
    int64_t blocks = (size + per_block - 1) / per_block;
    return static_cast<unsigned>(blocks < kMostBlocks ? blocks : kMostBlocks);
}

// Whether vectors of kVector elements can be loaded at each of the addresses.
template <class... Pointers>
bool are_aligned(Pointers... pointers) {
    return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// Runs the kernel, unless its grid is empty.
template <class... Parameters, class... Arguments>
void launch([[maybe_unused]] const char* name, void (*kernel)(Parameters...), dim3 grid, dim3 block,
            size_t dynamic_bytes, [[maybe_unused]] Stream stream, Arguments&&... arguments) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return;
#if defined(__CUDACC__)
    if (dynamic_bytes > 48 * 1024) {
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(dynamic_bytes));
    }
    kernel<<<grid, block, dynamic_bytes, stream>>>(static_cast<Parameters>(arguments)...);
#else
    struct Call {
        void (*kernel)(Parameters...);
        std::tuple<Parameters...> arguments;
    } call{kernel, {static_cast<Parameters>(arguments)...}};
    auto body = [](void* c) {
        auto& call = *static_cast<Call*>(c);
        std::apply(call.kernel, call.arguments);
    };
    emulator::launch(name, grid, block, dynamic_bytes, body, &call, sizeof call);
#endif
}

}  // namespace mllama::cuda
