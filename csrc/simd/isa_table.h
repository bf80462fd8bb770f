// The instruction sets, weakest first, each of the ones above it and more: ROW(name, whether this
// CPU has what it adds, the compiler flags it adds). CMakeLists.txt reads names and flags here.
#pragma once

#if defined(__x86_64__)
#define MLLAMA_X86_ROWS(ROW, ...)                                                             \
    ROW(avx2, (HAS("avx2") && HAS("fma") && HAS("f16c")), "-mavx2 -mfma -mf16c", __VA_ARGS__) \
    ROW(avx512, (HAS("avx512f") && HAS("avx512bw") && HAS("avx512dq") && HAS("avx512vl")),    \
        "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mprefer-vector-width=512", __VA_ARGS__)  \
    ROW(avx512_bf16, (HAS("avx512bf16") && HAS("avx512vnni")), "-mavx512bf16 -mavx512vnni",   \
        __VA_ARGS__)
#else
#define MLLAMA_X86_ROWS(ROW, ...)
#endif

#define MLLAMA_ISA_TABLE(ROW, ...)     \
    ROW(scalar, true, "", __VA_ARGS__) \
    MLLAMA_X86_ROWS(ROW, __VA_ARGS__)
