// A thread's working memory, kept between calls: no allocation in a steady step.
#pragma once

#include <cstdint>

namespace octavo {

// At least `count` floats, aligned to 64 bytes, valid until this thread's next call. It is a few
// hundred kilobytes; where the host has not even that, the process ends.
float* scratch(int64_t count) noexcept;

}  // namespace octavo
