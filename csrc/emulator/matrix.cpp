// ldmatrix and mma, with the layouts of registers that the PTX manual gives for m16n8k8, m16n8k16
// and m16n8k32: lane 4 g + t has rows g and g + 8 of A and D, column g of B, and pairs of columns
// (rows of B) from 2 t on; of bytes, four from 4 t on.
#include <cstring>

#include "emulator/checker.h"
#include "emulator/half.h"
#include "emulator/scheduler.h"

namespace mllama::emulator {
namespace {

constexpr uint32_t kAllLanes = ~0u;

float half_of(uint32_t pair, int i, bool is_bf16) {
    auto bits = static_cast<uint16_t>(i ? pair >> 16 : pair);
    return is_bf16 ? to_float(bf16{bits}) : to_float(f16{bits});
}

struct Product {
    float a[16][16] = {}, b[16][8] = {};

    void gather(const Lanes& lanes) {
        for (int lane = 0; lane < 32; ++lane) {
            const auto& r = *static_cast<const MatrixRegisters*>(lanes.in[lane]);
            int g = lane / 4, t = lane % 4 * 2;
            for (int i = 0; i < 2; ++i) {
                for (int k = 0; k < r.depth; k += 8) {
                    a[g][t + k + i] = half_of(r.a[k / 4], i, r.is_bf16);
                    a[g + 8][t + k + i] = half_of(r.a[k / 4 + 1], i, r.is_bf16);
                    b[t + k + i][g] = half_of(r.b[k / 8], i, r.is_bf16);
                }
            }
        }
    }
    float at(int row, int column) const {
        float sum = 0;
        for (int k = 0; k < 16; ++k) sum += a[row][k] * b[k][column];
        return sum;
    }
};

void multiply(Lanes& lanes) {
    Product product;
    product.gather(lanes);
    for (int lane = 0; lane < 32; ++lane) {
        auto* d = static_cast<float*>(lanes.out[lane]);
        int g = lane / 4, t = lane % 4 * 2;
        for (int i = 0; i < 4; ++i) d[i] += product.at(g + i / 2 * 8, t + i % 2);
    }
}

void multiply_codes(Lanes& lanes) {
    int a[16][32] = {}, b[32][8] = {};
    for (int lane = 0; lane < 32; ++lane) {
        const auto& r = *static_cast<const MatrixRegisters*>(lanes.in[lane]);
        int g = lane / 4, t = lane % 4 * 4;
        for (int i = 0; i < 4; ++i) {
            for (int k = 0; k < r.depth; k += 16) {
                a[g][t + k + i] = static_cast<int8_t>(r.a[k / 8] >> 8 * i);
                a[g + 8][t + k + i] = static_cast<int8_t>(r.a[k / 8 + 1] >> 8 * i);
                b[t + k + i][g] = static_cast<int8_t>(r.b[k / 16] >> 8 * i);
            }
        }
    }
    for (int lane = 0; lane < 32; ++lane) {
        auto* d = static_cast<int*>(lanes.out[lane]);
        for (int i = 0; i < 4; ++i) {
            int row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
            for (int k = 0; k < 32; ++k) d[i] += a[row][k] * b[k][column];
        }
    }
}

struct Rows {
    const void* at[32];
};

void share_rows(Lanes& lanes) {
    Rows rows;
    for (int i = 0; i < 32; ++i) rows.at[i] = lanes.in[i];
    for (int i = 0; i < 32; ++i) *static_cast<Rows*>(lanes.out[i]) = rows;
}

uint32_t element(const Rows& rows, int row, int column) {
    uint16_t value;
    const char* at = static_cast<const char*>(rows.at[row]) + column * sizeof value;
    check_load(at, sizeof value);
    std::memcpy(&value, at, sizeof value);
    return value;
}

}  // namespace

void mma(float (&d)[4], const MatrixRegisters& registers, Where where) {
    warp_function(Function::mma, kAllLanes, &registers, d, &multiply, where);
}

void mma_codes(int (&d)[4], const MatrixRegisters& registers, Where where) {
    warp_function(Function::mma, kAllLanes, &registers, d, &multiply_codes, where);
}

void ldmatrix(uint32_t* registers, const void* row, int matrices, bool transposed, Where where) {
    if (reinterpret_cast<uintptr_t>(row) % 16 && lane_index() < 8 * matrices) {
        checker::Unwatched unwatched;
        stop("misaligned: ldmatrix reads a row" + describe(where));
    }
    Rows rows;
    warp_function(Function::ldmatrix, kAllLanes, row, &rows, &share_rows, where);
    int g = lane_index() / 4, t = lane_index() % 4 * 2;
    for (int m = 0; m < matrices; ++m) {
        int first = m * 8;
        registers[m] = transposed
                           ? element(rows, first + t, g) | element(rows, first + t + 1, g) << 16
                           : element(rows, first + g, t) | element(rows, first + g, t + 1) << 16;
    }
}

}  // namespace mllama::emulator
