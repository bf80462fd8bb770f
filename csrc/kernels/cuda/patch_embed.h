// Launchers of what turns images into rows of patches and back; arguments as those of the CPU's
// kernels, for `count` patches.
#pragma once

#include "kernels/cpu/patch_embed.h"
#include "kernels/cuda/stream.h"

namespace mllama::cuda {

void cut_patches(const kernels::Patches& args, int64_t count, Stream stream);
void paste_patches(const kernels::Patches& args, int64_t count, Stream stream);

}  // namespace mllama::cuda
