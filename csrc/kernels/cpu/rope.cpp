#include "kernels/cpu/rope.h"

#include "simd/vec.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

template <class T>
void rotate(const Rope& a, const RopeHeads& h, int64_t batch, int64_t token, const float* cos,
            const float* sin) {
    const T* x = static_cast<const T*>(h.x) + batch * h.batch_stride + token * h.token_stride;
    T* y = static_cast<T*>(h.y) + (batch * a.tokens + token) * h.heads * 2 * a.half;
    for_vectors(a.half, [&](int64_t i, int n) {
        vf c = at(cos + i, n), s = at(sin + i, n) * a.sign;  // once for all heads
        for (int64_t head = 0; head < h.heads; ++head) {
            const T* from = x + head * h.head_stride + i;
            T* to = y + head * 2 * a.half + i;
            vf x1 = at(from, n), x2 = at(from + a.half, n);
            put(to, x1 * c - x2 * s, n);
            put(to + a.half, x2 * c + x1 * s, n);
        }
    });
}

}  // namespace

void rope(const Rope& args, int64_t first, int64_t last) {
    dispatch(args.dtype, [&](auto t) {
        for (int64_t i = first; i < last; ++i) {
            int64_t batch = i / args.tokens, token = i % args.tokens;
            const float* cos = args.cos + batch * args.cos_batch_stride + token * args.half;
            const float* sin = args.sin + batch * args.sin_batch_stride + token * args.half;
            rotate<decltype(t)>(args, args.q, batch, token, cos, sin);
            rotate<decltype(t)>(args, args.k, batch, token, cos, sin);
        }
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
