#include "kernels/cpu/image.h"

#include <algorithm>
#include <memory>

#include "simd/vec.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

// Sums of pairs are exact modulo 2^32, so that neither their order nor the split into high and low
// halves shows.

typedef int16_t vs __attribute__((vector_size(kWidth * 4)));  // kWidth pairs of 16-bit numbers

// load_pairs: 2 * kWidth bytes, widened. add_pairs: sum + a.even * b.even + a.odd * b.odd.
// store_bytes: kWidth numbers, clipped to a byte each.
#if defined(__AVX512F__)
inline vs load_pairs(const uint8_t* p) {
    return reinterpret_cast<vs>(
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
}
inline vi add_pairs(vi sum, vs a, vs b) {
#if defined(__AVX512VNNI__)
    return reinterpret_cast<vi>(_mm512_dpwssd_epi32(reinterpret_cast<__m512i>(sum),
                                                    reinterpret_cast<__m512i>(a),
                                                    reinterpret_cast<__m512i>(b)));
#else
    return reinterpret_cast<vi>(_mm512_add_epi32(
        reinterpret_cast<__m512i>(sum),
        _mm512_madd_epi16(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b))));
#endif
}
inline void store_bytes(uint8_t* p, vi x) {
    __m512i positive = _mm512_max_epi32(reinterpret_cast<__m512i>(x), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(positive));
}
#elif defined(__AVX2__)
inline vs load_pairs(const uint8_t* p) {
    return reinterpret_cast<vs>(
        _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline vi add_pairs(vi sum, vs a, vs b) {
    return reinterpret_cast<vi>(_mm256_add_epi32(
        reinterpret_cast<__m256i>(sum),
        _mm256_madd_epi16(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b))));
}
inline void store_bytes(uint8_t* p, vi x) {
    __m256i value = reinterpret_cast<__m256i>(x);
    __m128i words =
        _mm_packs_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
#elif defined(__SSE2__)
inline vs load_pairs(const uint8_t* p) {
    __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return reinterpret_cast<vs>(_mm_unpacklo_epi8(bytes, _mm_setzero_si128()));
}
inline vi add_pairs(vi sum, vs a, vs b) {
    return sum + reinterpret_cast<vi>(
                     _mm_madd_epi16(reinterpret_cast<__m128i>(a), reinterpret_cast<__m128i>(b)));
}
inline void store_bytes(uint8_t* p, vi x) {
    __m128i words = _mm_packs_epi32(reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(x));
    __m128i bytes = _mm_packus_epi16(words, words);
    std::memcpy(p, &bytes, kWidth);
}
#else
inline vs load_pairs(const uint8_t* p) {
    return vs{p[0], p[1], p[2], p[3], p[4], p[5], p[6], p[7]};
}
inline vi add_pairs(vi sum, vs a, vs b) {
    for (int i = 0; i < kWidth; ++i) sum[i] += a[2 * i] * b[2 * i] + a[2 * i + 1] * b[2 * i + 1];
    return sum;
}
inline void store_bytes(uint8_t* p, vi x) {
    for (int i = 0; i < kWidth; ++i)
        p[i] = static_cast<uint8_t>(x[i] < 0 ? 0 : x[i] > 255 ? 255 : x[i]);
}
#endif

// Pair k of lane i is at pairs[k * stride + 2 * i]. out[i] = result `index` of lane i, for N
// vectors of lanes.
template <int N>
inline void sum_vectors(const Resize& a, int64_t index, const uint8_t* pairs, int64_t stride,
                        uint8_t* out) {
    vi high[N], low[N];
#pragma GCC unroll 8  // early, or the sums go through memory
    for (int j = 0; j < N; ++j) {
        high[j] = vi{};
        low[j] = vi{} + (1 << (kFractionBits - 1));
    }
    for (int32_t k = 0; k < a.count[index]; ++k, pairs += stride) {
        vs high_weights = reinterpret_cast<vs>(vi{} + a.high[index * a.most + k]);
        vs low_weights = reinterpret_cast<vs>(vi{} + a.low[index * a.most + k]);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
            vs values = load_pairs(pairs + j * 2 * kWidth);
            high[j] = add_pairs(high[j], values, high_weights);
            low[j] = add_pairs(low[j], values, low_weights);
        }
    }
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
        vu sum = (reinterpret_cast<vu>(high[j]) << kLowBits) + reinterpret_cast<vu>(low[j]);
        store_bytes(out + j * kWidth, reinterpret_cast<vi>(sum) >> kFractionBits);
    }
}

// The same for `lanes` lanes, a multiple of kWidth.
inline void sum_lanes(const Resize& a, int64_t index, const uint8_t* pairs, int64_t stride,
                      uint8_t* out, int64_t lanes) {
    constexpr int kMany = 6;  // a full block, 96 lanes, is a multiple of this for every width
    int64_t i = 0;
    for (; i + kMany * kWidth <= lanes; i += kMany * kWidth)
        sum_vectors<kMany>(a, index, pairs + 2 * i, stride, out + i);
    for (; i < lanes; i += kWidth) sum_vectors<1>(a, index, pairs + 2 * i, stride, out + i);
}

int64_t whole_vectors(int64_t lanes) { return (lanes + kWidth - 1) / kWidth * kWidth; }

// ---- pixels into lanes, and back

// Two neighboring pixels r0 g0 b0 r1 g1 b1 of a row become r0 r1 g0 g1 b0 b1; two bytes more are
// read and written.
inline void pair_pixels(const uint8_t* from, uint8_t* to) {
    const uint8_t paired[8] = {from[0], from[3], from[1], from[4], from[2], from[5]};
    std::memcpy(to, paired, sizeof paired);
}

// The same of two rows, side by side; of each two bytes more are read, and four written.
inline void pair_rows(const uint8_t* from, int64_t row_bytes, uint8_t* to) {
#if defined(__SSSE3__)
    const __m128i order = _mm_setr_epi8(0, 3, 1, 4, 2, 5, 8, 11, 9, 12, 10, 13, -1, -1, -1, -1);
    __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)),
            second = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + row_bytes));
    __m128i pixels = _mm_shuffle_epi8(_mm_unpacklo_epi64(first, second), order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), pixels);
#else
    pair_pixels(from, to);
    pair_pixels(from + row_bytes, to + 6);
#endif
}

// `rows` rows of pixels become pairs of columns, row by row in the lanes.
void pair_columns(const uint8_t* in, int64_t rows, int64_t width, uint8_t* pairs, int64_t stride) {
    constexpr int64_t kTile = 8;  // rows side by side: the cache has them where addresses collide
    const int64_t whole = (width - 1) / 2;  // pairs that another column follows
    for (int64_t top = 0; top < rows; top += kTile) {
        const int64_t bottom = std::min(top + kTile, rows);
        for (int64_t pair = 0; pair < whole; ++pair) {
            const uint8_t* from = in + (top * width + pair * 2) * 3;
            uint8_t* to = pairs + pair * stride + top * 6;
            int64_t row = top;
            for (; row + 1 < bottom; row += 2, from += 2 * width * 3, to += 12)
                pair_rows(from, width * 3, to);
            if (row < bottom) pair_pixels(from, to);
        }
        for (int64_t row = top; row < bottom; ++row) {
            uint8_t last[8] = {};
            std::memcpy(last, in + (row * width + whole * 2) * 3, (width - whole * 2) * 3);
            pair_pixels(last, pairs + whole * stride + row * 6);
        }
    }
}

// Columns of pixels in the lanes to pixels of rows.
inline void put_pixels(const uint8_t* sums, int64_t rows, uint8_t* out, int64_t stride, bool last) {
    if (last) {
        for (int64_t row = 0; row < rows; ++row) std::memcpy(out + row * stride, sums + row * 3, 3);
        return;
    }
    // Four bytes are one move; the next pixel overwrites the fourth.
#pragma GCC unroll 8
    for (int64_t row = 0; row < rows; ++row) std::memcpy(out + row * stride, sums + row * 3, 4);
}

}  // namespace

// A block of rows is transposed, so that neighboring rows lie side by side in a vector.
void resize_width(const Resize& a, const uint8_t* in, int64_t rows, int64_t in_width, uint8_t* out,
                  int64_t width) {
    const int64_t most = std::min(rows, kBlock), lanes = whole_vectors(most * 3);
    const int64_t stride = 2 * lanes + 8;  // pair_rows writes a little ahead
    auto pairs = std::make_unique_for_overwrite<uint8_t[]>((in_width + 1) / 2 * stride),
         sums = std::make_unique<uint8_t[]>(lanes + 1);  // put_pixels reads a byte more
    for (int64_t top = 0; top < rows; top += most) {
        const int64_t count = std::min(rows - top, most);
        pair_columns(in + top * in_width * 3, count, in_width, pairs.get(), stride);
        uint8_t* to = out + top * width * 3;
        for (int64_t x = 0; x < width; ++x, to += 3) {
            sum_lanes(a, x, pairs.get() + a.first[x] * stride, stride, sums.get(), lanes);
            put_pixels(sums.get(), count, to, width * 3, x + 1 == width);
        }
    }
}

void resize_height(const Resize& a, const uint8_t* in, int64_t first_pair, int64_t in_height,
                   int64_t width, uint8_t* out, int64_t first, int64_t last) {
    constexpr int64_t kStrip = 384;  // bytes of a row at a time: their pairs stay in a cache
    const int64_t size = width * 3, lanes = whole_vectors(std::min(size, kStrip));
    const int64_t stride = 2 * lanes;
    const int64_t begin = a.first[first], end = a.first[last - 1] + a.count[last - 1];  // pairs
    auto pairs = std::make_unique<uint8_t[]>((end - begin) * stride),
         sums = std::make_unique<uint8_t[]>(lanes);
    for (int64_t left = 0; left < size; left += kStrip) {
        const int64_t bytes = std::min(size - left, kStrip);
        for (int64_t pair = begin; pair < end; ++pair) {
            const uint8_t* even = in + (pair - first_pair) * 2 * size + left;
            const uint8_t* odd =
                2 * pair + 1 < in_height ? even + size : even;  // beside a last one: weight 0
            uint8_t* to = pairs.get() + (pair - begin) * stride;
            for (int64_t i = 0; i < bytes; ++i) {
                to[2 * i] = even[i];
                to[2 * i + 1] = odd[i];
            }
        }
        for (int64_t y = first; y < last; ++y) {
            sum_lanes(a, y, pairs.get() + (a.first[y] - begin) * stride, stride, sums.get(), lanes);
            std::memcpy(out + (y - first) * size + left, sums.get(), bytes);
        }
    }
}

void look_up(const uint8_t* pixels, const float* table, float* planes, int64_t size,
             int64_t count) {
    for (int64_t c = 0; c < 3; ++c) {
        for (int64_t i = 0; i < count; ++i)
            planes[c * size + i] = table[c * 256 + pixels[i * 3 + c]];
    }
}

}  // namespace mllama::kernels::MLLAMA_ISA
