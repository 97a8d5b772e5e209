// Norms, activations, the embedding, heads and copies of blocks.
#include "cuda/cache.h"
#include "cuda/elementwise.h"
#include "cuda/heads.h"
#include "cuda/norm.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

namespace py = pybind11;

namespace octavo::cuda {
namespace {

using Address = uintptr_t;

template <typename T = void>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

void bind_rms_norm(int dtype, Address x, Address weight, Address residual, Address out,
                   int64_t tokens, int width, float eps, float offset, Address stream) {
  rms_norm({DType(dtype), pointer(x), pointer(weight), nullptr, pointer(residual), pointer(out),
            tokens, width, eps, offset},
           pointer<CUstream_st>(stream));
}

void bind_layer_norm(int dtype, Address x, Address weight, Address bias, Address residual,
                     Address out, int64_t tokens, int width, float eps, Address stream) {
  layer_norm({DType(dtype), pointer(x), pointer(weight), pointer(bias), pointer(residual),
              pointer(out), tokens, width, eps, 0.0f},
             pointer<CUstream_st>(stream));
}

void bind_activation(int dtype, int function, bool gated, Address x, Address out, int64_t tokens,
                     int width, Address stream) {
  activation({DType(dtype), Function(function), gated, pointer(x), pointer(out), tokens, width},
             pointer<CUstream_st>(stream));
}

void bind_embed(int dtype, Address token_ids, Address table, float scale, Address positions,
                Address position_table, Address out, int64_t tokens, int64_t vocabulary,
                int64_t max_positions, int width, Address stream) {
  embed({DType(dtype), pointer<int64_t>(token_ids), pointer(table), scale,
         pointer<int64_t>(positions), pointer(position_table), pointer(out), tokens, vocabulary,
         max_positions, width},
        pointer<CUstream_st>(stream));
}

// from, from_stride, to, to_stride, weight, heads, rotated, at_slot
using Group = std::tuple<Address, int64_t, Address, int64_t, Address, int, bool, bool>;

void bind_heads(int dtype, const std::vector<Group>& groups, int64_t tokens, int dim, float eps,
                float offset, Address positions, Address cos_sin, int64_t max_positions, int rotary,
                bool interleaved, Address slots, int64_t num_slots, Address stream) {
  if (groups.size() > kMaxHeadGroups) throw std::invalid_argument("heads: too many groups");
  Heads args{DType(dtype), {}, tokens, dim, eps, offset, pointer<int64_t>(positions),
             pointer<float>(cos_sin), max_positions, rotary, interleaved, pointer<int64_t>(slots),
             num_slots};
  for (size_t g = 0; g < groups.size(); ++g) {
    const auto& [from, from_stride, to, to_stride, weight, count, rotated, at_slot] = groups[g];
    args.groups[g] = {pointer(from),   from_stride, pointer(to), to_stride,
                      pointer(weight), count,       rotated,     at_slot};
  }
  heads(args, pointer<CUstream_st>(stream));
}

void bind_copy_blocks(Address cache, int64_t planes, int64_t blocks, int64_t block_bytes,
                      Address pairs, int64_t num_pairs, Address stream) {
  copy_blocks({pointer(cache), planes, blocks, block_bytes, pointer<int64_t>(pairs), num_pairs},
              pointer<CUstream_st>(stream));
}

void bind_swap_blocks(Address cache, int64_t planes, int64_t blocks, int64_t block_bytes,
                      Address pairs, int64_t num_pairs, Address host, int64_t host_blocks, bool out,
                      Address stream) {
  swap_blocks({{pointer(cache), planes, blocks, block_bytes, pointer<int64_t>(pairs), num_pairs},
               pointer(host), host_blocks, out},
              pointer<CUstream_st>(stream));
}

}  // namespace

void bind_elementwise(py::module_& m) {
  const py::kw_only named;
  using py::operator""_a;
  m.def("rms_norm", &bind_rms_norm, named, "dtype"_a, "x"_a, "weight"_a, "residual"_a, "out"_a,
        "tokens"_a, "width"_a, "eps"_a, "offset"_a, "stream"_a);
  m.def("layer_norm", &bind_layer_norm, named, "dtype"_a, "x"_a, "weight"_a, "bias"_a, "residual"_a,
        "out"_a, "tokens"_a, "width"_a, "eps"_a, "stream"_a);
  m.def("activation", &bind_activation, named, "dtype"_a, "function"_a, "gated"_a, "x"_a, "out"_a,
        "tokens"_a, "width"_a, "stream"_a);
  m.def("embed", &bind_embed, named, "dtype"_a, "token_ids"_a, "table"_a, "scale"_a, "positions"_a,
        "position_table"_a, "out"_a, "tokens"_a, "vocabulary"_a, "max_positions"_a, "width"_a,
        "stream"_a);
  m.def("heads", &bind_heads, named, "dtype"_a, "groups"_a, "tokens"_a, "dim"_a, "eps"_a,
        "offset"_a, "positions"_a, "cos_sin"_a, "max_positions"_a, "rotary"_a, "interleaved"_a,
        "slots"_a, "num_slots"_a, "stream"_a);
  m.def("copy_blocks", &bind_copy_blocks, named, "cache"_a, "planes"_a, "blocks"_a, "block_bytes"_a,
        "pairs"_a, "num_pairs"_a, "stream"_a);
  m.def("swap_blocks", &bind_swap_blocks, named, "cache"_a, "planes"_a, "blocks"_a, "block_bytes"_a,
        "pairs"_a, "num_pairs"_a, "host"_a, "host_blocks"_a, "out"_a, "stream"_a);
}

}  // namespace octavo::cuda
