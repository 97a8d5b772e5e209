// What each instruction set provides. Defined once a set by attention.cpp and elementwise.cpp.
#pragma once

#include "kernels.h"

namespace octavo {

#define OCTAVO_DECLARE_ISA(name)                                                              \
  namespace name {                                                                            \
  void attention_items(const PagedAttention& args, const AttentionItem* items, int64_t count); \
  void rms_norm(const RmsNorm& args);                                                         \
  void layer_norm(const LayerNorm& args);                                                     \
  void rope(const Rope& args);                                                                \
  void activation(const Activation& args);                                                    \
  }

OCTAVO_DECLARE_ISA(baseline)
OCTAVO_DECLARE_ISA(avx2)
OCTAVO_DECLARE_ISA(avx512)

}  // namespace octavo
