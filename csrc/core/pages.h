// Huge pages for memory that is read from end to end.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "core/tensor.h"

namespace mllama {

// Asks for huge pages of the whole ones in a tensor's memory, best before it is first written. A
// request: kernels without them, and other systems, ignore it.
inline void advise_huge_pages(const Tensor& t) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t kPage = uintptr_t{1} << 21;
    auto start = reinterpret_cast<uintptr_t>(t.const_data_ptr());
    uintptr_t end = (start + t.numel() * t.element_size()) / kPage * kPage;
    start = (start + kPage - 1) / kPage * kPage;
    if (start < end) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
    (void)t;
#endif
}

}  // namespace mllama
