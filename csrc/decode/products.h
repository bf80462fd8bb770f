// Products with one input that threads share out as one list of tasks.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "decode/decoder.h"

namespace mllama {

// A layer and its result.
struct Product {
    const DecoderLinear* linear;
    float* y;
};
using Products = std::initializer_list<Product>;

// What tasks are: blocks of weights, or an adapter's rows.
inline int64_t blocks(const DecoderLinear& linear) { return kernels::block_count(linear.out); }
inline int64_t ranks(const DecoderLinear& linear) { return linear.rank(); }

template <class Count>
int64_t count(Products products, Count&& of) {
    int64_t tasks = 0;
    for (const Product& p : products) tasks += of(*p.linear);
    return tasks;
}

// The tasks [first, last) of the list: body(product, its part of small, begin, end). `small` has
// `rows` rows of each adapter's rank.
template <class Count, class Body>
void each(Products products, Count&& of, float* small, int64_t rows, int64_t first, int64_t last,
          Body&& body) {
    for (const Product& p : products) {
        int64_t own = of(*p.linear);
        int64_t begin = std::max<int64_t>(first, 0), end = std::min(last, own);
        if (begin < end) body(p, small, begin, end);
        first -= own, last -= own;
        small += rows * p.linear->rank();
    }
}

// Reads the weights ahead from block `first` of the list on.
inline void fetch(Products products, int64_t first) {
    constexpr int64_t kBytes = 32768;
    for (const Product& p : products) {
        int64_t own = blocks(*p.linear), bytes = p.linear->block_bytes();
        if (0 <= first && first < own) {
            const uint8_t* from = p.linear->weight + first * bytes;
            int64_t size = std::min(kBytes, (own - first) * bytes);
            for (int64_t i = 0; i < size; i += 64) __builtin_prefetch(from + i, 0, 2);
        }
        first -= own;
    }
}

}  // namespace mllama
