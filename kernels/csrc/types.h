// Numbers that the Python side and the compiled modules name alike (native.py).
#pragma once

namespace octavo {

enum class DType : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

enum class Function : int { kSilu = 0, kGelu = 1, kGeluTanh = 2, kRelu = 3 };

}  // namespace octavo
