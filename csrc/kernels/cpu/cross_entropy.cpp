#include "kernels/cpu/cross_entropy.h"

#include <algorithm>
#include <cmath>

#include "simd/math.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

constexpr int64_t kPart = 512;  // scores whose float sum becomes a double

template <class T, bool kCapped>
void one_row(const CrossEntropy& a, int64_t row) {
    T* scores = static_cast<T*>(a.scores) + row * a.size;
    int64_t target = a.targets[row];
    if (target < 0 || target >= a.size) {
        a.losses[row] = 0;
        if (a.gradient != 0)
            for_vectors(a.size, [&](int64_t i, int n) { put(scores + i, vf{}, n); });
        return;
    }
    vf inverse = splat(kCapped ? 1.0f / a.softcap : 0.0f);
    auto bent = [&](vf x) { return kCapped ? a.softcap * tanh(x * inverse) : x; };
    vf tops = splat(-__builtin_inff()), tail = tops;
    int64_t i = 0;
    for (; i + kWidth <= a.size; i += kWidth) tops = max(tops, load(scores + i));
    if (i < a.size) {
        vf last = at(scores + i, static_cast<int>(a.size - i));
        for (int lane = 0; lane < a.size - i; ++lane) tail[lane] = last[lane];
    }
    tops = max(tops, tail);
    float top = tops[0];
    for (int lane = 1; lane < kWidth; ++lane) top = std::max(top, tops[lane]);
    vf highest = bent(splat(top));  // bending keeps the order
    double sum = 0;
    for (int64_t part = 0; part < a.size; part += kPart) {
        vf sums{};
        for_vectors(std::min(kPart, a.size - part), [&](int64_t j, int n) {
            sums += first_lanes(exp(bent(at(scores + part + j, n)) - highest), n);
        });
        sum += reduce_add(sums);
    }
    float own = bent(splat(at(scores + target, 1)[0]))[0];
    a.losses[row] = static_cast<float>(std::log(sum) - (double{own} - highest[0]));
    if (a.gradient == 0) return;
    float share = static_cast<float>(a.gradient / sum);
    // d/dx softcap tanh(x / softcap) = 1 - tanh^2.
    auto slope = [&](vf x) {
        vf t = tanh(x * inverse);
        return 1.0f - t * t;
    };
    float of_target = (share * exp(splat(own) - highest)[0] - a.gradient) *
                      (kCapped ? slope(splat(at(scores + target, 1)[0]))[0] : 1.0f);
    for_vectors(a.size, [&](int64_t j, int n) {
        vf x = at(scores + j, n), p = share * exp(bent(x) - highest);
        put(scores + j, kCapped ? p * slope(x) : p, n);
    });
    put(scores + target, splat(of_target), 1);
}

}  // namespace

void cross_entropy(const CrossEntropy& args, int64_t first, int64_t last) {
    dispatch(args.dtype, [&](auto t) {
        using T = decltype(t);
        for (int64_t row = first; row < last; ++row) {
            args.softcap != 0 ? one_row<T, true>(args, row) : one_row<T, false>(args, row);
        }
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
