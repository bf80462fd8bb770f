#include "kernels/cpu/layer_norm.h"

#include "simd/vec.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

// The sum of f(x, lanes in use) along a row, with four independent sums, because one would wait
// for each addition.
template <class T, class F>
float row_sum(const T* x, int64_t width, F&& f) {
    vf s0{}, s1{}, s2{}, s3{};
    int64_t i = 0;
    for (; i + 4 * kWidth <= width; i += 4 * kWidth) {
        s0 += f(load(x + i), kWidth);
        s1 += f(load(x + i + kWidth), kWidth);
        s2 += f(load(x + i + 2 * kWidth), kWidth);
        s3 += f(load(x + i + 3 * kWidth), kWidth);
    }
    for_vectors(width - i, [&](int64_t j, int n) { s0 += f(at(x + i + j, n), n); });
    return reduce_add((s0 + s1) + (s2 + s3));
}

template <class T, class W>
void forward_row(const LayerNorm& a, int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    const W* weight = static_cast<const W*>(a.weight);
    const W* bias = static_cast<const W*>(a.bias);
    T* y = static_cast<T*>(a.y) + row * a.width;
    float width = static_cast<float>(a.width);
    float mean = row_sum(x, a.width, [](vf v, int) { return v; }) / width;
    // The variance about the mean: the mean of squares less the squared mean would cancel.
    float squares = row_sum(x, a.width, [&](vf v, int n) {
        vf centered = first_lanes(v - mean, n);
        return centered * centered;
    });
    float rstd = 1.0f / __builtin_sqrtf(squares / width + a.eps);
    a.statistics[2 * row] = mean;
    a.statistics[2 * row + 1] = rstd;
    for_vectors(a.width, [&](int64_t i, int n) {
        put(y + i, (at(x + i, n) - mean) * rstd * at(weight + i, n) + at(bias + i, n), n);
    });
}

// With n = (x - mean) rstd: grad_x = rstd (g w - mean(g w) - n mean(g w n)), grad_weight += g n,
// grad_bias += g.
template <class T, class W>
void backward_row(const LayerNormBackward& a, int64_t row, float* grad_weight, float* grad_bias) {
    const T* g = static_cast<const T*>(a.grad_y) + row * a.width;
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    const W* weight = static_cast<const W*>(a.weight);
    T* grad_x = static_cast<T*>(a.grad_x) + row * a.width;
    float mean = a.statistics[2 * row], rstd = a.statistics[2 * row + 1],
          width = static_cast<float>(a.width);
    vf sums{}, dots{};
    for_vectors(a.width, [&](int64_t i, int n) {
        vf gradient = at(g + i, n), normal = (at(x + i, n) - mean) * rstd,
           weighted = gradient * at(weight + i, n);
        sums += weighted;
        dots += weighted * normal;
        if (grad_weight) {
            put(grad_weight + i, at(grad_weight + i, n) + gradient * normal, n);
            put(grad_bias + i, at(grad_bias + i, n) + gradient, n);
        }
    });
    float sum = reduce_add(sums) / width * rstd, share = reduce_add(dots) / width * rstd * rstd;
    for_vectors(a.width, [&](int64_t i, int n) {
        put(grad_x + i,
            at(g + i, n) * at(weight + i, n) * rstd - (at(x + i, n) - mean) * share - sum, n);
    });
}

}  // namespace

void layer_norm(const LayerNorm& args, int64_t first_row, int64_t last_row) {
    dispatch(args.dtype, args.weight_dtype, [&](auto t, auto w) {
        for (int64_t row = first_row; row < last_row; ++row)
            forward_row<decltype(t), decltype(w)>(args, row);
    });
}

void layer_norm_backward(const LayerNormBackward& args, int64_t first_row, int64_t last_row,
                         float* grad_weight, float* grad_bias) {
    dispatch(args.dtype, args.weight_dtype, [&](auto t, auto w) {
        for (int64_t row = first_row; row < last_row; ++row) {
            backward_row<decltype(t), decltype(w)>(args, row, grad_weight, grad_bias);
        }
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
