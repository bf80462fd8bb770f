#include "core/launcher.h"
#include "kernels/cuda/patch_embed.h"
#include "ops/patch_embed.h"

namespace mllama {
namespace {

struct Cuda {
    static void cut(const kernels::Patches& a, const Tensor& pixels, const Tensor& patches,
                    int64_t count) {
        Launcher launcher("patch_embed", pixels);
        launcher.reads("pixel_values", pixels);
        launcher.writes("patches", patches);
        cuda::cut_patches(a, count, launcher.stream());
        launcher.done();
    }
    static void paste(const kernels::Patches& a, const Tensor& pixels, const Tensor& patches,
                      int64_t count) {
        Launcher launcher("_patch_embed_backward", pixels);
        launcher.reads("patches", patches);
        launcher.writes("grad_pixels", pixels);
        cuda::paste_patches(a, count, launcher.stream());
        launcher.done();
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(mllama, MLLAMA_CUDA_KEY, m) {
    implement(m, "patch_embed", TORCH_BOX(&PatchEmbed<Cuda>::forward));
    implement(m, "_patch_embed_backward", TORCH_BOX(&PatchEmbed<Cuda>::backward));
}

}  // namespace mllama
