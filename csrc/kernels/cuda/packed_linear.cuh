// Products with packed weights. With few rows of x memory speed is all that counts: a block of
// weights has a block of threads, whose warps share out its groups and whose lanes are (row, half
// of a group), so that a warp reads neighboring bytes. With many rows warps multiply tiles by mma:
// the layout's words are mma's registers of A as they lie in memory.
#pragma once

#include "kernels/cuda/packed_linear.h"
#include "kernels/cuda/packed_words.cuh"

namespace mllama::cuda {

using kernels::LinearActivation;
using kernels::PackedLinear;

// Of a multiprocessor at least. Left alone, ptxas saves registers and spills some of q6_k's.
constexpr int kBlocks = 3;

// ---- activations

constexpr int kQuantizeWarps = 8;
constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded

// A warp for each group of each row of x, padding included.
template <class T>
__global__ void __launch_bounds__(32 * kQuantizeWarps)
    quantize_activations(PackedLinear a, int64_t groups) {
    int lane = threadIdx.x % 32;
    int64_t i = int64_t{blockIdx.x} * kQuantizeWarps + threadIdx.x / 32;
    for (; i < a.rows * groups; i += int64_t{gridDim.x} * kQuantizeWarps) {
        int64_t row = i / groups, column = i % groups * kGroup + lane;
        float x = column < a.in ? to_float(static_cast<const T*>(a.x)[row * a.in + column]) : 0;
        float top = warp_max(fabsf(x));
        bool finite = __all_sync(kAllLanes, fabsf(x) <= kLargest);
        // Rounded once: the product and the sum are one operation. Where 127 / top is infinite,
        // codes are 0 or the largest.
        float code = fmaf(x, top > 0 ? 127.0f / top : 0.0f, kRounder) - kRounder;
        code = fminf(fmaxf(code, -127.0f), 127.0f);
        if (!(code == code)) code = 0;
        float scale = finite ? top / 127.0f : __uint_as_float(0x7fc00000u), sum = warp_sum(code);
        a.activations.codes[i * kGroup + lane] = static_cast<int8_t>(code);
        if (lane == 0) {
            a.activations.scales[i] = scale;
            a.activations.values[i] = scale * sum;
        }
    }
}

// Where group `index` of a row of x is among all rows' scales.
MLLAMA_DEVICE int64_t scale_place(const PackedLinear& a, int64_t row, int64_t index) {
    return row * ((a.in + kChunkInputs - 1) / kChunkInputs * kChunkGroups) + index;
}

// ---- results

MLLAMA_DEVICE float activate(LinearActivation activation, float x) {
    switch (activation) {
        case LinearActivation::none: return x;
        case LinearActivation::gelu: return 0.5f * x * erfcf(-0.707106781f * x);
        case LinearActivation::gelu_tanh:
            return x / (1.0f + expf(-1.59576912f * x * (1.0f + 0.044715f * x * x)));
        case LinearActivation::quick_gelu: return x / (1.0f + expf(-1.702f * x));
    }
    return x;
}

template <class T>
MLLAMA_DEVICE void store_result(const PackedLinear& a, int64_t row, int64_t column, float sum) {
    if (row >= a.rows || column >= a.out) return;
    if (a.bias) sum += a.bias[column];
    static_cast<T*>(a.y)[row * a.out + column] = from_float<T>(activate(a.activation, sum));
}

// ---- few rows

constexpr int kFewWarps = 8;

// A lane's half of a group of codes, against rows of x.
template <Packing P>
struct CodeHalf {
    static constexpr int kWords = kGroup / 8;
    MLLAMA_DEVICE CodeHalf(const uint8_t* block, int64_t g, int row, int half)
        : index(g), half(half) {
        PackedGroup<P> group(block, g);
        scale = group.scale(row, half);
        minimum = half == 0 ? group.minimum(row) : 0;  // for the whole group
        MLLAMA_UNROLL for (int i = 0; i < kWords; ++i) words[i] =
            group.word(half * kWords + i, row);
    }
    MLLAMA_DEVICE float dot(const PackedLinear& a, int64_t row) const {
        int64_t at = scale_place(a, row, index);
        const auto* x = reinterpret_cast<const uint32_t*>(a.activations.codes + at * kGroup);
        int sum = 0;
        MLLAMA_UNROLL for (int i = 0; i < kWords; ++i) sum =
            dot_codes(words[i], x[half * kWords + i], sum);
        float y = scale * a.activations.scales[at] * static_cast<float>(sum);
        if constexpr (PackedGroup<P>::kHasMinimum) y += minimum * a.activations.values[at];
        return y;
    }

    int64_t index;
    int half;
    float scale, minimum;
    uint32_t words[kWords];
};

// The same for floats.
template <class W, class T>
struct FloatHalf {
    static constexpr int kInputs = kGroup / 2;
    MLLAMA_DEVICE FloatHalf(const uint8_t* block, int64_t g, int row, int half)
        : first(g * kGroup + half * kInputs) {
        FloatGroup<W> group(block, g);
        MLLAMA_UNROLL for (int i = 0; i < kInputs; ++i) weights[i] =
            group.value(half * kInputs + i, row);
    }
    MLLAMA_DEVICE float dot(const PackedLinear& a, int64_t row) const {
        const T* x = static_cast<const T*>(a.x) + row * a.in;
        float sum = 0;
        for (int i = 0; i < kInputs && first + i < a.in; ++i)
            sum += weights[i] * to_float(x[first + i]);
        return sum;
    }

    int64_t first;
    float weights[kInputs];
};

// Layers after the first, whose blocks of weights follow its own.
struct OtherProducts {
    int count;
    struct {
        const uint8_t* weight;
        const float* bias;
        void* y;
        int64_t out;
    } at[kMostProducts - 1];
};

// Makes `a` the layer that a block of weights, counted through all of them, belongs to; returns
// which of its blocks it is.
MLLAMA_DEVICE int64_t find_product(PackedLinear& a, const OtherProducts& others, int64_t block) {
    MLLAMA_UNROLL for (int i = 0; i < kMostProducts - 1; ++i) {
        int64_t own = (a.out + kLanes - 1) / kLanes;
        if (i >= others.count || block < own) continue;
        block -= own;
        a.weight = others.at[i].weight;
        a.bias = others.at[i].bias;
        a.y = others.at[i].y;
        a.out = others.at[i].out;
    }
    return block;
}

// R rows of x from blockIdx.y * R on, for the block of weights blockIdx.x.
template <class Half, class T, int R>
__global__ void __launch_bounds__(32 * kFewWarps, kBlocks)
    multiply_few(PackedLinear a, OtherProducts others, int64_t bytes) {
    using Parts = Array<float, kFewWarps * R * kLanes>;
    MLLAMA_SHARED(Parts, parts);
    const int64_t index = find_product(a, others, blockIdx.x);
    int warp = threadIdx.x / 32, row = threadIdx.x % kLanes, half = threadIdx.x % 32 / kLanes;
    int64_t first = int64_t{blockIdx.y} * R, groups = (a.in + kGroup - 1) / kGroup;
    const uint8_t* block = a.weight + index * bytes;
    float sums[R] = {};
    for (int64_t g = warp; g < groups; g += kFewWarps) {
        Half weights(block, g, row, half);
        MLLAMA_UNROLL for (int r = 0; r < R; ++r) {
            if (first + r < a.rows) sums[r] += weights.dot(a, first + r);
        }
    }
    MLLAMA_UNROLL for (int r = 0; r < R; ++r) {
        float sum = sums[r] + __shfl_xor_sync(kAllLanes, sums[r], kLanes);
        if (half == 0) parts[(warp * R + r) * kLanes + row] = sum;
    }
    __syncthreads();
    for (int i = threadIdx.x; i < R * kLanes; i += 32 * kFewWarps) {
        float sum = 0;
        for (int w = 0; w < kFewWarps; ++w) sum += parts[w * R * kLanes + i];
        store_result<T>(a, first + i / kLanes, index * kLanes + i % kLanes, sum);
    }
}

// ---- many rows

// A block of threads has kTileWarps blocks of weights and kTileRows rows of x. It copies the next
// kChunkBytes of each row to shared memory while it multiplies those before. A step is what one mma
// takes: 8 words of a row of x.
constexpr int kTileWarps = 4, kTileRows = 64, kTileThreadCount = 32 * kTileWarps;
constexpr int kChunkBytes = 128, kChunkSteps = 4, kStepWords = 8;
constexpr int kRowWords = kChunkBytes / 4 + 4;  // the gap spreads rows over banks

// Where the rows of x are, and how many bytes of each there are.
struct TileRows {
    const char* first;
    int64_t stride, bytes;
};

struct TileStage {
    alignas(16) uint32_t words[kTileRows * kRowWords];
};

// Registers of B for column `lane / 4` of the eight rows from `first` on.
MLLAMA_DEVICE void load_columns(uint32_t (&b)[2], const TileStage& stage, int first, int step) {
    int lane = threadIdx.x % 32;
    const uint32_t* at =
        stage.words + (first + lane / 4) * kRowWords + step * kStepWords + lane % 4;
    b[0] = at[0];
    b[1] = at[4];
}

// Codes: a step is a group. Sums of codes are exact; scales make them floats.
template <Packing P>
struct CodeSteps {
    static constexpr int kInputs = kGroup;  // of a step
    static MLLAMA_DEVICE void multiply(const PackedLinear& a, const uint8_t* block, int64_t index,
                                       int step, int64_t first_row, const TileStage& stage,
                                       float (&sums)[kTileRows / 8][4]) {
        int lane = threadIdx.x % 32, row = lane / 4, q = lane % 4;
        PackedGroup<P> group(block, index);
        uint32_t words[4] = {group.word(q, row), group.word(q, row + 8), group.word(q + 4, row),
                             group.word(q + 4, row + 8)};
        float minima[2] = {group.minimum(row), group.minimum(row + 8)};
        float scales[2][2];  // [row][half]
        for (int i = 0; i < 2; ++i) {
            for (int half = 0; half < 2; ++half) scales[i][half] = group.scale(row + 8 * i, half);
        }
        MLLAMA_UNROLL for (int n = 0; n < kTileRows / 8; ++n) {
            uint32_t b[2];
            load_columns(b, stage, n * 8, step);
            int dots[2][4] = {};  // of halves, where these have scales of their own
            if constexpr (P == Packing::q6_k) {
                mma_codes_16(dots[0], {words[0], words[1]}, b[0]);
                mma_codes_16(dots[1], {words[2], words[3]}, b[1]);
            } else {
                mma_codes_32(dots[0], words, b);
            }
            MLLAMA_UNROLL for (int i = 0; i < 4; ++i) {
                int64_t x = first_row + n * 8 + q * 2 + i % 2;
                if (x >= a.rows) continue;
                int64_t at = scale_place(a, x, index);
                float dot = scales[i / 2][0] * static_cast<float>(dots[0][i]);
                if constexpr (P == Packing::q6_k)
                    dot += scales[i / 2][1] * static_cast<float>(dots[1][i]);
                dot *= a.activations.scales[at];
                if constexpr (PackedGroup<P>::kHasMinimum)
                    dot += minima[i / 2] * a.activations.values[at];
                sums[n][i] += dot;
            }
        }
    }
};

// 16-bit floats: a step is half of a group.
template <class W>
struct FloatSteps {
    static constexpr int kInputs = kGroup / 2;
    static MLLAMA_DEVICE void multiply(const PackedLinear&, const uint8_t* block, int64_t index,
                                       int step, int64_t, const TileStage& stage,
                                       float (&sums)[kTileRows / 8][4]) {
        int lane = threadIdx.x % 32, row = lane / 4, p = index % 2 * kStepWords + lane % 4;
        FloatGroup<W> group(block, index / 2);
        const uint32_t words[4] = {group.pair(p, row), group.pair(p, row + 8),
                                   group.pair(p + 4, row), group.pair(p + 4, row + 8)};
        MLLAMA_UNROLL for (int n = 0; n < kTileRows / 8; ++n) {
            uint32_t b[2];
            load_columns(b, stage, n * 8, step);
            mma_16<W>(sums[n], words, b);
        }
    }
};

template <class Steps, class T>
__global__ void __launch_bounds__(kTileThreadCount, kBlocks)
    multiply_many(PackedLinear a, TileRows x, int64_t bytes) {
    if constexpr (!kRunsHere<false>) return trap("made for another device");
    using Stages = Array<TileStage, 2>;
    MLLAMA_SHARED(Stages, stages);
    int lane = threadIdx.x % 32;
    int64_t first_row = int64_t{blockIdx.y} * kTileRows;
    int64_t index = int64_t{blockIdx.x} * kTileWarps + threadIdx.x / 32;
    bool has_weights = index * kLanes < a.out;
    int64_t steps = (a.in + Steps::kInputs - 1) / Steps::kInputs;
    int64_t chunks = (steps + kChunkSteps - 1) / kChunkSteps;
    float sums[kTileRows / 8][4] = {};

    auto copy = [&](int64_t chunk) {
        TileStage& to = stages[chunk % 2];
        for (int i = threadIdx.x; i < kTileRows * kChunkBytes / 16; i += kTileThreadCount) {
            int row = i / (kChunkBytes / 16);
            int64_t at = chunk * kChunkBytes + i % (kChunkBytes / 16) * 16;
            bool valid = chunk < chunks && first_row + row < a.rows && at < x.bytes;
            const char* from = valid ? x.first + (first_row + row) * x.stride + at : x.first;
            copy_async(to.words + row * kRowWords + i % (kChunkBytes / 16) * 4, from, valid);
        }
        commit_copies();
    };

    copy(0);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
        copy(chunk + 1);
        wait_for_copies<1>();
        __syncthreads();
        if (has_weights) {
            for (int step = 0; step < kChunkSteps; ++step) {
                int64_t place = chunk * kChunkSteps + step;
                if (place < steps) {
                    Steps::multiply(a, a.weight + index * bytes, place, step, first_row,
                                    stages[chunk % 2], sums);
                }
            }
        }
        __syncthreads();  // before the next copy to this stage
    }
    wait_for_copies<0>();
    __syncthreads();
    // Through shared memory, so that neighboring threads write neighboring columns, and the
    // activation's code is there once.
    constexpr int kColumns = kLanes * kTileWarps, kStride = kColumns + 1;
    static_assert(kTileRows * kStride * sizeof(float) <= sizeof(Stages));
    auto* tile = reinterpret_cast<float*>(&stages[0]);
    MLLAMA_UNROLL for (int n = 0; n < kTileRows / 8; ++n) {
        MLLAMA_UNROLL for (int i = 0; i < 4; ++i) {
            int row = n * 8 + lane % 4 * 2 + i % 2,
                column = threadIdx.x / 32 * kLanes + lane / 4 + i / 2 * 8;
            tile[row * kStride + column] = sums[n][i];
        }
    }
    __syncthreads();
    MLLAMA_UNROLL_2 for (int i = threadIdx.x; i < kTileRows * kColumns; i += kTileThreadCount) {
        store_result<T>(a, first_row + i / kColumns, int64_t{blockIdx.x} * kColumns + i % kColumns,
                        tile[i / kColumns * kStride + i % kColumns]);
    }
}

// ---- dense weights

constexpr int kUnpackThreads = 256;

// Element (rows ? rows[i] : i, first + k) of the weight to dense[i, k].
template <class Value, class T>
__global__ void __launch_bounds__(kUnpackThreads)
    unpack_weight(kernels::PackWeight a, const int64_t* rows, int64_t count, int64_t bytes) {
    int64_t i = int64_t{blockIdx.x} * kUnpackThreads + threadIdx.x;
    for (; i < count * a.width; i += int64_t{gridDim.x} * kUnpackThreads) {
        int64_t row = rows ? rows[i / a.width] : i / a.width;
        if (row < 0 || row >= a.out) trap("unpack_weight: rows has an index that is not there");
        float value =
            Value::at(a.packed + row / kLanes * bytes, row % kLanes, a.first + i % a.width);
        static_cast<T*>(a.dense)[i] = from_float<T>(value);
    }
}

template <Packing P>
struct CodeValue {
    static MLLAMA_DEVICE float at(const uint8_t* block, int row, int64_t input) {
        PackedGroup<P> group(block, input / kGroup);
        int k = input % kGroup;
        return group.scale(row, k / (kGroup / 2)) *
                   static_cast<float>(code_of(group.word(k / 4, row), k % 4)) +
               group.minimum(row);
    }
};
template <class W>
struct FloatValue {
    static MLLAMA_DEVICE float at(const uint8_t* block, int row, int64_t input) {
        return FloatGroup<W>(block, input / kGroup).value(input % kGroup, row);
    }
};

}  // namespace mllama::cuda
