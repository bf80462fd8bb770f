#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/packed_codes.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

// Not smaller in size than x: multiples of it up to the largest code reach what x is of.
void write_f16_above(uint8_t* p, int64_t i, float x) {
    write_f16(p, i, x);
    if (std::fabs(read_f16(p, i)) < std::fabs(x)) ++reinterpret_cast<f16*>(p)[i].bits;
}
// The nearest; a subnormal one, which has few digits or none, is not below x.
void write_scale(uint8_t* p, int64_t i, float x) {
    std::fabs(x) < 0x1p-14f ? write_f16_above(p, i, x) : write_f16(p, i, x);
}
float inverse_of(float scale) { return scale != 0 ? 1 / scale : 0; }

int to_code(float x, int lowest, int highest) {
    return static_cast<int>(std::lrint(std::clamp<float>(x, lowest, highest)));
}
// A scale's code: of the two nearest that with the smaller error(code), where there is one.
template <class Error>
int to_step(float x, int lowest, int highest, Error&& error) {
    int low = to_code(std::floor(x), lowest, highest),
        high = to_code(std::ceil(x), lowest, highest);
    return low == high || error(low) <= error(high) ? low : high;
}

// A group's codes (w + shift) * inverse + zero, of `bits` bits.
void quantize(uint8_t* p, int64_t lane, int bits, const float* w, float shift, float inverse,
              float zero = 0) {
    uint8_t codes[kGroup];
    for (int64_t k = 0; k < kGroup; ++k)
        codes[k] = to_code((w[k] + shift) * inverse + zero, 0, (1 << bits) - 1);
    put_codes(p, lane, bits, codes);
}

// ---- the nearest codes

// scale * code + minimum
struct Affine {
    float scale, minimum;
};

float squared_error(const float* w, Affine fit, float highest) {
    float error = 0, inverse = fit.scale > 0 ? 1 / fit.scale : 0;
    for (int k = 0; k < kGroup; ++k) {
        float code = std::rint(std::clamp((w[k] - fit.minimum) * inverse, 0.0f, highest));
        float difference = fit.scale * code + fit.minimum - w[k];
        error += difference * difference;
    }
    return error;
}

// By least squares for the codes that `start` gives. The minimum is kept at or below zero.
Affine refit(const float* w, Affine start, float highest) {
    float n = kGroup, sum_q = 0, sum_qq = 0, sum_w = 0, sum_qw = 0, inverse = 1 / start.scale;
    for (int k = 0; k < kGroup; ++k) {
        float q = std::rint(std::clamp((w[k] - start.minimum) * inverse, 0.0f, highest));
        sum_q += q, sum_qq += q * q, sum_w += w[k], sum_qw += q * w[k];
    }
    float determinant = n * sum_qq - sum_q * sum_q;
    if (determinant <= 0) return start;
    Affine fit{(n * sum_qw - sum_q * sum_w) / determinant,
               (sum_qq * sum_w - sum_q * sum_qw) / determinant};
    if (fit.minimum > 0) fit = {sum_qq > 0 ? sum_qw / sum_qq : 0, 0};
    return fit.scale > 0 ? fit : start;
}

// The scale and minimum of codes up to `highest` with the least squared error found: the range of
// the values, and ranges that cut off a little of it, each refitted.
Affine fit_affine(const float* w, float highest) {
    float low = std::min(0.0f, *std::min_element(w, w + kGroup));
    float high = *std::max_element(w, w + kGroup);
    if (high <= low) return {0, low};  // one value, at most zero
    Affine best{(high - low) / highest, low};
    float error = squared_error(w, best, highest);
    for (int step = -4; step <= 8; ++step) {
        Affine start{(high - low) / (highest + 0.25f * static_cast<float>(step)), low};
        Affine fit = refit(w, start, highest);
        float fit_error = squared_error(w, fit, highest);
        if (fit_error < error) best = fit, error = fit_error;
    }
    return best;
}

constexpr int kHalf = kGroup / 2;  // inputs that share a scale of q6_k

// The value of largest size.
float extreme(const float* w, int64_t count) {
    return *std::max_element(w, w + count,
                             [](float a, float b) { return std::fabs(a) < std::fabs(b); });
}

float centered_error(const float* w, int count, float scale, float center) {
    float error = 0, inverse = inverse_of(scale);
    for (int k = 0; k < count; ++k) {
        float code = std::rint(std::clamp(w[k] * inverse, -center, center - 1));
        error += (w[k] - scale * code) * (w[k] - scale * code);
    }
    return error;
}

// The scale of codes from -center to center - 1 with the least squared error found: the one that
// makes the value of largest size -center, and some near it, each refitted.
float fit_centered(const float* w, int count, float center) {
    float top = extreme(w, count), best = top / -center, best_error = INFINITY, q[kGroup];
    float margin = 1e-8f * top * top;  // more than what errors are rounded by
    if (top == 0) return 0;
    for (int step = -4; step <= 4; ++step) {
        float inverse = (-center + 0.25f * static_cast<float>(step)) / top;
        float sum_qq = 0, sum_qw = 0, error = 0;
        for (int k = 0; k < count; ++k) {
            q[k] = std::rint(std::clamp(w[k] * inverse, -center, center - 1));
            sum_qq += q[k] * q[k], sum_qw += q[k] * w[k];
        }
        float scale = sum_qw / sum_qq;
        for (int k = 0; k < count; ++k) error += (w[k] - scale * q[k]) * (w[k] - scale * q[k]);
        if (error + margin < best_error) best = scale, best_error = error;
    }
    return best;
}

// ---- one row of a block

struct Row {
    const float* values;  // [groups * kGroup]
    int64_t groups, lane;
    uint8_t* block;
    const PackingSize& size;

    const float* group(int64_t g) const { return values + g * kGroup; }
    uint8_t* header_bytes(int64_t g) const { return block + header_offset(size, g); }
    uint8_t* group_bytes(int64_t g) const { return block + group_offset(size, g); }
};

template <class T>
bool pack_floats(const Row& row) {
    bool finite = true;
    for (int64_t g = 0; g < row.groups; ++g) {
        T* p = reinterpret_cast<T*>(row.group_bytes(g));
        for (int64_t k = 0; k < kGroup; ++k) {
            int64_t at = std::is_same_v<T, bf16> ? k / 2 * kLanes * 2 + row.lane * 2 + k % 2
                                                 : k * kLanes + row.lane;
            store_n(p + at, splat(row.group(g)[k]), 1);
            finite &= std::isfinite(load_n(p + at, 1)[0]);
        }
    }
    return finite;
}

bool pack_int8(const Row& row) {
    for (int64_t g = 0; g < row.groups; ++g) {
        const float* w = row.group(g);
        uint8_t *p = row.group_bytes(g), codes[kGroup];
        write_scale(p, row.lane, std::fabs(extreme(w, kGroup)) / 127);
        float scale = read_f16(p, row.lane), inverse = inverse_of(scale);
        if (!std::isfinite(scale)) return false;
        for (int64_t k = 0; k < kGroup; ++k) codes[k] = to_code(w[k] * inverse, -127, 127);
        put_bytes(p + 2 * kLanes, row.lane, codes);
    }
    return true;
}

// Scales and minima of the groups as multiples, up to `steps`, of those in the header.
bool pack_nested(const Row& row, int bits, int steps) {
    std::vector<Affine> fits(row.groups);
    float highest = (1 << bits) - 1;
    int64_t first = 0;
    do {
        int64_t last = std::min(first + row.size.span, row.groups);
        float scale = 0, minimum = 0;
        for (int64_t g = first; g < last; ++g) {
            fits[g] = fit_affine(row.group(g), highest);
            scale = std::max(scale, fits[g].scale);
            minimum = std::max(minimum, -fits[g].minimum);
        }
        uint8_t* header = row.header_bytes(first);
        write_f16_above(header, row.lane, scale / steps);
        write_f16_above(header + 2 * kLanes, row.lane, minimum / steps);
        scale = read_f16(header, row.lane);
        minimum = read_f16(header + 2 * kLanes, row.lane);
        if (!std::isfinite(scale) || !std::isfinite(minimum)) return false;
        for (int64_t g = first; g < last; ++g) {
            uint8_t* p = row.group_bytes(g);
            int m = to_code(-fits[g].minimum * inverse_of(minimum), 0, steps);
            int s = to_step(fits[g].scale * inverse_of(scale), 0, steps, [&](int step) {
                return squared_error(row.group(g), {scale * step, -minimum * m}, highest);
            });
            p[row.lane] = s;
            p[kLanes + row.lane] = m;
            quantize(p + 2 * kLanes, row.lane, bits, row.group(g), minimum * static_cast<float>(m),
                     inverse_of(scale * static_cast<float>(s)));
        }
        first = last;
    } while (first < row.groups);
    return true;
}

bool pack_centered(const Row& row, int bits) {
    float center = 1 << (bits - 1);
    for (int64_t g = 0; g < row.groups; ++g) {
        uint8_t* p = row.group_bytes(g);
        write_scale(p, row.lane, fit_centered(row.group(g), kGroup, center));
        float scale = read_f16(p, row.lane);
        if (!std::isfinite(scale)) return false;
        quantize(p + 2 * kLanes, row.lane, bits, row.group(g), 0, inverse_of(scale), center);
    }
    return true;
}

bool pack_shifted(const Row& row, int bits) {
    for (int64_t g = 0; g < row.groups; ++g) {
        const float* w = row.group(g);
        uint8_t* p = row.group_bytes(g);
        auto [low, high] = std::minmax_element(w, w + kGroup);
        write_scale(p, row.lane, (*high - *low) / ((1 << bits) - 1));
        write_f16(p + 2 * kLanes, row.lane, *low);
        float scale = read_f16(p, row.lane), minimum = read_f16(p + 2 * kLanes, row.lane);
        if (!std::isfinite(scale) || !std::isfinite(minimum)) return false;
        quantize(p + 4 * kLanes, row.lane, bits, w, -minimum, inverse_of(scale));
    }
    return true;
}

bool pack_q6_k(const Row& row) {
    std::vector<float> fits(row.groups * 2 + 1);  // one more: an extreme of none is 0
    int64_t first = 0;
    do {
        int64_t last = std::min(first + row.size.span, row.groups);
        for (int64_t i = 2 * first; i < 2 * last; ++i)
            fits[i] = fit_centered(row.values + i * kHalf, kHalf, 32);
        uint8_t* header = row.header_bytes(first);
        int64_t count = std::max<int64_t>(2 * (last - first), 1);
        // + 0: no -0, whose sign compilers keep or not.
        write_f16_above(header, row.lane, extreme(&fits[2 * first], count) / -128 + 0.f);
        float d = read_f16(header, row.lane);
        if (!std::isfinite(d)) return false;
        for (int64_t g = first; g < last; ++g) {
            uint8_t *p = row.group_bytes(g), codes[kGroup];
            for (int half = 0; half < 2; ++half) {
                const float* w = row.group(g) + half * kHalf;
                int s = to_step(fits[2 * g + half] * inverse_of(d), -128, 127,
                                [&](int step) { return centered_error(w, kHalf, d * step, 32); });
                p[half * kLanes + row.lane] = s;
                float inverse = inverse_of(d * static_cast<float>(s));
                for (int k = half * kHalf; k < (half + 1) * kHalf; ++k)
                    codes[k] = to_code(row.group(g)[k] * inverse, -32, 31) + 32;
            }
            put_codes(p + 2 * kLanes, row.lane, 6, codes);
        }
        first = last;
    } while (first < row.groups);
    return true;
}

bool pack_row(Packing packing, const Row& row) {
    switch (packing) {
        case Packing::f32: return pack_floats<float>(row);
        case Packing::bf16: return pack_floats<bf16>(row);
        case Packing::f16: return pack_floats<f16>(row);
        case Packing::int8: return pack_int8(row);
        case Packing::int4: return pack_nested(row, 4, 255);
        case Packing::q4_0: return pack_centered(row, 4);
        case Packing::q4_1: return pack_shifted(row, 4);
        case Packing::q5_0: return pack_centered(row, 5);
        case Packing::q5_1: return pack_shifted(row, 5);
        case Packing::q4_k: return pack_nested(row, 4, 63);
        case Packing::q5_k: return pack_nested(row, 5, 63);
        case Packing::q6_k: return pack_q6_k(row);
    }
    return false;
}

}  // namespace

bool pack_weight(const PackWeight& a, int64_t first, int64_t last) {
    int64_t groups = group_count(a.in), bytes = block_bytes(a.packing, a.in);
    std::vector<float> values(groups * kGroup);
    for (int64_t block = first; block < last; ++block) {
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
            Row row{values.data(), groups, lane, a.packed + block * bytes, size_of(a.packing)};
            if (!pack_row(a.packing, row)) return false;
        }
    }
    return true;
}

}  // namespace mllama::kernels::MLLAMA_ISA
