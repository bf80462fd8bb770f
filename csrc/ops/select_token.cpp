#include "ops/select_token.h"

#include <memory>

#include "core/threads.h"

namespace mllama {
namespace {

// Kept by each thread that calls: fresh memory of this size costs more than most selections.
struct Scratch {
    void grow(int64_t wanted) {
        if (wanted <= size) return;
        floats.reset(new float[wanted]);
        indices.reset(new int32_t[wanted]);
        size = wanted;
    }
    int64_t size = 0;
    std::unique_ptr<float[]> floats;
    std::unique_ptr<int32_t[]> indices;
};
Scratch& own_scratch() {
    thread_local Scratch scratch;
    return scratch;
}

Tensor select_token(const Tensor& logits, const MaybeTensor& uniform, const MaybeTensor& present,
                    double temperature, int64_t top_k, double top_p, double min_p,
                    double repetition_penalty) {
    const char* op = "select_token";
    SelectTokenArgs a(op, logits, uniform, present);
    check(top_k >= 0, op, "top_k");
    int64_t rows = a.logits.size(0), size = a.logits.size(1);
    kernels::SelectToken args = a.kernel(temperature, top_k, top_p, min_p, repetition_penalty);
    auto select = MLLAMA_CALL(select_token);
    int64_t shares = std::min(rows, thread_count());
    Scratch& scratch = own_scratch();
    scratch.grow(uniform || present ? shares * 2 * size : 0);
    float* floats = scratch.floats.get();
    int32_t* indices = scratch.indices.get();
    parallel_for(shares, 1, [&](int64_t begin, int64_t end) {
        for (int64_t share = begin; share < end; ++share)
            select(args, floats + share * 2 * size, indices + share * 2 * size,
                   rows * share / shares, rows * (share + 1) / shares);
    });
    for (int64_t row = 0; row < rows; ++row)
        check(args.tokens[row] >= 0, op, "logits: they are no distribution");
    return a.tokens;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) { define(m, kSelectTokenSchema); }

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "select_token", TORCH_BOX(&select_token));
}

}  // namespace mllama
