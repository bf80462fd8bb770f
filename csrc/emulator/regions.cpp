#include "emulator/regions.h"

#include <algorithm>

namespace mllama::emulator {

void Regions::add(const void* begin, size_t bytes, Use use, bool shared, const char* name) {
    auto first = reinterpret_cast<uintptr_t>(begin);
    if (bytes == 0) return;
    all_.push_back(
        std::make_unique<Region>(Region{first, first + bytes, use, shared, name, {}, 0}));
}

void Regions::forget_shared() {
    last_ = nullptr;
    std::erase_if(all_, [](const auto& region) { return region->shared; });
}

void Regions::forget_all() {
    last_ = nullptr;
    all_.clear();
}

void Regions::touch(Region& region) {
    if (region.cells.empty()) region.cells.resize(region.size());
    if (region.launch == launch_) return;
    region.launch = launch_;
    for (Cell& cell : region.cells) {
        bool written = cell.written;
        cell = {};
        cell.written = written;
    }
}

Region* Regions::find(uintptr_t at, size_t bytes) {
    if (last_ && last_->holds(at) && at + bytes <= last_->end) return last_;
    Region* found = nullptr;
    for (size_t i = 0; i < all_.size(); ++i) {
        Region* region = all_[i].get();
        if (!region->holds(at)) continue;
        if (!found) found = region;
        if (at + bytes > region->end) continue;
        // To the front: of the many tensors of a model, a kernel uses few.
        std::rotate(all_.begin(), all_.begin() + i, all_.begin() + i + 1);
        return last_ = region;
    }
    return found;
}

const Region* Regions::nearest(uintptr_t at) const {
    auto distance = [at](const auto& r) { return at < r->begin ? r->begin - at : at - r->end; };
    auto nearest = std::min_element(all_.begin(), all_.end(), [&](const auto& a, const auto& b) {
        return distance(a) < distance(b);
    });
    return nearest == all_.end() ? nullptr : nearest->get();
}

std::string Regions::unwritten() const {
    for (const auto& region : all_) {
        if (region->use != Use::write) continue;
        auto written = std::count_if(region->cells.begin(), region->cells.end(),
                                     [](const Cell& cell) { return cell.written; });
        if (size_t missing = region->size() - written)
            return std::to_string(missing) + " bytes of " + region->name;
    }
    return "";
}

}  // namespace mllama::emulator
