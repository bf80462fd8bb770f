#include "kernels/cpu/patch_embed.h"

#include <cstring>

namespace mllama::kernels::MLLAMA_ISA {
namespace {

// Calls copy(pixels, patch, bytes) for every line of the patches [first, last).
template <class Copy>
void for_lines(const Patches& a, int64_t first, int64_t last, Copy&& copy) {
    int64_t line = a.size * a.element;
    for (int64_t i = first; i < last; ++i) {
        int64_t column = i % a.columns, row = i / a.columns % a.rows,
                batch = i / a.columns / a.rows;
        char* patch = a.patches + i * a.channels * a.size * line;
        for (int64_t channel = 0; channel < a.channels; ++channel) {
            char* pixels = a.pixels + (batch * a.batch_stride + channel * a.channel_stride +
                                       row * a.size * a.line_stride + column * a.size) *
                                          a.element;
            for (int64_t y = 0; y < a.size;
                 ++y, pixels += a.line_stride * a.element, patch += line) {
                copy(pixels, patch, line);
            }
        }
    }
}

}  // namespace

void cut_patches(const Patches& args, int64_t first, int64_t last) {
    for_lines(args, first, last,
              [](const char* pixels, char* patch, int64_t n) { std::memcpy(patch, pixels, n); });
}

void paste_patches(const Patches& args, int64_t first, int64_t last) {
    for_lines(args, first, last,
              [](char* pixels, const char* patch, int64_t n) { std::memcpy(pixels, patch, n); });
}

}  // namespace mllama::kernels::MLLAMA_ISA
