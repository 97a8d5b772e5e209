#include "cuda/decode_attention.h"

#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace octavo::cuda {
namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t on(Address stream) { return pointer<CUstream_st>(stream); }

// The buffers of a plan and of the layers that run over it; the caller holds them.
struct DecodeWork {
  DecodePlan plan{};
  DecodeWorkspace workspace{};

  DecodeWork(int32_t list_size, int32_t chunk, int32_t max_chunks, int32_t num_windows,
             Address windows, Address chunks, Address counts, Address ticket, Address arrivals,
             Address values, Address sums) {
    plan.windows = pointer<const int32_t>(windows);
    plan.num_windows = num_windows;
    plan.chunks = pointer<DecodeChunk>(chunks);
    plan.counts = pointer<int32_t>(counts);
    plan.list_size = list_size;
    plan.chunking = {chunk, max_chunks};
    workspace.ticket = pointer<int32_t>(ticket);
    workspace.arrivals = pointer<int32_t>(arrivals);
    workspace.values = pointer<float>(values);
    workspace.sums = pointer<float>(sums);
  }
};

void attend(const DecodeWork& work, int dtype, Address query, int64_t query_stride,
            Address key_cache, Address value_cache, Address block_tables, int64_t max_blocks,
            int64_t block_size, Address out, int64_t heads, int64_t kv_heads, int64_t dim,
            float scale, float softcap, Address sinks, int32_t window, int32_t stages,
            int32_t blocks_per_sm, Address stream) {
  DecodeAttention args{};
  args.dtype = DType(dtype);
  args.query = pointer<const void>(query);
  args.query_stride = query_stride;
  args.key_cache = pointer<const void>(key_cache);
  args.value_cache = pointer<const void>(value_cache);
  args.block_tables = pointer<const int32_t>(block_tables);
  args.max_blocks = max_blocks;
  args.block_size = block_size;
  args.out = pointer<void>(out);
  args.heads = heads;
  args.kv_heads = kv_heads;
  args.dim = dim;
  args.scale = scale;
  args.softcap = softcap;
  args.sinks = pointer<const float>(sinks);
  args.window = window;
  args.stages = stages;
  args.blocks_per_sm = blocks_per_sm;
  decode_attention(args, work.plan, work.workspace, on(stream));
}

}  // namespace

void bind_decode(py::module_& m) {
  const py::kw_only named;
  using py::operator""_a;
  py::class_<DecodeWork>(m, "DecodeWork")
      .def(py::init<int32_t, int32_t, int32_t, int32_t, Address, Address, Address, Address,
                    Address, Address, Address>(),
           named, "list_size"_a, "chunk"_a, "max_chunks"_a, "num_windows"_a, "windows"_a,
           "chunks"_a, "counts"_a, "ticket"_a, "arrivals"_a, "values"_a, "sums"_a)
      .def("plan",
           [](const DecodeWork& work, Address seq_lens, int32_t num_decodes, Address stream) {
             plan_decode(work.plan, pointer<const int32_t>(seq_lens), num_decodes, on(stream));
           },
           named, "seq_lens"_a, "num_decodes"_a, "stream"_a)
      .def("attend", &attend, named, "dtype"_a, "query"_a, "query_stride"_a, "key_cache"_a,
           "value_cache"_a, "block_tables"_a, "max_blocks"_a, "block_size"_a, "out"_a, "heads"_a,
           "kv_heads"_a, "dim"_a, "scale"_a, "softcap"_a, "sinks"_a, "window"_a, "stages"_a,
           "blocks_per_sm"_a, "stream"_a);
  m.def("decode_serves", &decode_serves, "dim"_a, "block_size"_a,
        "Whether there is a kernel for these sizes.");
}

}  // namespace octavo::cuda
