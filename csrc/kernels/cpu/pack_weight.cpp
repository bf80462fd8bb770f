#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/packed_linear.h"
#include "simd/vec.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

template <class T>
float read(const T* p) {
    return load_n(p, 1)[0];
}
template <class T>
void write(T* p, float x) {
    store_n(p, splat(x), 1);
}
float read_f16(const uint8_t* p, int64_t i) { return read(reinterpret_cast<const f16*>(p) + i); }
void write_f16(uint8_t* p, int64_t i, float x) { write(reinterpret_cast<f16*>(p) + i, x); }
// Not below x: multiples of it up to the largest code reach what x is of.
void write_f16_above(uint8_t* p, int64_t i, float x) {
    write_f16(p, i, x);
    if (read_f16(p, i) < x) ++reinterpret_cast<f16*>(p)[i].bits;
}

int to_code(float x, int lowest, int highest) {
    return static_cast<int>(std::lrint(std::clamp<float>(x, lowest, highest)));
}

// ---- codes in a group's bytes

uint8_t* byte_at(uint8_t* codes, int64_t lane, int64_t k) {
    return codes + (k / 4 * kLanes + lane) * 4 + k % 4;
}
// The byte of inputs k and k + 4, in its low and its high half.
uint8_t* nibbles_at(uint8_t* codes, int64_t lane, int64_t k) {
    return codes + (k / 8 * kLanes + lane) * 4 + k % 4;
}
// A group's codes (w + shift) * inverse + zero, where 0 <= code <= 15.
void put_nibbles(uint8_t* codes, int64_t lane, const float* w, float shift, float inverse,
                 float zero = 0) {
    auto code = [&](int64_t k) { return to_code((w[k] + shift) * inverse + zero, 0, 15); };
    for (int64_t k = 0; k < kGroup; ++k) {
        if (k % 8 < 4) *nibbles_at(codes, lane, k) = code(k) | code(k + 4) << 4;
    }
}

// ---- the nearest codes

// scale * code + minimum
struct Affine {
    float scale, minimum;
};

float squared_error(const float* w, Affine fit) {
    float error = 0, inverse = fit.scale > 0 ? 1 / fit.scale : 0;
    for (int k = 0; k < kGroup; ++k) {
        float code = std::rint(std::clamp((w[k] - fit.minimum) * inverse, 0.0f, 15.0f));
        float difference = fit.scale * code + fit.minimum - w[k];
        error += difference * difference;
    }
    return error;
}

// By least squares for the codes that `start` gives. The minimum is kept at or below zero.
Affine refit(const float* w, Affine start) {
    float n = kGroup, sum_q = 0, sum_qq = 0, sum_w = 0, sum_qw = 0, inverse = 1 / start.scale;
    for (int k = 0; k < kGroup; ++k) {
        float q = std::rint(std::clamp((w[k] - start.minimum) * inverse, 0.0f, 15.0f));
        sum_q += q, sum_qq += q * q, sum_w += w[k], sum_qw += q * w[k];
    }
    float determinant = n * sum_qq - sum_q * sum_q;
    if (determinant <= 0) return start;
    Affine fit{(n * sum_qw - sum_q * sum_w) / determinant,
               (sum_qq * sum_w - sum_q * sum_qw) / determinant};
    if (fit.minimum > 0) fit = {sum_qq > 0 ? sum_qw / sum_qq : 0, 0};
    return fit.scale > 0 ? fit : start;
}

// The scale and minimum of four-bit codes with the least squared error found: the range of the
// values, and ranges that cut off a little of it, each refitted.
Affine fit_nibbles(const float* w) {
    float low = std::min(0.0f, *std::min_element(w, w + kGroup));
    float high = *std::max_element(w, w + kGroup);
    if (high <= low) return {0, low};  // one value, at most zero
    Affine best{(high - low) / 15, low};
    float error = squared_error(w, best);
    for (int step = -4; step <= 8; ++step) {
        Affine start{(high - low) / (15 + 0.25f * static_cast<float>(step)), low};
        Affine fit = refit(w, start);
        float fit_error = squared_error(w, fit);
        if (fit_error < error) best = fit, error = fit_error;
    }
    return best;
}

// ---- one row of a block

struct Row {
    const float* values;  // [groups * kGroup]
    int64_t groups, lane;
    uint8_t *header, *group;  // of the block
};

template <class T>
bool pack_floats(const Row& row, int64_t size) {
    bool finite = true;
    for (int64_t g = 0; g < row.groups; ++g) {
        T* p = reinterpret_cast<T*>(row.group + g * size);
        for (int64_t k = 0; k < kGroup; ++k) {
            float value = row.values[g * kGroup + k];
            int64_t at = std::is_same_v<T, bf16> ? k / 2 * kLanes * 2 + row.lane * 2 + k % 2
                                                 : k * kLanes + row.lane;
            write(p + at, value);
            finite &= std::isfinite(read(p + at));
        }
    }
    return finite;
}

bool pack_int8(const Row& row, int64_t size) {
    for (int64_t g = 0; g < row.groups; ++g) {
        const float* w = row.values + g * kGroup;
        uint8_t* p = row.group + g * size;
        float top = 0;
        for (int64_t k = 0; k < kGroup; ++k) top = std::max(top, std::fabs(w[k]));
        write_f16(p, row.lane, top / 127);
        float scale = read_f16(p, row.lane), inverse = scale > 0 ? 1 / scale : 0;
        if (!std::isfinite(scale)) return false;
        for (int64_t k = 0; k < kGroup; ++k)
            *byte_at(p + 2 * kLanes, row.lane, k) = to_code(w[k] * inverse, -127, 127);
    }
    return true;
}

// The groups' scales and minima as 8 bits of the row's largest ones.
bool pack_int4(const Row& row, int64_t size) {
    std::vector<Affine> fits(row.groups);
    float scale = 0, minimum = 0;
    for (int64_t g = 0; g < row.groups; ++g) {
        fits[g] = fit_nibbles(row.values + g * kGroup);
        scale = std::max(scale, fits[g].scale);
        minimum = std::max(minimum, -fits[g].minimum);
    }
    write_f16_above(row.header, row.lane, scale / 255);
    write_f16_above(row.header + 2 * kLanes, row.lane, minimum / 255);
    scale = read_f16(row.header, row.lane);
    minimum = read_f16(row.header + 2 * kLanes, row.lane);
    if (!std::isfinite(scale) || !std::isfinite(minimum)) return false;
    for (int64_t g = 0; g < row.groups; ++g) {
        uint8_t* p = row.group + g * size;
        int s = scale > 0 ? to_code(fits[g].scale / scale, 0, 255) : 0;
        int m = minimum > 0 ? to_code(-fits[g].minimum / minimum, 0, 255) : 0;
        float step = scale * static_cast<float>(s), inverse = step > 0 ? 1 / step : 0;
        p[row.lane] = s;
        p[kLanes + row.lane] = m;
        put_nibbles(p + 2 * kLanes, row.lane, row.values + g * kGroup,
                    minimum * static_cast<float>(m), inverse);
    }
    return true;
}

// The value of largest size becomes -8, as in GGUF's Q4_0.
bool pack_q4_0(const Row& row, int64_t size) {
    for (int64_t g = 0; g < row.groups; ++g) {
        const float* w = row.values + g * kGroup;
        uint8_t* p = row.group + g * size;
        float top = *std::max_element(w, w + kGroup,
                                      [](float a, float b) { return std::fabs(a) < std::fabs(b); });
        write_f16(p, row.lane, top / -8);
        float scale = read_f16(p, row.lane), inverse = scale != 0 ? 1 / scale : 0;
        if (!std::isfinite(scale)) return false;
        put_nibbles(p + 2 * kLanes, row.lane, w, 0, inverse, 8);
    }
    return true;
}

bool pack_q4_1(const Row& row, int64_t size) {
    for (int64_t g = 0; g < row.groups; ++g) {
        const float* w = row.values + g * kGroup;
        uint8_t* p = row.group + g * size;
        auto [low, high] = std::minmax_element(w, w + kGroup);
        write_f16(p, row.lane, (*high - *low) / 15);
        write_f16(p + 2 * kLanes, row.lane, *low);
        float scale = read_f16(p, row.lane), minimum = read_f16(p + 2 * kLanes, row.lane);
        if (!std::isfinite(scale) || !std::isfinite(minimum)) return false;
        float inverse = scale > 0 ? 1 / scale : 0;
        put_nibbles(p + 4 * kLanes, row.lane, w, -minimum, inverse);
    }
    return true;
}

bool pack_row(Packing packing, const Row& row) {
    int64_t size = size_of(packing).group;
    switch (packing) {
        case Packing::f32: return pack_floats<float>(row, size);
        case Packing::bf16: return pack_floats<bf16>(row, size);
        case Packing::f16: return pack_floats<f16>(row, size);
        case Packing::int8: return pack_int8(row, size);
        case Packing::int4: return pack_int4(row, size);
        case Packing::q4_0: return pack_q4_0(row, size);
        case Packing::q4_1: return pack_q4_1(row, size);
    }
    return false;
}

}  // namespace

bool pack_weight(const PackWeight& a, int64_t first, int64_t last) {
    int64_t groups = group_count(a.in), bytes = block_bytes(a.packing, a.in);
    std::vector<float> values(groups * kGroup);
    for (int64_t block = first; block < last; ++block) {
        uint8_t* header = a.packed + block * bytes;
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            int64_t index = block * kLanes + lane;
            if (index < a.out) {
                vf poison{};
                dispatch(a.dtype, [&](auto t) {
                    const auto* w = static_cast<const decltype(t)*>(a.dense) + index * a.in;
                    for_vectors(a.in, [&](int64_t i, int n) {
                        vf x = at(w + i, n);
                        poison += x * 0.0f;  // NaN where x is not finite
                        put(&values[i], x, n);
                    });
                });
                if (reduce_add(poison) != 0) return false;
            } else {
                std::fill(values.begin(), values.end(), 0.0f);
            }
            Row row{values.data(), groups, lane, header, header + size_of(a.packing).header};
            if (!pack_row(a.packing, row)) return false;
        }
    }
    return true;
}

}  // namespace mllama::kernels::MLLAMA_ISA
