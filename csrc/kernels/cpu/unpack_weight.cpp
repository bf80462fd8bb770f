#include <algorithm>

#include "kernels/cpu/packed_panels.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

// to[k][lane] = the weights of the group at p.
void unpack_group(Packing packing, const uint8_t* header, const uint8_t* p, Word* to) {
    switch (packing) {
        case Packing::f32: std::memcpy(to, p, kGroup * kLanes * sizeof(float)); return;
        case Packing::bf16:
        case Packing::f16: return widen_halves(packing, p, 1, to);
        case Packing::int8: return unpack_numbers<Packing::int8>(header, p, to);
        case Packing::int4:
        case Packing::q4_k: return unpack_numbers<Packing::q4_k>(header, p, to);
        case Packing::q5_k: return unpack_numbers<Packing::q5_k>(header, p, to);
        case Packing::q4_0: return unpack_numbers<Packing::q4_0>(header, p, to);
        case Packing::q5_0: return unpack_numbers<Packing::q5_0>(header, p, to);
        case Packing::q4_1: return unpack_numbers<Packing::q4_1>(header, p, to);
        case Packing::q5_1: return unpack_numbers<Packing::q5_1>(header, p, to);
        case Packing::q6_k: return unpack_numbers<Packing::q6_k>(header, p, to);
    }
}

// Calls body(first of its inputs in the dense row, how many, tile[k][lane]) for every group of a
// block that the dense rows have inputs of.
template <class Body>
void for_groups(const PackWeight& a, int64_t block, Body&& body) {
    alignas(64) Word tile[kGroup * kLanes];
    const PackingSize& size = size_of(a.packing);
    const uint8_t* start = a.packed + block * block_bytes(a.packing, a.in);
    for (int64_t at = 0; at < a.width; at += kGroup) {
        int64_t g = (a.first + at) / kGroup;
        unpack_group(a.packing, start + header_offset(size, g), start + group_offset(size, g),
                     tile);
        body(at, std::min(kGroup, a.width - at), tile);
    }
}

// `count` values of a dense row from input `first` on.
template <class T>
void write_inputs(const PackWeight& a, int64_t index, int64_t first, int64_t count,
                  const float* values) {
    T* to = static_cast<T*>(a.dense) + index * a.width + first;
    for_vectors(count, [&](int64_t i, int n) { put(to + i, at(values + i, n), n); });
}

}  // namespace

void unpack_blocks(const PackWeight& a, int64_t first, int64_t last) {
    alignas(64) float rows[kLanes * kGroup];
    dispatch(a.dtype, [&](auto t) {
        for (int64_t block = first; block < last; ++block) {
            int64_t row = (block - first) * kLanes,
                    lanes = std::min(kLanes, a.out - block * kLanes);
            for_groups(a, block, [&](int64_t at, int64_t count, const Word* tile) {
                transpose(tile, kLanes, as_words(rows), kGroup, kGroup, kLanes);
                for (int64_t lane = 0; lane < lanes; ++lane)
                    write_inputs<decltype(t)>(a, row + lane, at, count, rows + lane * kGroup);
            });
        }
    });
}

void unpack_row(const PackWeight& a, int64_t row, int64_t index) {
    float values[kGroup];
    dispatch(a.dtype, [&](auto t) {
        for_groups(a, row / kLanes, [&](int64_t at, int64_t count, Word* tile) {
            for (int64_t k = 0; k < kGroup; ++k)
                values[k] = as_floats(tile)[k * kLanes + row % kLanes];
            write_inputs<decltype(t)>(a, index, at, count, values);
        });
    });
}

}  // namespace mllama::kernels::MLLAMA_ISA
