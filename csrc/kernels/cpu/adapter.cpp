#include "kernels/cpu/adapter.h"

#include <algorithm>

#include "simd/sums.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

template <class T>
float dot(const float* x, const T* y, int64_t size) {
    vf sum[4]{};  // in flight, since one would wait for each addition
    int64_t i = 0;
    for (; i + 4 * kWidth <= size; i += 4 * kWidth) {
#pragma GCC unroll 4
        for (int j = 0; j < 4; ++j) sum[j] += load(x + i + j * kWidth) * load(y + i + j * kWidth);
    }
    for_vectors(size - i, [&](int64_t j, int n) { sum[0] += at(x + i + j, n) * at(y + i + j, n); });
    return reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
}

// Dot products of one row of small with kWidth rows of b, `count` of them there.
template <class T>
vf dots(const float* small, const T* b, int64_t rank, int64_t count) {
    vf sum[kWidth]{};
    for_vectors(rank, [&](int64_t i, int n) {
        vf x = at(small + i, n);
        for (int64_t o = 0; o < count; ++o) sum[o] += x * at(b + o * rank + i, n);
    });
    return sum_each(sum);
}

}  // namespace

void adapter_down(const Adapter& args, int64_t first, int64_t last) {
    dispatch(args.a_dtype, [&](auto t) {
        const auto* a = static_cast<const decltype(t)*>(args.a);
        for (int64_t column = first; column < last; ++column) {
            for (int64_t row = 0; row < args.rows; ++row) {
                args.small[row * args.rank + column] =
                    args.scale * dot(args.x + row * args.in, a + column * args.in, args.in);
            }
        }
    });
}

void adapter_up(const Adapter& args, int64_t first, int64_t last) {
    dispatch(args.b_dtype, [&](auto t) {
        const auto* b = static_cast<const decltype(t)*>(args.b);
        for (int64_t column = first; column < last; column += kWidth) {
            int64_t count = std::min<int64_t>(kWidth, last - column);
            for (int64_t row = 0; row < args.rows; ++row) {
                float* y = args.y + row * args.out + column;
                vf sum =
                    dots(args.small + row * args.rank, b + column * args.rank, args.rank, count);
                put(y, at(y, static_cast<int>(count)) + sum, static_cast<int>(count));
            }
        }
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
