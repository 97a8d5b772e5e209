#include "cuda/sampling.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

namespace py = pybind11;

namespace octavo::cuda {
namespace {

using Address = uintptr_t;

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);
}

cudaStream_t on(Address stream) { return pointer<CUstream_st>(stream); }

Logits logits_of(int dtype, Address data, int rows, int vocab, int64_t stride, float scale,
                 float softcap) {
  return {pointer<const void>(data), DType(dtype), rows, vocab, stride, scale, softcap};
}

// In the order of the struct; octavo_kernels/sampling.py has the same.
Adjustments adjustments_of(const std::array<Address, 9>& tensors, int64_t marks_stride,
                           int list_stride) {
  Adjustments all{};
  all.marks = pointer<uint16_t>(tensors[0]);
  all.marks_stride = marks_stride;
  all.repetition = pointer<const float>(tensors[1]);
  all.presence = pointer<const float>(tensors[2]);
  all.frequency = pointer<const float>(tensors[3]);
  all.allowed_only = pointer<const int32_t>(tensors[4]);
  all.list_length = pointer<const int32_t>(tensors[5]);
  all.list_ids = pointer<const int32_t>(tensors[6]);
  all.list_bias = pointer<const float>(tensors[7]);
  all.list_until = pointer<const int64_t>(tensors[8]);
  all.list_stride = list_stride;
  return all;
}

void bound_sample(int dtype, Address logits, int rows, int vocab, int64_t stride, float scale,
                  float softcap, Address slots, Address temperature, Address top_k, Address top_p,
                  Address min_p, Address draw_stream, Address count, Address adjusted,
                  const std::array<Address, 9>& adjustments, int64_t marks_stride, int list_stride,
                  Address stop_ids, Address max_tokens, Address flags, Address tokens, Address kept,
                  Address workspace, Address stream) {
  const Sampling sampling{pointer<const int32_t>(slots),
                          pointer<const float>(temperature),
                          pointer<const float>(top_p),
                          pointer<const float>(min_p),
                          pointer<const int32_t>(top_k),
                          pointer<const int64_t>(draw_stream),
                          pointer<const int64_t>(count),
                          pointer<const int32_t>(adjusted),
                          adjustments_of(adjustments, marks_stride, list_stride)};
  const Ends ends{pointer<const int32_t>(stop_ids), pointer<const int64_t>(max_tokens),
                  pointer<uint8_t>(flags)};
  sample(logits_of(dtype, logits, rows, vocab, stride, scale, softcap), sampling, ends,
         pointer<int32_t>(tokens), pointer<int32_t>(kept), pointer<void>(workspace), on(stream));
}

void bound_restart_marks(Address row, int64_t length, Address prompt, int num_prompt, Address drawn,
                         int num_drawn, Address allowed, int num_allowed, Address listed,
                         int num_listed, Address stream) {
  Marks marks{};
  marks.row = pointer<uint16_t>(row);
  marks.length = length;
  marks.prompt = pointer<const int64_t>(prompt);
  marks.drawn = pointer<const int64_t>(drawn);
  marks.allowed = pointer<const int64_t>(allowed);
  marks.listed = pointer<const int32_t>(listed);
  marks.num_prompt = num_prompt;
  marks.num_drawn = num_drawn;
  marks.num_allowed = num_allowed;
  marks.num_listed = num_listed;
  restart_marks(marks, on(stream));
}

void bound_token_logprobs(int dtype, Address logits, int rows, int vocab, int64_t stride,
                          float scale, float softcap, Address tokens, Address wanted,
                          Address logprob, Address rank, Address top_ids, Address top_logprobs,
                          int top, Address stream) {
  token_logprobs(logits_of(dtype, logits, rows, vocab, stride, scale, softcap),
                 pointer<const int32_t>(tokens), pointer<const int32_t>(wanted),
                 {pointer<float>(logprob), pointer<int32_t>(rank), pointer<int32_t>(top_ids),
                  pointer<float>(top_logprobs), top},
                 on(stream));
}

}  // namespace

void bind_sampling(py::module_& m) {
  using py::operator""_a;
  const py::kw_only named;
  m.attr("MAX_VOCAB") = kMaxVocab;
  m.attr("MAX_TOP") = kMaxTop;
  m.def("sample_workspace", &sample_workspace, "rows"_a, "vocab"_a, "Bytes.");
  m.def("sample", &bound_sample, named, "dtype"_a, "logits"_a, "rows"_a, "vocab"_a, "stride"_a,
        "scale"_a, "softcap"_a, "slots"_a, "temperature"_a, "top_k"_a, "top_p"_a, "min_p"_a,
        "draw_stream"_a, "count"_a, "adjusted"_a, "adjustments"_a, "marks_stride"_a,
        "list_stride"_a, "stop_ids"_a, "max_tokens"_a, "flags"_a, "tokens"_a, "kept"_a,
        "workspace"_a, "stream"_a);
  m.def("restart_marks", &bound_restart_marks, named, "row"_a, "length"_a, "prompt"_a,
        "num_prompt"_a, "drawn"_a, "num_drawn"_a, "allowed"_a, "num_allowed"_a, "listed"_a,
        "num_listed"_a, "stream"_a);
  m.def("token_logprobs", &bound_token_logprobs, named, "dtype"_a, "logits"_a, "rows"_a, "vocab"_a,
        "stride"_a, "scale"_a, "softcap"_a, "tokens"_a, "wanted"_a, "logprob"_a, "rank"_a,
        "top_ids"_a, "top_logprobs"_a, "top"_a, "stream"_a);
}

}  // namespace octavo::cuda
