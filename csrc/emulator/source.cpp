#include "emulator/source.h"

#include <dlfcn.h>
#include <link.h>

#include <cstdint>
#include <cstdio>
#include <sstream>

namespace mllama::emulator {
namespace {

struct Range {
    uintptr_t begin = 0, end = 0;
};

// All of the module that this function is in.
Range find_module() {
    Range range{reinterpret_cast<uintptr_t>(&find_module), 0};
    dl_iterate_phdr(
        [](dl_phdr_info* info, size_t, void* data) {
            Range& found = *static_cast<Range*>(data);
            Range all{~uintptr_t{0}, 0};
            for (int i = 0; i < info->dlpi_phnum; ++i) {
                const auto& segment = info->dlpi_phdr[i];
                if (segment.p_type != PT_LOAD) continue;
                uintptr_t begin = info->dlpi_addr + segment.p_vaddr;
                all.begin = begin < all.begin ? begin : all.begin;
                all.end = begin + segment.p_memsz > all.end ? begin + segment.p_memsz : all.end;
            }
            bool is_ours = all.begin <= found.begin && found.begin < all.end;
            if (is_ours) found = all;
            return is_ours ? 1 : 0;
        },
        &range);
    return range;
}

}  // namespace

bool in_this_module(const void* address) {
    static const Range module = find_module();
    auto at = reinterpret_cast<uintptr_t>(address);
    return module.begin <= at && at < module.end;
}

std::string source_of(void* caller) {
    Dl_info info;
    if (!caller || !dladdr(caller, &info)) return "";
    std::ostringstream place;
    place << std::hex << "0x"
          << reinterpret_cast<uintptr_t>(caller) - reinterpret_cast<uintptr_t>(info.dli_fbase) - 1;
    std::string file = info.dli_fname, found;
    FILE* lines = popen(("addr2line -i -e '" + file + "' " + place.str() + " 2>&-").c_str(), "r");
    char line[512];
    while (lines && std::fgets(line, sizeof line, lines)) {
        std::string text = line;
        if (text.find("??") == 0) break;
        text = text.substr(0, text.find_first_of(" \n"));
        found += (found.empty() ? " at " : ", called at ") + text;
    }
    if (lines) pclose(lines);
    return found.empty() ? " at " + file + "+" + place.str() : found;
}

}  // namespace mllama::emulator
