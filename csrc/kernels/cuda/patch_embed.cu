#include "kernels/cuda/patch_embed.cuh"

#include "kernels/cuda/patch_embed.h"

namespace mllama::cuda {
namespace {

void run(const char* name, void (*of_16_bits)(kernels::Patches, int64_t),
         void (*of_32_bits)(kernels::Patches, int64_t), const kernels::Patches& a, int64_t count,
         Stream stream) {
    launch(name, a.element == 2 ? of_16_bits : of_32_bits,
           blocks_for(count * a.channels * a.size * a.size, kPatchThreads), kPatchThreads, 0,
           stream, a, count);
}

}  // namespace

void cut_patches(const kernels::Patches& a, int64_t count, Stream stream) {
    run("cut_patches", &cut_patches<uint16_t>, &cut_patches<uint32_t>, a, count, stream);
}

void paste_patches(const kernels::Patches& a, int64_t count, Stream stream) {
    run("paste_patches", &paste_patches<uint16_t>, &paste_patches<uint32_t>, a, count, stream);
}

}  // namespace mllama::cuda
