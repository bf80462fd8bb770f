// Which inputs each result of a resize is the sum of, and their weights, on the host.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "kernels/cpu/image.h"

namespace mllama {

// The weights of one direction: Pillow's precompute_coeffs and normalize_coeffs_8bpc, operation by
// operation. (Compiled without FMA on x86: a fused product would round differently.)
struct ResizeTaps {
    int64_t most;                 // inputs that a result has at most
    std::vector<int32_t> first;   // [results]: the first input
    std::vector<int32_t> count;   // [results]
    std::vector<int32_t> weight;  // [results, most], in units of 2^-22

    ResizeTaps(int64_t in_size, int64_t out_size, bool cubic) : first(out_size), count(out_size) {
        const double scale = static_cast<double>(in_size) / static_cast<double>(out_size);
        const double widened = std::max(scale, 1.0), support = (cubic ? 2.0 : 1.0) * widened,
                     per_pixel = 1.0 / widened;
        most = static_cast<int64_t>(std::ceil(support)) * 2 + 1;
        weight.assign(out_size * most, 0);
        std::vector<double> exact(most);
        for (int64_t i = 0; i < out_size; ++i) {
            const double center = (static_cast<double>(i) + 0.5) * scale;
            const int64_t begin =
                std::max<int64_t>(static_cast<int64_t>(center - support + 0.5), 0);
            const int64_t end =
                std::min<int64_t>(static_cast<int64_t>(center + support + 0.5), in_size);
            double total = 0.0;
            for (int64_t k = begin; k < end; ++k) {
                const double x = (static_cast<double>(k) - center + 0.5) * per_pixel;
                exact[k - begin] = cubic ? bicubic(x) : bilinear(x);
                total += exact[k - begin];
            }
            first[i] = static_cast<int32_t>(begin);
            count[i] = static_cast<int32_t>(end - begin);
            for (int64_t k = 0; k < end - begin; ++k) {
                const double share = total != 0.0 ? exact[k] / total : exact[k];
                const double units = share * (1 << kernels::kFractionBits);
                weight[i * most + k] = static_cast<int32_t>(units < 0 ? units - 0.5 : units + 0.5);
            }
        }
    }

  private:
    static double bilinear(double x) {
        x = std::abs(x);
        return x < 1.0 ? 1.0 - x : 0.0;
    }
    static double bicubic(double x) {
        constexpr double a = -0.5;
        x = std::abs(x);
        if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
        return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
    }
};

}  // namespace mllama
