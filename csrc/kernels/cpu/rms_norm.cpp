#include "kernels/cpu/rms_norm.h"

#include "simd/vec.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

template <class T, class W>
void forward_row(const RmsNorm& a, int64_t row) {
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    const W* weight = static_cast<const W*>(a.weight);
    T* y = static_cast<T*>(a.y) + row * a.width;
    if (a.residual) {
        const T* residual = static_cast<const T*>(a.residual) + row * a.width;
        T* hidden = static_cast<T*>(a.hidden) + row * a.width;
        for_vectors(a.width, [&](int64_t i, int n) {
            put(hidden + i, at(x + i, n) + at(residual + i, n), n);
        });
        x = hidden;  // and on with the same sums: the norm of hidden alone has the same bits
    }
    // Four independent sums, because one would wait for each addition.
    vf s0{}, s1{}, s2{}, s3{};
    int64_t i = 0;
    for (; i + 4 * kWidth <= a.width; i += 4 * kWidth) {
        vf x0 = load(x + i), x1 = load(x + i + kWidth), x2 = load(x + i + 2 * kWidth),
           x3 = load(x + i + 3 * kWidth);
        s0 += x0 * x0;
        s1 += x1 * x1;
        s2 += x2 * x2;
        s3 += x3 * x3;
    }
    vf squares = (s0 + s1) + (s2 + s3);
    for_vectors(a.width - i, [&](int64_t j, int n) {
        vf value = at(x + i + j, n);
        squares += value * value;
    });
    float rstd = 1.0f / __builtin_sqrtf(reduce_add(squares) / static_cast<float>(a.width) + a.eps);
    a.rstd[row] = rstd;
    if (a.offset == 0) {  // Llama's order: the normalized row is rounded to its dtype before the
                          // weight is applied.
        for_vectors(a.width, [&](int64_t i, int n) {
            put(y + i, rounded(at(x + i, n) * rstd, T{}) * at(weight + i, n), n);
        });
    } else {  // Gemma's: rounded once, at the end
        for_vectors(a.width, [&](int64_t i, int n) {
            put(y + i, at(x + i, n) * rstd * (at(weight + i, n) + a.offset), n);
        });
    }
}

// With n = x * rstd and w = weight + offset: grad_x = rstd * (g w - n * mean(g w n)), grad_weight
// += g n.
template <class T, class W>
void backward_row(const RmsNormBackward& a, int64_t row, float* grad_weight) {
    const T* g = static_cast<const T*>(a.grad_y) + row * a.width;
    const T* x = static_cast<const T*>(a.x) + row * a.width;
    const T* beside =
        a.grad_hidden ? static_cast<const T*>(a.grad_hidden) + row * a.width : nullptr;
    const W* weight = static_cast<const W*>(a.weight);
    T* grad_x = static_cast<T*>(a.grad_x) + row * a.width;
    float rstd = a.rstd[row];
    vf dots{};
    for_vectors(a.width, [&](int64_t i, int n) {
        vf gradient = at(g + i, n), value = at(x + i, n);
        dots += gradient * (at(weight + i, n) + a.offset) * value;
        if (grad_weight)
            put(grad_weight + i, at(grad_weight + i, n) + gradient * (value * rstd), n);
    });
    float share = reduce_add(dots) / static_cast<float>(a.width) * rstd * rstd * rstd;
    for_vectors(a.width, [&](int64_t i, int n) {
        vf gradient = at(g + i, n) * (at(weight + i, n) + a.offset) * rstd - at(x + i, n) * share;
        if (beside) gradient += at(beside + i, n);
        put(grad_x + i, gradient, n);
    });
}

}  // namespace

void rms_norm(const RmsNorm& args, int64_t first_row, int64_t last_row) {
    dispatch(args.dtype, args.weight_dtype, [&](auto t, auto w) {
        for (int64_t row = first_row; row < last_row; ++row)
            forward_row<decltype(t), decltype(w)>(args, row);
    });
}

void rms_norm_backward(const RmsNormBackward& args, int64_t first_row, int64_t last_row,
                       float* grad_weight) {
    dispatch(args.dtype, args.weight_dtype, [&](auto t, auto w) {
        for (int64_t row = first_row; row < last_row; ++row)
            backward_row<decltype(t), decltype(w)>(args, row, grad_weight);
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
