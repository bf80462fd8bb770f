// What a caller can get wrong becomes std::invalid_argument, which arrives in Python as ValueError.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace mllama {

template <class... Parts>
void check_value(bool condition, const Parts&... message) {
    if (condition) return;
    std::ostringstream out;
    (out << ... << message);
    throw std::invalid_argument(out.str());
}

}  // namespace mllama
