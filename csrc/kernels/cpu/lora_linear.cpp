#include "kernels/cpu/lora_linear.h"

#include <algorithm>
#include <type_traits>

#include "kernels/cpu/tiles.h"

namespace mllama::kernels::MLLAMA_ISA {
namespace {

// All products run on f32 register tiles (tiles.h): blocks of x and of the factor are widened into
// scratch first, which is also where dropout happens. Sums over a long dimension are taken in
// blocks, and the blocks' sums added in order.
constexpr int64_t kSteps = 256;  // of x's width, summed at a time by low_rank_down

// ---- dropout

template <class U>  // uint32_t or a vector of them
inline U mix(U h) {
    h ^= h >> 16;
    h *= 0x21f0aaadu;
    h ^= h >> 15;
    h *= 0x735a2d97u;
    return h ^ (h >> 15);
}

// The elements of one row that dropout keeps, as `keep_mask` of ops/lora_linear.py.
class KeepMask {
  public:
    KeepMask() = default;
    KeepMask(const LowRank& a, int64_t row) : threshold_(a.threshold) {
        uint32_t low = static_cast<uint32_t>(a.seed), high = static_cast<uint32_t>(a.seed >> 32);
        key_ = mix(static_cast<uint32_t>(row) ^ mix(low ^ mix(high)));
        shift_ = mix(key_ ^ mix(high ^ 0x9e3779b9u));
    }
    // x in the lanes that are kept, 0 in the others; the first lane is element `column` of the row.
    vf operator()(vf x, int64_t column) const {
        vu lane;
        for (int i = 0; i < kWidth; ++i) lane[i] = i;
        vu hash = mix((lane + static_cast<uint32_t>(column)) ^ key_) + shift_;
        return hash >= threshold_ ? x : vf{};
    }

  private:
    uint32_t threshold_ = 0, key_ = 0, shift_ = 0;
};

// ---- operands

// Columns [column, column + size) of a row of dropout(x) as f32, then zeros up to `width`, a
// multiple of kWidth.
void widen_with_dropout(const LowRank& a, int64_t row, int64_t column, int64_t size, float* to,
                        int64_t width) {
    dispatch(a.dtype, [&](auto t) {
        widen_row(static_cast<const decltype(t)*>(a.x) + row * a.width + column, to, size, width);
    });
    if (!a.dropout) return;
    KeepMask keep(a, row);
    for (int64_t i = 0; i < size; i += kWidth) store(to + i, keep(load(to + i), column + i));
}

// The factor's part at [first, first + count) of the width, as the vectors of a product:
// dst[step][lanes], where steps run along the width or along the rank. `room` and dst hold lanes
// times the steps, these as multiples of kWidth.
void pack_factor(const LowRank& a, int64_t first, int64_t count, bool along_width, int64_t lanes,
                 Word* room, Word* dst) {
    int64_t rows = a.by_column ? count : a.rank, size = a.by_column ? a.rank : count;
    int64_t start = a.by_column ? first * a.rank : first, stride = a.by_column ? a.rank : a.width;
    dispatch(a.factor_dtype, [&](auto w) {
        auto row_at = [&](int64_t i) {
            return static_cast<const decltype(w)*>(a.factor) + start + i * stride;
        };
        if (along_width == a.by_column) {
            pack_rows<F32Words>(row_at, rows, size, lanes, dst);
        } else {
            pack_columns<F32Words>(row_at, rows, lanes, size, room, dst);
        }
    });
}

// Calls body(first lane, vectors) for `lanes` lanes, a multiple of kWidth; vectors as
// std::integral_constant.
template <class Body>
inline __attribute__((always_inline)) void for_lanes(int64_t lanes, Body&& body) {
    for (int64_t lane = 0; lane < lanes; lane += kTileVectors * kWidth) {
        switch ((lanes - lane) / kWidth) {
            case 1: body(lane, std::integral_constant<int, 1>{}); break;
            case 2: body(lane, std::integral_constant<int, 2>{}); break;
            default: body(lane, std::integral_constant<int, 3>{});
        }
    }
}

// ---- down

// Fewer rows than a tile has, as in decoding: a dot product for each element, with lora_a read as
// it lies.
template <class W>
void down_by_dots(const LowRank& a, const W* factor, int64_t first_row, int64_t last_row) {
    int64_t width = round_up(a.width, kWidth);
    Floats x(width);
    for (int64_t row = first_row; row < last_row; ++row) {
        widen_with_dropout(a, row, 0, a.width, x, width);
        for (int64_t c = 0; c < a.rank; ++c) {
            const W* f = factor + c * a.width;
            vf sum[4]{};  // in flight, since one would wait for each addition
            int64_t i = 0;
            for (; i + 4 * kWidth <= a.width; i += 4 * kWidth) {
#pragma GCC unroll 4
                for (int j = 0; j < 4; ++j)
                    sum[j] += load(x + i + j * kWidth) * load(f + i + j * kWidth);
            }
            for_vectors(a.width - i,
                        [&](int64_t j, int n) { sum[0] += load(x + i + j) * at(f + i + j, n); });
            a.small[row * a.stride + c] =
                a.scale * reduce_add((sum[0] + sum[1]) + (sum[2] + sum[3]));
        }
    }
}

void down(const LowRank& a, int64_t first_row, int64_t last_row) {
    if (!a.by_column && a.rows < kTileRows) {
        return dispatch(a.factor_dtype, [&](auto w) {
            down_by_dots(a, static_cast<const decltype(w)*>(a.factor), first_row, last_row);
        });
    }
    int64_t lanes = round_up(a.rank, kWidth);
    Words factor(kSteps * lanes), room(kSteps * lanes);
    Floats x(kTileRows * kSteps);
    for (int64_t row = first_row; row < last_row; ++row)
        std::fill_n(a.small + row * a.stride, a.rank, 0.0f);
    for (int64_t column = 0; column < a.width; column += kSteps) {
        int64_t steps = std::min(kSteps, a.width - column);
        pack_factor(a, column, steps, true, lanes, room, factor);
        for (int64_t row = first_row; row < last_row; row += kTileRows) {
            int64_t rows = std::min<int64_t>(kTileRows, last_row - row);
            for (int64_t i = 0; i < rows; ++i)
                widen_with_dropout(a, row + i, column, steps, x + i * kSteps, kSteps);
            std::fill(x + rows * kSteps, x + kTileRows * kSteps, 0.0f);
            for_lanes(lanes, [&](int64_t lane, auto vectors) {
                constexpr int kVectors = vectors;
                Tile<kVectors> tile{};
                multiply_add<F32Words, kSteps>(tile, as_words(x), 1, factor + lane, lanes, steps);
                for_tile<kVectors>([&](int r, int n) {
                    int64_t c = lane + n * kWidth, count = std::min<int64_t>(kWidth, a.rank - c);
                    float* sum = a.small + (row + r) * a.stride + c;
                    if (r < rows) put(sum, at(sum, count) + a.scale * tile[r][n], count);
                });
            });
        }
    }
}

// ---- up

template <class T>
class Up {
  public:
    explicit Up(const LowRank& args) : a(args) {}

    void run(int64_t block, int64_t row_block) {
        if (block != block_) pack(block);
        int64_t row = row_block * kRowBlock, last = std::min(row + kRowBlock, a.rows);
        for (; row + kTileRows <= last; row += kTileRows) {
            pack_columns<F32Words>([&](int64_t i) { return a.small + (row + i) * a.stride; },
                                   kTileRows, kTileRows, a.rank, room_, small_);
            add_rows<kTileRows>(row, small_, kTileRows);
        }
        for (; row < last; ++row) add_rows<1>(row, as_words(a.small + row * a.stride), 1);
    }

  private:
    void pack(int64_t block) {
        block_ = block;
        first_ = block * kUpColumns;
        columns_ = std::min(kUpColumns, a.width - first_);
        lanes_ = round_up(columns_, kWidth);
        pack_factor(a, first_, columns_, false, lanes_, room_, factor_);
    }

    // Rows row .. row + R of x; small[step] holds theirs side by side, steps are `stride` apart.
    template <int R>
    void add_rows(int64_t row, const Word* small, int64_t stride) {
        KeepMask keep[R];
        if (a.dropout) {
            for (int r = 0; r < R; ++r) keep[r] = KeepMask(a, row + r);
        }
        for_lanes(lanes_, [&](int64_t lane, auto vectors) {
            constexpr int kVectors = vectors;
            vf tile[R][kVectors]{};
            multiply_add<F32Words, 1>(tile, small, stride, factor_ + lane, lanes_, a.rank);
            for_tile<kVectors, R>([&](int r, int n) {
                int64_t i = lane + n * kWidth, count = std::min<int64_t>(kWidth, columns_ - i);
                T* x = static_cast<T*>(a.x) + (row + r) * a.width + first_ + i;
                vf update = a.scale * tile[r][n];
                if (a.dropout) update = keep[r](update, first_ + i);
                put(x, at(x, count) + update, count);
            });
        });
    }

    const LowRank& a;
    int64_t block_ = -1, first_ = 0, columns_ = 0, lanes_ = 0, words_ = round_up(a.rank, kWidth);
    Words factor_{words_ * kUpColumns}, small_{words_ * kTileRows}, room_{words_ * kUpColumns};
};

// ---- outer

void outer(const LowRank& a, int64_t block) {
    constexpr int64_t kStride = kOuterColumns;
    int64_t first = block * kOuterColumns, columns = std::min(kOuterColumns, a.width - first);
    int64_t lanes = round_up(columns, kWidth), ranks = round_up(a.rank, kWidth);
    Floats sums(ranks * kStride), turned(ranks * kStride), x(kRowBlock * kStride);
    Words small(kRowBlock * ranks);
    std::fill(sums + 0, sums + ranks * kStride, 0.0f);
    for (int64_t row = 0; row < a.rows; row += kRowBlock) {
        int64_t rows = std::min(kRowBlock, a.rows - row);
        for (int64_t i = 0; i < rows; ++i)
            widen_with_dropout(a, row + i, first, columns, x + i * kStride, lanes);
        pack_rows<F32Words>([&](int64_t i) { return a.small + (row + i) * a.stride; }, rows, a.rank,
                            ranks, small);
        for (int64_t c = 0; c < a.rank; c += kTileRows) {
            for_lanes(lanes, [&](int64_t lane, auto vectors) {
                constexpr int kVectors = vectors;
                Tile<kVectors> tile{};
                multiply_add<F32Words, 1>(tile, small + c, ranks, as_words(x + lane), kStride,
                                          rows);
                for_tile<kVectors>([&](int r, int n) {
                    float* sum = sums + (c + r) * kStride + lane + n * kWidth;
                    store(sum, load(sum) + tile[r][n]);
                });
            });
        }
    }
    if (a.by_column) transpose(as_words(sums), kStride, as_words(turned), ranks, ranks, lanes);
    dispatch(a.factor_dtype, [&](auto w) {
        auto copy = [&](const float* from, int64_t to, int64_t size) {
            auto* factor = static_cast<decltype(w)*>(a.factor) + to;
            for_vectors(size,
                        [&](int64_t i, int n) { put(factor + i, a.scale * load(from + i), n); });
        };
        if (a.by_column) {
            for (int64_t i = 0; i < columns; ++i)
                copy(turned + i * ranks, (first + i) * a.rank, a.rank);
        } else {
            for (int64_t c = 0; c < a.rank; ++c)
                copy(sums + c * kStride, c * a.width + first, columns);
        }
    });
}

}  // namespace

void low_rank_down(const LowRank& args, int64_t first, int64_t last) {
    down(args, first * kRowBlock, std::min(last * kRowBlock, args.rows));
}

void low_rank_up(const LowRank& args, int64_t first, int64_t last) {
    int64_t row_blocks = (args.rows + kRowBlock - 1) / kRowBlock;
    dispatch(args.dtype, [&](auto t) {
        Up<decltype(t)> up(args);
        for (int64_t i = first; i < last; ++i) up.run(i / row_blocks, i % row_blocks);
    });
}

void low_rank_outer(const LowRank& args, int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) outer(args, block);
}

}  // namespace mllama::kernels::MLLAMA_ISA
