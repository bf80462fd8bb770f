// Panels: weights of kPanelBlocks blocks and one chunk of inputs, unpacked for register tiles.
#pragma once

#include <type_traits>

#include "kernels/cpu/packed_gemm.h"
#include "kernels/cpu/packed_groups.h"
#include "kernels/cpu/tiles.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

constexpr int64_t kPanelLanes = kPanelBlocks * kLanes;

// How a panel of codes holds them, and so x.
enum class CodeForm {
    floats,  // weights and x are numbers
    bytes,   // weights from 0, x from -127 to 127
    pairs,   // both in 16 bits
    biased,  // weights from -128 to 127, 128 added to x
};
constexpr CodeForm code_form([[maybe_unused]] int bits) {
#if defined(__AVX512VNNI__)
    return CodeForm::biased;
#elif defined(__AVX2__)
    return bits <= 5 ? CodeForm::bytes : CodeForm::pairs;
#else
    return CodeForm::floats;
#endif
}

// ---- floats

constexpr int64_t kChunkWords = 128;  // f32, or pairs of bf16

struct FloatPanel {
    alignas(64) Word words[kPanelBlocks][kChunkWords][kLanes];
    const Word* blocks[kPanelBlocks];  // in `words`, or the packed weights themselves
};

// to[k][lane] = the inputs of `groups` groups at p; `packing` has 16-bit floats.
inline void widen_halves(Packing packing, const uint8_t* p, int64_t groups, Word* to) {
    int64_t numbers = groups * kGroup * kLanes;
    if (packing == Packing::f16) {
        for (int64_t i = 0; i < numbers; i += kWidth) store_words(to + i, lanes_f16(p + 2 * i));
        return;
    }
    for (int64_t i = 0; i < numbers / 2; i += kWidth) {  // pairs of inputs
        vu pair = load_bits(p + 4 * i);
        Word* at = to + i / kLanes * 2 * kLanes + i % kLanes;
        store_words(at, as_float(pair << 16));
        store_words(at + kLanes, as_float(pair & 0xffff0000u));
    }
}

// The inputs of `groups` groups at p as block b of a panel; `packing` has floats. Words that need
// no unpacking stay where they are.
template <class E>
void unpack_floats(Packing packing, const uint8_t* p, int64_t groups, FloatPanel& panel,
                   int64_t b) {
    if (packing == Packing::f32 || E::kElements == 2) {
        panel.blocks[b] = reinterpret_cast<const Word*>(p);
        return;
    }
    panel.blocks[b] = panel.words[b][0];
    widen_halves(packing, p, groups, panel.words[b][0]);
}

// ---- codes

constexpr int64_t kChunkGroups = 8, kChunkInputs = kChunkGroups * kGroup;

// Words of four bytes or two 16-bit codes, and what makes numbers of their products with x.
struct CodePanel {
    static constexpr int64_t kGroupWords = kGroup / (code_form(8) == CodeForm::pairs ? 2 : 4);
    alignas(64) uint32_t words[kPanelBlocks][kChunkGroups][kGroupWords][kLanes];
    int32_t starts[kPanelBlocks][kChunkGroups][2][kLanes];  // of sums, by parts
    float scales[kPanelBlocks][kChunkGroups][2][kLanes];    // by parts
    float minima[kPanelBlocks][kChunkGroups][kLanes];
};

// Weights are scale * (code - center) + minimum, for kWidth rows from `lane` on. The halves of a
// group of q6_k have scales d * s of their own.
struct Numbers {
    vf scale, minimum;
    vi s[2];
};
template <Packing P>
Numbers numbers_of(const uint8_t* header, const uint8_t* p, int64_t lane) {
    Numbers n{};
    if constexpr (is_nested(P)) {
        n.scale = lanes_f16(header + 2 * lane) * lanes_u8(p + lane);
        n.minimum = -(lanes_f16(header + 2 * kLanes + 2 * lane) * lanes_u8(p + kLanes + lane));
    } else if constexpr (P == Packing::q6_k) {
        n.scale = lanes_f16(header + 2 * lane);
        for (int half = 0; half < 2; ++half)
            n.s[half] = __builtin_convertvector(lanes_s8(p + half * kLanes + lane), vi);
    } else {
        n.scale = lanes_f16(p + 2 * lane);
        if constexpr (has_minimum(P)) n.minimum = lanes_f16(p + 2 * kLanes + 2 * lane);
    }
    return n;
}

// Codes of the inputs 4 * j and on of the group at p: bytes, those of int8 with a sign.
template <Packing P>
vu code_word(const uint8_t* p, int64_t lane, int j) {
    constexpr int kBits = bits_of(P);
    constexpr bool kTwoNumbers = has_minimum(P) && !is_nested(P);
    p += 2 * kLanes * (kTwoNumbers ? 2 : 1) + lane * 4;
    if constexpr (kBits == 8) {
        return load_bits(p + j * kLanes * 4);
    } else {
        vu word = load_bits(p + j / 2 * kLanes * 4);
        word = (j % 2 ? word >> 4 : word) & 0x0f0f0f0fu;
        if constexpr (kBits > 4) word |= upper_bits<kBits>(p + kNibbles, j);
        return word;
    }
}

// code - center for byte t of every lane.
template <Packing P>
vi centered_code(vu word, int t) {
    return (reinterpret_cast<vi>(word) << (24 - 8 * t) >> 24) - center_of(P);
}

// A group as block b and group g of a panel.
template <Packing P>
void unpack_codes(const uint8_t* header, const uint8_t* p, CodePanel& panel, int64_t b, int64_t g) {
    constexpr CodeForm kForm = code_form(bits_of(P));
    for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
        Numbers numbers = numbers_of<P>(header, p, lane);
        vi sums[2]{};
#pragma GCC unroll 8
        for (int j = 0; j < kGroup / 4; ++j) {
            vu word = code_word<P>(p, lane, j);
            if constexpr (kForm == CodeForm::pairs) {
                vi code[4];
                for (int t = 0; t < 4; ++t) {
                    code[t] = centered_code<P>(word, t);
                    if constexpr (P == Packing::q6_k) code[t] *= numbers.s[j / 4];
                }
                for (int t = 0; t < 4; t += 2)
                    store_words(&panel.words[b][g][2 * j + t / 2][lane],
                                as_float((code[t] & 0xffff) | (code[t + 1] << 16)));
            } else {
                if constexpr (kForm == CodeForm::biased) {
                    word = ((word ^ 0x80808080u) - 0x01010101u * center_of(P)) ^ 0x80808080u;
#if defined(__AVX512VNNI__)
                    vi& sum = sums[j / 4];
                    sum = reinterpret_cast<vi>(
                        _mm512_dpbusd_epi32(raw(sum), _mm512_set1_epi8(-128), raw(word)));
#endif
                }
                store_words(&panel.words[b][g][j][lane], as_float(word));
            }
        }
        if (P != Packing::q6_k) sums[0] += sums[1];
        for (int half = 0; half < 2; ++half) {
            bool parts = P == Packing::q6_k && kForm == CodeForm::biased;
            vf scale = parts ? numbers.scale * to_float(numbers.s[half]) : numbers.scale;
            store(&panel.scales[b][g][half][lane], scale);
            store_words(reinterpret_cast<Word*>(&panel.starts[b][g][half][lane]),
                        as_float(-sums[half]));
        }
        if (kForm == CodeForm::bytes)
            numbers.minimum -= numbers.scale * static_cast<float>(center_of(P));
        store(&panel.minima[b][g][lane], numbers.minimum);
    }
}

// to[k][lane] = the weights of the group at p.
template <Packing P>
void unpack_numbers(const uint8_t* header, const uint8_t* p, Word* to) {
    for (int64_t lane = 0; lane < kLanes; lane += kWidth) {
        Numbers numbers = numbers_of<P>(header, p, lane);
#pragma GCC unroll 8
        for (int j = 0; j < kGroup / 4; ++j) {
            vu word = code_word<P>(p, lane, j);
            vf scale = numbers.scale;
            if constexpr (P == Packing::q6_k) scale *= to_float(numbers.s[j / 4]);
            for (int t = 0; t < 4; ++t)
                store_words(to + (4 * j + t) * kLanes + lane,
                            to_float(centered_code<P>(word, t)) * scale + numbers.minimum);
        }
    }
}

// The same as block b and group g of a panel.
template <Packing P>
void unpack_codes(const uint8_t* header, const uint8_t* p, FloatPanel& panel, int64_t b,
                  int64_t g) {
    panel.blocks[b] = panel.words[b][0];
    unpack_numbers<P>(header, p, panel.words[b][g * kGroup]);
}

}  // namespace
}  // namespace mllama::kernels::MLLAMA_ISA
