#include "cuda/prefill_attention.h"

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

// A step's prefill: planned once, attended to by every layer. The buffers are the caller's. Made for
// any batch, it is planned anew for each, on which no layer's launch depends.
class PrefillStep {
 public:
  PrefillStep(int32_t tokens, int32_t seqs, int32_t num_decodes, int32_t max_query_len,
              int32_t heads, int32_t kv_heads, int32_t dim, int32_t min_span, bool warpgroups,
              bool any_batch)
      : batch_{nullptr, nullptr, num_decodes, seqs, tokens, heads, kv_heads, dim},
        options_{min_span, warpgroups, any_batch},
        sizes_(prefill_sizes(batch_, max_query_len, options_)) {}

  const PrefillSizes& sizes() const { return sizes_; }
  int64_t list_words() const { return prefill_list_words(sizes_); }
  int64_t partial_floats() const { return prefill_partial_floats(sizes_, batch_); }

  void plan(Address query_start, Address seq_lens, int32_t seqs, int32_t num_decodes,
            Address lists, Address partials, Address stream) {
    batch_.query_start = pointer<const int32_t>(query_start);
    batch_.seq_lens = pointer<const int32_t>(seq_lens);
    batch_.seqs = seqs;
    batch_.num_decodes = num_decodes;
    plan_ = prefill_plan(sizes_, batch_, pointer<int32_t>(lists), pointer<float>(partials));
    plan_prefill(batch_, plan_, options_, on(stream));
  }

  void attend(int dtype, Address query, int64_t query_stride, Address key_cache,
              Address value_cache, Address block_tables, int64_t max_blocks, int64_t block_size,
              Address out, float scale, int32_t window, float softcap, Address sinks,
              Address stream) const {
    PrefillAttention args{};
    args.dtype = DType(dtype);
    args.query = pointer<const void>(query);
    args.query_stride = query_stride;
    args.key_cache = pointer<const void>(key_cache);
    args.value_cache = pointer<const void>(value_cache);
    args.block_tables = pointer<const int32_t>(block_tables);
    args.max_blocks = max_blocks;
    args.block_size = block_size;
    args.out = pointer<void>(out);
    args.scale = scale;
    args.window = window;
    args.softcap = softcap;
    args.sinks = pointer<const float>(sinks);
    prefill_attention(args, batch_, plan_, on(stream));
  }

 private:
  PrefillBatch batch_;
  PrefillOptions options_;
  PrefillSizes sizes_;
  PrefillPlan plan_{};
};

}  // namespace

void bind_prefill(py::module_& m) {
  const py::kw_only named;
  using py::operator""_a;
  py::class_<PrefillStep>(m, "PrefillStep")
      .def(py::init<int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, int32_t, bool,
                    bool>(),
           named, "tokens"_a, "seqs"_a, "num_decodes"_a, "max_query_len"_a, "heads"_a,
           "kv_heads"_a, "dim"_a, "min_span"_a, "warpgroups"_a, "any_batch"_a)
      .def_property_readonly("list_words", &PrefillStep::list_words)
      .def_property_readonly("partial_floats", &PrefillStep::partial_floats)
      .def_property_readonly("splits",
                             [](const PrefillStep& step) { return step.sizes().max_splits > 0; })
      .def_property_readonly("warpgroups",
                             [](const PrefillStep& step) { return step.sizes().warpgroups; })
      .def("plan", &PrefillStep::plan, named, "query_start"_a, "seq_lens"_a, "seqs"_a,
           "num_decodes"_a, "lists"_a, "partials"_a, "stream"_a)
      .def("attend", &PrefillStep::attend, named, "dtype"_a, "query"_a, "query_stride"_a,
           "key_cache"_a, "value_cache"_a, "block_tables"_a, "max_blocks"_a, "block_size"_a,
           "out"_a, "scale"_a, "window"_a, "softcap"_a, "sinks"_a, "stream"_a);
  m.def("prefill_serves", &prefill_serves, "dim"_a, "block_size"_a,
        "Whether there is a kernel for these sizes.");
}

}  // namespace octavo::cuda
