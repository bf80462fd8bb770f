#include "kernels/cpu/image.h"

#include <algorithm>
#include <memory>

#include "simd/vec.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

using namespace simd::MLLAMA_ISA;

inline uint8_t clipped(int32_t x) { return static_cast<uint8_t>(x < 0 ? 0 : x > 255 ? 255 : x); }

// kWidth bytes to integers and back, clipped. By intrinsics, since GCC 12 takes vector conversions between 8 and 32
// bits apart element by element.
#if defined(__AVX512F__)
inline vi load_bytes(const uint8_t* p) {
    return reinterpret_cast<vi>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline void store_bytes(uint8_t* p, vi x) {
    __m512i positive = _mm512_max_epi32(reinterpret_cast<__m512i>(x), _mm512_setzero_si512());
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtusepi32_epi8(positive));
}
#elif defined(__AVX2__)
inline vi load_bytes(const uint8_t* p) {
    return reinterpret_cast<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
}
inline void store_bytes(uint8_t* p, vi x) {
    __m256i value = reinterpret_cast<__m256i>(x);
    __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
#else
inline vi load_bytes(const uint8_t* p) { return vi{p[0], p[1], p[2], p[3]}; }
inline void store_bytes(uint8_t* p, vi x) {
    for (int i = 0; i < kWidth; ++i) p[i] = clipped(x[i]);
}
#endif

constexpr int32_t kHalf = 1 << (kFractionBits - 1);

// out[i] = the weighted sum of in[k * stride + i] over k, for kWidth * N neighbouring i.
template <int N>
inline void sum_vectors(const uint8_t* in, int64_t stride, const int32_t* weights, int32_t count, uint8_t* out) {
    vi sums[N];
    for (vi& sum : sums) sum = vi{} + kHalf;
    for (int32_t k = 0; k < count; ++k, in += stride) {
        for (int j = 0; j < N; ++j) sums[j] += load_bytes(in + j * kWidth) * weights[k];
    }
    for (int j = 0; j < N; ++j) store_bytes(out + j * kWidth, sums[j] >> kFractionBits);
}

// The same for `size` neighbouring i.
void sum_rows(const uint8_t* in, int64_t stride, const int32_t* weights, int32_t count, uint8_t* out, int64_t size) {
    constexpr int kMany = 6;
    int64_t i = 0;
    for (; i + kMany * kWidth <= size; i += kMany * kWidth) sum_vectors<kMany>(in + i, stride, weights, count, out + i);
    for (; i + kWidth <= size; i += kWidth) sum_vectors<1>(in + i, stride, weights, count, out + i);
    for (; i < size; ++i) {
        int32_t sum = kHalf;
        for (int32_t k = 0; k < count; ++k) sum += in[k * stride + i] * weights[k];
        out[i] = clipped(sum >> kFractionBits);
    }
}

// Pixels [rows, columns] become [columns, rows]. Strides are in bytes.
void transpose(const uint8_t* in, int64_t in_stride, int64_t rows, int64_t columns, uint8_t* out, int64_t out_stride) {
    constexpr int64_t kTile =
        16;  // rows read side by side: few enough for the cache even where their addresses collide
    for (int64_t top = 0; top < rows; top += kTile) {
        const int64_t bottom = std::min(top + kTile, rows);
        for (int64_t column = 0; column < columns; ++column) {
            const uint8_t* from = in + column * 3;
            uint8_t* to = out + column * out_stride;
            // Four bytes at once, where the fourth is inside the row and the next pixel overwrites it.
            const int64_t wide = column + 1 < columns ? bottom - 1 : top;
            for (int64_t row = top; row < wide; ++row) std::memcpy(to + row * 3, from + row * in_stride, 4);
            for (int64_t row = wide; row < bottom; ++row) std::memcpy(to + row * 3, from + row * in_stride, 3);
        }
    }
}

}  // namespace

void resize_height(const Resize& a, int64_t first_row, int64_t last_row) {
    const int64_t size = a.width * 3;
    for (int64_t y = first_row; y < last_row; ++y) {
        sum_rows(a.in + a.first[y] * size, size, a.weights + y * a.taps, a.count[y], a.out + y * size, size);
    }
}

// A block of rows is turned on its side, so that its rows lie side by side in a vector and the sum over columns is the
// same loop as the sum over rows.
void resize_width(const Resize& a, int64_t first_block, int64_t last_block) {
    const int64_t most = std::min(a.height, kBlockRows), stride = most * 3;
    std::unique_ptr<uint8_t[]> columns(new uint8_t[stride * a.in_width]), resized(new uint8_t[stride * a.width]);
    for (int64_t block = first_block; block < last_block; ++block) {
        const int64_t top = block * kBlockRows, rows = std::min(a.height - top, most);
        transpose(a.in + top * a.in_width * 3, a.in_width * 3, rows, a.in_width, columns.get(), stride);
        for (int64_t x = 0; x < a.width; ++x) {
            sum_rows(columns.get() + a.first[x] * stride, stride, a.weights + x * a.taps, a.count[x],
                     resized.get() + x * stride, rows * 3);
        }
        transpose(resized.get(), stride, a.width, rows, a.out + top * a.width * 3, a.width * 3);
    }
}

void look_up(const uint8_t* pixels, const float* table, float* planes, int64_t size, int64_t first, int64_t last) {
    for (int64_t c = 0; c < 3; ++c) {
        for (int64_t i = first; i < last; ++i) planes[c * size + i] = table[c * 256 + pixels[i * 3 + c]];
    }
}

}  // namespace mllama::kernels::MLLAMA_ISA
