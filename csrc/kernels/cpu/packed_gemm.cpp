#include "kernels/cpu/packed_gemm.h"

#include <algorithm>

#include "kernels/cpu/packed_epilogue.h"
#include "kernels/cpu/packed_tiles.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

// A part of the inputs of all rows.
struct Chunk {
    int64_t first, width, rows;
    int64_t groups() const { return width / kGroup; }
    // Where a row's inputs are in [chunk][row][width], and its groups.
    int64_t at(int64_t row) const { return first * rows + row * width; }
    int64_t group_at(int64_t row) const { return at(row) / kGroup; }
};

template <class Body>
void for_chunks(const PackedLinear& a, int64_t inputs, Body&& body) {
    int64_t padded = group_count(a.in) * kGroup;
    for (int64_t first = 0; first < padded; first += inputs)
        body(Chunk{first, std::min(inputs, padded - first), a.rows});
}

// ---- activations

constexpr int kGroupVectors = kGroup / kWidth;

// `count` inputs at x as floats, and zeros up to a whole group.
template <class T>
inline void load_group(const T* x, int64_t count, vf (&group)[kGroupVectors]) {
    for (int i = 0; i < kGroupVectors; ++i) {
        int64_t left = std::clamp<int64_t>(count - i * kWidth, 0, kWidth);
        group[i] = left == kWidth ? load(x + i * kWidth) : load_n(x + i * kWidth, left);
    }
}

// Codes in [-127, 127], the scale that gives the values back, and scale times their sum, for the
// group whose first input is `at` in the activations. Values that are not finite give a scale that
// is not.
inline void quantize_group(const Activations& to, int64_t at, const vf (&group)[kGroupVectors]) {
    float top = largest_size(reinterpret_cast<const float*>(group), kGroup), scale = top / 127.0f;
    vf inverse = splat(top > 0 ? 127.0f / top : 0.0f);
    vi total{};
    for (int v = 0; v < kGroupVectors; ++v) {
        int64_t i = at + v * kWidth;
        vi code = nearest_code(group[v] * inverse);
        total += code;
        if constexpr (code_form(8) == CodeForm::floats) {
            store(to.values + i, to_float(code) * scale);
        } else if constexpr (code_form(8) == CodeForm::biased) {
            store_bytes(to.codes + i, code ^ 0x80);
        } else {
            store_bytes(to.codes + i, code);
            store_pairs(reinterpret_cast<int16_t*>(to.values) + i, code);
        }
    }
    float sum = static_cast<float>(reduce_add(total));
    to.scales[at / kGroup] = scale;
    reinterpret_cast<float*>(to.sums)[at / kGroup] = scale * sum;
}

template <class T>
void prepare_chunk(const PackedLinear& a, int64_t row, const Chunk& chunk) {
    const T* x = static_cast<const T*>(a.x) + row * a.in + chunk.first;
    int64_t at = chunk.at(row), count = std::min(chunk.width, a.in - chunk.first);
    if (size_of(a.packing).quantized) {
        for (int64_t i = 0; i < chunk.width; i += kGroup) {
            vf group[kGroupVectors];
            load_group(x + i, count - i, group);
            quantize_group(a.activations, at + i, group);
        }
    } else if (takes_pairs(a)) {
        T* to = reinterpret_cast<T*>(a.activations.values) + at;
        std::copy_n(x, count, to);
        std::fill(to + count, to + chunk.width, T{});
    } else {
        widen_row(x, a.activations.values + at, count, chunk.width);
    }
}

// ---- products

// The packed weights of the next panel, fetched a few lines per tile of this one. Unpacking would
// wait for them.
class NextWeights {
  public:
    // `blocks` blocks' bytes [first, first + bytes)
    NextWeights(const uint8_t* first, int64_t stride, int64_t blocks, int64_t bytes)
        : at_(first), skip_(stride - bytes), bytes_(bytes), left_(blocks * bytes) {}
    void share_out(int64_t tiles) { share_ = left_ / std::max<int64_t>(tiles, 1) + kLine; }
    void fetch_share() {
        for (int64_t i = 0; i < share_ && left_ > 0; i += kLine, left_ -= kLine, at_ += kLine) {
            __builtin_prefetch(at_);
            if ((passed_ += kLine) >= bytes_) passed_ = 0, at_ += skip_;
        }
    }

  private:
    static constexpr int64_t kLine = 64;
    const uint8_t* at_;
    int64_t skip_, bytes_, left_, share_ = 0, passed_ = 0;
};

// Adds to the sums of a panel what `tile` does, with as many rows and vectors at a time as there
// are registers for: tile(rows, vectors, first row, first lane).
template <int R, int NV, class Tile>
void for_tiles(int64_t rows, int64_t lanes, NextWeights& next, Tile&& tile) {
    next.share_out(rows / R * (lanes / (NV * kWidth)));
    auto all_rows = [&](auto vectors, int64_t lane) {
        int64_t row = 0;
        for (; row + R <= rows; row += R) {
            tile(std::integral_constant<int, R>{}, vectors, row, lane);
            next.fetch_share();
        }
        if constexpr (R > 4) {
            for (; row + 4 <= rows; row += 4)
                tile(std::integral_constant<int, 4>{}, vectors, row, lane);
        }
        for (; row + 2 <= rows; row += 2)
            tile(std::integral_constant<int, 2>{}, vectors, row, lane);
        if (row < rows) tile(std::integral_constant<int, 1>{}, vectors, row, lane);
    };
    int64_t lane = 0;
    for (; lane + NV * kWidth <= lanes; lane += NV * kWidth)
        all_rows(std::integral_constant<int, NV>{}, lane);
    int64_t left = (lanes - lane) / kWidth;
    if constexpr (NV > 2) {
        if (left == 2) all_rows(std::integral_constant<int, 2>{}, lane);
    }
    if constexpr (NV > 1) {
        if (left == 1) all_rows(std::integral_constant<int, 1>{}, lane);
    }
}

// x and weights as floats: f32 words or, where E says so, pairs of bf16.
template <class E>
struct PackedFloats {
    using Panel = FloatPanel;
    static constexpr int64_t kInputs = kChunkWords * E::kElements;
    static void unpack(const PackedLinear& a, const uint8_t* block, const Chunk& chunk,
                       Panel& panel, int64_t b) {
        const uint8_t* p = block + group_offset(size_of(a.packing), chunk.first / kGroup);
        unpack_floats<E>(a.packing, p, chunk.groups(), panel, b);
    }
    static void multiply(const PackedLinear& a, const Panel& panel, int64_t first, int64_t last,
                         const Chunk& chunk, int64_t lanes, NextWeights& next, float* sums) {
        int64_t words = chunk.width / E::kElements;
        const Word* x = as_words(a.activations.values) + chunk.at(first) / E::kElements;
        constexpr int kTile = kWidth == 16 ? 8 : 6, kVectorsOfTile = kWidth == 16 ? 3 : 2;
        for_tiles<kTile, kVectorsOfTile>(
            last - first, lanes, next, [&](auto r, auto n, int64_t row, int64_t lane) {
                multiply_floats<E, r.value, n.value>(panel, lane, x + row * words, words,
                                                     sums + row * kPanelLanes + lane);
            });
    }
};

// The chunk's groups of a block of codes as block b of a panel.
template <Packing P, class Panel>
void unpack_chunk(const PackedLinear& a, const uint8_t* block, const Chunk& chunk, Panel& panel,
                  int64_t b) {
    const PackingSize& size = size_of(a.packing);
    for (int64_t i = 0, g = chunk.first / kGroup; i < chunk.groups(); ++i, ++g)
        unpack_codes<P>(block + header_offset(size, g), block + group_offset(size, g), panel, b, i);
}

#if defined(__AVX2__)

template <Packing P>
struct PackedCodes {
    using Panel = CodePanel;
    static constexpr int64_t kInputs = kChunkInputs;
    static constexpr CodeForm kForm = code_form(bits_of(P));
    static constexpr int kParts = P == Packing::q6_k && kForm == CodeForm::biased ? 2 : 1;
    static constexpr bool kMinimum =
        has_minimum(P) || (kForm == CodeForm::bytes && center_of(P) > 0);
    static void unpack(const PackedLinear& a, const uint8_t* block, const Chunk& chunk,
                       Panel& panel, int64_t b) {
        unpack_chunk<P>(a, block, chunk, panel, b);
    }
    static void multiply(const PackedLinear& a, const Panel& panel, int64_t first, int64_t last,
                         const Chunk& chunk, int64_t lanes, NextWeights& next, float* sums) {
        using Dot = PanelDot<bits_of(P)>;
        constexpr int kTile = kWidth == 16 || kForm == CodeForm::pairs ? 4 : 3;
        constexpr int kVectorsOfTile = kWidth == 16 ? 3 : 2;
        int64_t groups = chunk.groups(), words = groups * Dot::kWords;
        const void* codes = kForm == CodeForm::pairs
                                ? static_cast<const void*>(a.activations.values)
                                : a.activations.codes;
        CodeRows x{static_cast<const Word*>(codes) + chunk.group_at(first) * Dot::kWords,
                   a.activations.scales + chunk.group_at(first),
                   reinterpret_cast<const float*>(a.activations.sums) + chunk.group_at(first)};
        for_tiles<kTile, kVectorsOfTile>(
            last - first, lanes, next, [&](auto r, auto n, int64_t row, int64_t lane) {
                CodeRows part{x.words + row * words, x.scales + row * groups,
                              x.sums + row * groups};
                multiply_codes<Dot, kParts, kMinimum, r.value, n.value>(
                    panel, lane, part, groups, sums + row * kPanelLanes + lane);
            });
    }
};

#else

template <Packing P>
struct PackedCodes : PackedFloats<F32Words> {
    static void unpack(const PackedLinear& a, const uint8_t* block, const Chunk& chunk,
                       Panel& panel, int64_t b) {
        unpack_chunk<P>(a, block, chunk, panel, b);
    }
};

#endif

template <class Body>
void dispatch_format(const PackedLinear& a, Body&& body) {
    if (takes_pairs(a)) return body(PackedFloats<WordsOf<bf16>::type>{});
    switch (a.packing) {
        case Packing::f32:
        case Packing::bf16:
        case Packing::f16: return body(PackedFloats<F32Words>{});
        case Packing::int8: return body(PackedCodes<Packing::int8>{});
        case Packing::int4:
        case Packing::q4_k: return body(PackedCodes<Packing::q4_k>{});
        case Packing::q5_k: return body(PackedCodes<Packing::q5_k>{});
        case Packing::q4_0: return body(PackedCodes<Packing::q4_0>{});
        case Packing::q5_0: return body(PackedCodes<Packing::q5_0>{});
        case Packing::q4_1: return body(PackedCodes<Packing::q4_1>{});
        case Packing::q5_1: return body(PackedCodes<Packing::q5_1>{});
        case Packing::q6_k: return body(PackedCodes<Packing::q6_k>{});
    }
}

// Columns [column, column + lanes) of the rows [first, last) of y.
void store_sums(const PackedLinear& a, int64_t first, int64_t last, int64_t column, int64_t lanes,
                const float* sums) {
    int64_t count = std::min(lanes, a.out - column);
    dispatch(a.dtype, [&](auto t) {
        for (int64_t row = first; row < last; ++row, sums += kPanelLanes) {
            auto* y = static_cast<decltype(t)*>(a.y) + row * a.out + column;
            for_vectors(count, [&](int64_t i, int n) {
                put(y + i, finish(a, column + i, n, load(sums + i)), n);
            });
        }
    });
}

// A chunk of kRows rows of x stays in the second-level cache while kPanels panels pass over it, as
// do the sums of these.
template <class Format>
class Product {
  public:
    explicit Product(const PackedLinear& a)
        : a_(a),
          bytes_(block_bytes(a.packing, a.in)),
          panel_(1),
          sums_(kPanels * std::min(a.rows, kRows) * kPanelLanes) {}

    void run(int64_t first, int64_t last) {
        constexpr int64_t kBlocks = kPanels * kPanelBlocks;
        for (int64_t row = 0; row < a_.rows; row += kRows) {
            int64_t end = std::min(row + kRows, a_.rows);
            for (int64_t block = first; block < last; block += kBlocks)
                multiply(row, end, block, std::min(block + kBlocks, last), last);
        }
    }

  private:
    static constexpr int64_t kRows = 256, kPanels = 8;

    // The columns that the blocks [first, last) give, for the rows [row, end). `all` is where the
    // blocks end that come after these.
    void multiply(int64_t row, int64_t end, int64_t first, int64_t last, int64_t all) {
        int64_t size = (end - row) * kPanelLanes;  // sums of a panel
        auto for_panels = [&](auto&& body) {
            float* sums = sums_;
            for (int64_t block = first; block < last; block += kPanelBlocks, sums += size)
                body(block, std::min(kPanelBlocks, last - block), sums);
        };
        std::fill_n(static_cast<float*>(sums_), size * kPanels, 0.0f);
        for_chunks(a_, Format::kInputs, [&](const Chunk& chunk) {
            for_panels([&](int64_t block, int64_t blocks, float* sums) {
                for (int64_t b = 0; b < blocks; ++b)
                    Format::unpack(a_, a_.weight + (block + b) * bytes_, chunk, *panel_, b);
                NextWeights next = after(block + kPanelBlocks, first, last, all, chunk);
                Format::multiply(a_, *panel_, row, end, chunk, blocks * kLanes, next, sums);
            });
        });
        for_panels([&](int64_t block, int64_t blocks, const float* sums) {
            store_sums(a_, row, end, block * kLanes, blocks * kLanes, sums);
        });
    }

    // The weights of the panel that comes next: this chunk's, the next one's, or the first one's of
    // other blocks.
    NextWeights after(int64_t block, int64_t first, int64_t last, int64_t all,
                      const Chunk& chunk) const {
        const PackingSize& size = size_of(a_.packing);
        int64_t groups = group_count(a_.in), g = chunk.first / kGroup;
        if (block >= last) {
            g += chunk.groups();
            block = g < groups ? first : last;
            if (g == groups) g = 0, last = all;
        }
        int64_t count = std::min(Format::kInputs / kGroup, groups - g);
        return {a_.weight + block * bytes_ + group_offset(size, g), bytes_,
                std::clamp<int64_t>(last - block, 0, kPanelBlocks), count * size.group};
    }

    const PackedLinear& a_;
    int64_t bytes_;
    Scratch<typename Format::Panel> panel_;
    Scratch<float> sums_;
};

}  // namespace

void gemm_activations(const PackedLinear& a, int64_t first, int64_t last) {
    dispatch_format(a, [&](auto format) {
        dispatch(a.dtype, [&](auto t) {
            for (int64_t row = first; row < last; ++row) {
                for_chunks(a, format.kInputs,
                           [&](const Chunk& chunk) { prepare_chunk<decltype(t)>(a, row, chunk); });
            }
        });
    });
}

void gemm_product(const PackedLinear& a, int64_t first, int64_t last) {
    dispatch_format(a, [&](auto format) { Product<decltype(format)>(a).run(first, last); });
}

}  // namespace mllama::kernels::MLLAMA_ISA
