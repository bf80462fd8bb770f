// Shared by the attention kernels besides register tiles: 2^x, a group's offsets in the tensors,
// visible keys.
//
// Scores are stored transposed, [keys, queries]: queries are the lanes of vectors. The softmax over
// keys then needs no horizontal sums, and K and V are always the broadcast side, which takes them
// nearly as they are in memory.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/cpu/attention.h"
#include "kernels/cpu/tiles.h"
#include "simd/math.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

constexpr int kLanes = kTileVectors * kWidth;  // rows of a group in a tile
static_assert(kLanes <= kMostTileRows);
constexpr float kLog2e = 1.44269504f, kInfinity = __builtin_inff();

// ---- numbers

// 2^x for x up to 0 or little above it; 0 below -127. NaN stays NaN. The polynomials (degree 5,
// minimax) err by 1.5e-7.
inline vf exp2_below(vf x) {
#if defined(__AVX512F__)
    // x = floor(x) + f; scalef multiplies by 2^floor(x), and gives 0 for -inf, where reduce gives f
    // = 0.
    __m512 v = reinterpret_cast<__m512>(x);
    vf f = reinterpret_cast<vf>(_mm512_reduce_ps(v, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC));
    vf p = splat(1.867130087e-3f);
    p = p * f + 9.017030275e-3f;
    p = p * f + 5.579991315e-2f;
    p = p * f + 2.401644501e-1f;
    p = p * f + 6.931513118e-1f;
    p = p * f + 1.0f;
    return reinterpret_cast<vf>(_mm512_scalef_ps(reinterpret_cast<__m512>(p), v));
#else
    vf clamped = x < -127.0f ? splat(-127.0f) : x;
    vf shifted = clamped + 12582912.0f;  // 1.5 * 2^23: the sum's low bits hold round(x)
    vf f = clamped - (shifted - 12582912.0f);
    vf p = splat(1.326472707e-3f);
    p = p * f + 9.671512649e-3f;
    p = p * f + 5.550733744e-2f;
    p = p * f + 2.402224209e-1f;
    p = p * f + 6.931469776e-1f;
    p = p * f + 1.0f;
    return p * as_float((as_bits(shifted) + 127u) << 23);
#endif
}

// Turns products of q and k into scores in log2 units: score = factor * product, or with a
// soft cap factor * tanh(inner * product).
struct ScoreScale {
    explicit ScoreScale(const Attention& a)
        : capped(a.softcap > 0),
          inner(capped ? a.scale / a.softcap : 1),
          factor((capped ? a.softcap : a.scale) * kLog2e) {}

    const bool capped;
    const float inner, factor;
};

template <int NV>
inline __attribute__((always_inline)) void cap(const ScoreScale& scale, Tile<NV>& products) {
    if (!scale.capped) return;
    for_tile<NV>([&](int r, int n) { products[r][n] = tanh(products[r][n] * scale.inner); });
}

// ---- a group

// Offsets of one group in the tensors.
struct Group {
    Group(const Attention& args, int64_t index)
        : a(args),
          batch(index / a.kv_heads),
          kv_head(index % a.kv_heads),
          visible(a.visible[batch]),
          keys(visible.last - visible.first),
          starts(visible.ranges || visible.start(a.queries - 1) > visible.first) {}
    int64_t query(int64_t row) const { return row / a.group_size(); }
    int64_t head(int64_t row) const { return kv_head * a.group_size() + row % a.group_size(); }
    // Where a row starts in a contiguous [batch, queries, heads, size], and its place in [batch,
    // heads, queries].
    int64_t element(int64_t row) const {
        return ((batch * a.queries + query(row)) * a.heads + head(row)) * a.size;
    }
    int64_t statistic(int64_t row) const {
        return (batch * a.heads + head(row)) * a.queries + query(row);
    }
    // The keys visible to a row, counted from visible.first: `start` to `limit`, exclusive.
    int32_t start(int64_t row) const {
        return static_cast<int32_t>(visible.start(query(row)) - visible.first);
    }
    int32_t limit(int64_t row) const {
        return static_cast<int32_t>(visible.limit(query(row)) - visible.first);
    }

    // Functions i -> row i of k or v, counted from visible.first, and i -> row first + i of q or
    // what is shaped as q.
    template <class T>
    auto key_rows(const Heads& t) const {
        const T* base = static_cast<const T*>(t.data) + batch * t.batch + visible.first * t.length +
                        kv_head * t.head;
        return [base, stride = t.length](int64_t i) { return base + i * stride; };
    }
    template <class T>
    auto query_rows(const Heads& t, int64_t first) const {
        const T* base = static_cast<const T*>(t.data) + batch * t.batch;
        return [this, base, &t, first](int64_t i) {
            return base + query(first + i) * t.length + head(first + i) * t.head;
        };
    }

    const Attention& a;
    int64_t batch, kv_head;
    VisibleKeys visible;
    int64_t keys;  // from visible.first on
    bool starts;   // the first of them are hidden from some queries
};

// Calls body(first row, rows, vectors) for every count-th tile of a group, from tile `index` on;
// vectors of rows, 1 to kTileVectors, as std::integral_constant.
template <class Body>
void for_row_tiles(const Attention& a, int64_t index, int64_t count, Body&& body) {
    for (int64_t first = index * kLanes; first < a.rows(); first += count * kLanes) {
        int64_t rows = std::min<int64_t>(kLanes, a.rows() - first);
        switch ((rows + kWidth - 1) / kWidth) {
            case 1: body(first, rows, std::integral_constant<int, 1>{}); break;
            case 2: body(first, rows, std::integral_constant<int, 2>{}); break;
            default: body(first, rows, std::integral_constant<int, 3>{});
        }
    }
}

// The range of keys visible to each row of a tile; lanes past the last row repeat it. Keys from
// latest to fewest are visible to every row; keys before earliest or from most on to none.
template <int NV>
struct Limits {
    Limits(const Group& group, int64_t first, int64_t rows) {
        int32_t starts[NV * kWidth]{}, limits[NV * kWidth];
        for (int i = 0; i < NV * kWidth; ++i)
            limits[i] = group.limit(first + std::min<int64_t>(i, rows - 1));
        earliest = latest = 0;
        fewest = limits[0];  // without starts limits never fall from row to row
        most = limits[NV * kWidth - 1];
        if (group.starts) {
            earliest = latest = group.start(first);
            for (int i = 0; i < NV * kWidth; ++i) {
                starts[i] = group.start(first + std::min<int64_t>(i, rows - 1));
                earliest = std::min(earliest, starts[i]);
                latest = std::max(latest, starts[i]);
                fewest = std::min(fewest, limits[i]);
                most = std::max(most, limits[i]);
            }
        }
        std::memcpy(start, starts, sizeof start);
        std::memcpy(limit, limits, sizeof limit);
    }
    // The first key of a tile of keys before which none is visible.
    int begin() const { return earliest / kTileRows * kTileRows; }
    bool all_see(int key, int keys) const { return key >= latest && key + keys <= fewest; }
    // x + added in lanes of vector n to which the key is visible, -inf elsewhere. Selected, not
    // added: a hidden key's score may be NaN or overflow, which -inf would not cover. kStarts: for
    // some lane visible keys may begin after this one.
    template <bool kStarts>
    vf mask(vf x, int n, int key, float added) const {
        int place = added == -kInfinity ? most : key;  // visible to no lane
        vi visible = vi{} + place < limit[n];
        if constexpr (kStarts) visible &= vi{} + place >= start[n];
        return visible ? x + added : splat(-kInfinity);
    }

    vi start[NV], limit[NV];
    int earliest, latest, fewest, most;
};

}  // namespace
}  // namespace mllama::kernels::MLLAMA_ISA
