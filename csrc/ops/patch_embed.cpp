#include "ops/patch_embed.h"

#include "core/rows.h"
#include "core/threads.h"

namespace mllama {
namespace {

struct Cpu {
    static void cut(const kernels::Patches& a, const Tensor&, const Tensor& patches,
                    int64_t count) {
        auto kernel = MLLAMA_CALL(cut_patches);
        parallel_for(count, row_grain(last_size(patches)),
                     [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
    }
    static void paste(const kernels::Patches& a, const Tensor&, const Tensor& patches,
                      int64_t count) {
        auto kernel = MLLAMA_CALL(paste_patches);
        parallel_for(count, row_grain(last_size(patches)),
                     [&](int64_t begin, int64_t end) { kernel(a, begin, end); });
    }
};

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(mllama, m) {
    define(m, kPatchEmbedSchema);
    define(m, kPatchEmbedBackwardSchema);
}

STABLE_TORCH_LIBRARY_IMPL(mllama, CPU, m) {
    implement(m, "patch_embed", TORCH_BOX(&PatchEmbed<Cpu>::forward));
    implement(m, "_patch_embed_backward", TORCH_BOX(&PatchEmbed<Cpu>::backward));
}

}  // namespace mllama
