// What each instruction set provides. Defined once a set by attention.cpp and elementwise.cpp.
#pragma once

#include "kernels.h"

namespace octavo {

#define OCTAVO_DECLARE_ISA(name)                                                              \
  namespace name {                                                                            \
  void attention_items(const PagedAttention& args, const AttentionItem* items, int64_t count); \
  void rms_norm(const RmsNorm& args);                                                         \
  void rope(const Rope& args);                                                                \
  void silu_and_mul(const SiluAndMul& args);                                                  \
  }

OCTAVO_DECLARE_ISA(baseline)
OCTAVO_DECLARE_ISA(avx2)
OCTAVO_DECLARE_ISA(avx512)

}  // namespace octavo
