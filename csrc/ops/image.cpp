#include "ops/image.h"

#include <cstring>
#include <optional>
#include <vector>

#include "core/threads.h"
#include "kernels/cpu/image.h"
#include "ops/resize_taps.h"

namespace mllama {
namespace {

// Taps of one direction in pairs, as the kernels read them.
struct Weights {
    int64_t most;
    std::vector<int64_t> first;
    std::vector<int32_t> count, high, low;

    Weights(int64_t in_size, int64_t out_size, bool cubic) : first(out_size), count(out_size) {
        const ResizeTaps taps(in_size, out_size, cubic);
        most = taps.most / 2 + 1;
        high.assign(out_size * most, 0);
        low.assign(out_size * most, 0);
        for (int64_t i = 0; i < out_size; ++i) {
            const int64_t begin = taps.first[i], end = begin + taps.count[i];
            first[i] = begin / 2;
            count[i] = static_cast<int32_t>((end + 1) / 2 - begin / 2);
            for (int64_t k = begin; k < end; ++k) {
                const int32_t weight = taps.weight[i * taps.most + k - begin];
                const int32_t upper =
                    (weight + (1 << (kernels::kLowBits - 1))) >> kernels::kLowBits;
                const int64_t at = i * most + k / 2 - begin / 2;
                high[at] |= half(upper, k % 2);
                low[at] |= half(weight - upper * (1 << kernels::kLowBits), k % 2);
            }
        }
    }

    kernels::Resize view() const {
        return {most, first.data(), count.data(), high.data(), low.data()};
    }

    // The low 16 bits of x, at the position of an even or an odd input.
    static int32_t half(int32_t x, bool odd) {
        const uint32_t bits = static_cast<uint16_t>(x);
        return static_cast<int32_t>(odd ? bits << 16 : bits);
    }
};

// A resize of an image.
struct Plan {
    Plan(const Tensor& image, int64_t height, int64_t width, bool cubic, bool height_first)
        : in(data<uint8_t>(image)),
          in_height(image.size(0)),
          in_width(image.size(1)),
          height(height),
          width(width),
          height_first(height_first) {
        if (height != in_height) rows.emplace(in_height, height, cubic);
        if (width != in_width) columns.emplace(in_width, width, cubic);
    }

    const uint8_t* in;
    int64_t in_height, in_width, height, width;
    bool height_first;
    std::optional<Weights> rows, columns;  // none where that size stays
};

constexpr int64_t kBand = 32;  // rows of the result at a time, that caches hold their inputs

// Makes bands of a result's rows, in order, with what lies between the two passes in a small
// buffer.
class Bands {
  public:
    Bands(const Plan& plan, int64_t last) : plan_(plan) {
        if (plan.rows) limit_ = input_end(last);
    }

    // Rows [first, last) of the result, in `out` or, where nothing changes, in the image.
    const uint8_t* make(int64_t first, int64_t last, uint8_t* out) {
        const Plan& p = plan_;
        const int64_t in_size = p.in_width * 3;
        if (!p.rows && !p.columns) return p.in + first * in_size;
        if (!p.rows) {
            resize_width(p.in + first * in_size, last - first, out);
        } else if (!p.columns) {
            resize_height(p.in, 0, p.in_width, first, last, out);
        } else if (p.height_first) {
            between_.resize(kBand * in_size);
            resize_height(p.in, 0, p.in_width, first, last, between_.data());
            resize_width(between_.data(), last - first, out);
        } else {
            prepare(first, last);
            resize_height(between_.data(), first_pair_, p.width, first, last, out);
        }
        return out;
    }

  private:
    // The end of the image's rows that results before `last` need.
    int64_t input_end(int64_t last) const {
        const Weights& rows = *plan_.rows;
        return std::min(2 * (rows.first[last - 1] + rows.count[last - 1]), plan_.in_height);
    }

    // Rows of the width's pass that results [first, last) need; those that are there are kept.
    void prepare(int64_t first, int64_t last) {
        const int64_t size = plan_.width * 3, pair = plan_.rows->first[first];
        if (pair > first_pair_) {
            const int64_t dropped = std::min(2 * (pair - first_pair_), end_ - 2 * first_pair_);
            const int64_t kept = end_ - 2 * first_pair_ - dropped;
            if (kept > 0)
                std::memmove(between_.data(), between_.data() + dropped * size, kept * size);
            first_pair_ = pair;
            end_ = 2 * pair + kept;
        }
        if (const int64_t missing = input_end(last) - end_; missing > 0) {
            const int64_t blocks = (missing + kernels::kBlock - 1) / kernels::kBlock;
            const int64_t end = std::min(end_ + blocks * kernels::kBlock, limit_);
            const size_t needed = (end - 2 * first_pair_) * size;
            if (between_.size() < needed) between_.resize(needed);
            resize_width(plan_.in + end_ * plan_.in_width * 3, end - end_,
                         between_.data() + (end_ - 2 * first_pair_) * size);
            end_ = end;
        }
    }

    void resize_width(const uint8_t* in, int64_t rows, uint8_t* out) const {
        MLLAMA_CALL(resize_width)
        (plan_.columns->view(), in, rows, plan_.in_width, out, plan_.width);
    }
    void resize_height(const uint8_t* in, int64_t first_pair, int64_t width, int64_t first,
                       int64_t last, uint8_t* out) const {
        MLLAMA_CALL(resize_height)
        (plan_.rows->view(), in, first_pair, plan_.in_height, width, out, first, last);
    }

    const Plan& plan_;
    std::vector<uint8_t> between_;
    int64_t first_pair_ = 0, end_ = 0;  // the pair and the row that `between_` begins and ends at
    int64_t limit_ = 0;                 // the end of the rows that all bands need
};

// Calls take(first, last, pixels) with the result's rows, band by band, on torch's threads. They
// are made in `out`, the whole result, if it is not null.
template <class Take>
void resize_bands(const Plan& plan, uint8_t* out, Take&& take) {
    // At least about a millisecond of work per thread: less would not pay for waiting for it.
    const int64_t pixels = std::max(plan.in_height * plan.in_width, plan.height * plan.width),
                  bands = (plan.height + kBand - 1) / kBand;
    parallel_for(bands, bands * (1 << 20) / pixels + 1, [&](int64_t begin, int64_t end) {
        const int64_t size = plan.width * 3, last_row = std::min(end * kBand, plan.height);
        Bands made(plan, last_row);
        std::vector<uint8_t> own(out ? 0 : kBand * size);
        for (int64_t y = begin * kBand; y < last_row; y += kBand) {
            const int64_t next = std::min(y + kBand, last_row);
            take(y, next, made.make(y, next, out ? out + y * size : own.data()));
        }
    });
}

Tensor resize(const Tensor& image, int64_t height, int64_t width, bool cubic, bool height_first) {
    check_resize("resize", image, height, width, height_first);
    const Tensor source = dense(image);
    Tensor result = new_empty(image, {height, width, 3});
    uint8_t* out = mutable_data<uint8_t>(result);
    resize_bands(Plan(source, height, width, cubic, height_first), out,
                 [&](int64_t first, int64_t last, const uint8_t* pixels) {
                     uint8_t* to = out + first * width * 3;
                     if (pixels != to) std::memcpy(to, pixels, (last - first) * width * 3);
                 });
    return result;
}

Tensor resize_normalize(const Tensor& image, int64_t height, int64_t width, const Tensor& table,
                        bool cubic, bool height_first) {
    check_resize("resize_normalize", image, height, width, height_first);
    check_table("resize_normalize", table);
    const Tensor source = dense(image), by_channel = dense(torch::stable::transpose(table, 0, 1));
    Tensor planes = new_float(image, {3, height, width});
    const float* values = data<float>(by_channel);
    float* out = mutable_data<float>(planes);
    auto look_up = MLLAMA_CALL(look_up);
    resize_bands(Plan(source, height, width, cubic, height_first), nullptr,
                 [&](int64_t first, int64_t last, const uint8_t* pixels) {
                     look_up(pixels, values, out + first * width, height * width,
                             (last - first) * width);
                 });
    return planes;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    define(m, kResizeSchema);
    define(m, kResizeNormalizeSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "resize", TORCH_BOX(&resize));
    implement(m, "resize_normalize", TORCH_BOX(&resize_normalize));
}

}  // namespace mllama
