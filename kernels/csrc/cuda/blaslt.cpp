#include "cuda/blaslt.h"

#include "cuda/check.h"

#include <dlfcn.h>
#include <library_types.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <stdexcept>
#include <string>

namespace octavo::cuda {
namespace {

// The part of cuBLASLt's binary interface that is used here (its reference manual, 13.0). It has
// not changed since 11.0; declared here because the library's headers come only with a full
// toolkit.
constexpr const char* kLibrary = "libcublasLt.so.13";
constexpr int kSuccess = 0, kNotSupported = 15, kInvalidValue = 7;
constexpr int kCompute32F = 68;
constexpr int32_t kTransposed = 1;
constexpr uint32_t kEpilogueBias = 4;
enum DescAttribute : int { kTransA = 3, kEpilogue = 7, kBiasPointer = 8 };
enum PreferenceAttribute : int {
  kMaxWorkspaceBytes = 1,
  kReductionSchemeMask = 3,
  kMinAlignmentA = 5,
  kMinAlignmentB = 6,
  kMinAlignmentC = 7,
  kMinAlignmentD = 8,
};

struct HeuristicResult {
  LtAlgorithm algorithm;
  size_t workspace;
  int state;
  float waves;
  int reserved[4];
};
static_assert(sizeof(HeuristicResult) == 64 + 8 + 4 + 4 + 16, "the library writes these");

using Opaque = void*;

struct Library {
  size_t (*version)();
  int (*create)(Opaque* handle);
  int (*desc_create)(Opaque*, int compute_type, int scale_type);
  int (*desc_destroy)(Opaque);
  int (*desc_set)(Opaque, int attribute, const void*, size_t);
  int (*layout_create)(Opaque*, int type, uint64_t rows, uint64_t columns, int64_t ld);
  int (*layout_destroy)(Opaque);
  int (*preference_create)(Opaque*);
  int (*preference_destroy)(Opaque);
  int (*preference_set)(Opaque, int attribute, const void*, size_t);
  int (*heuristic)(Opaque handle, Opaque desc, Opaque a, Opaque b, Opaque c, Opaque d,
                   Opaque preference, int count, HeuristicResult*, int* found);
  int (*matmul)(Opaque handle, Opaque desc, const void* alpha, const void* a, Opaque a_layout,
                const void* b, Opaque b_layout, const void* beta, const void* c, Opaque c_layout,
                void* d, Opaque d_layout, const LtAlgorithm*, void* workspace, size_t bytes,
                cudaStream_t);
};

template <typename Function>
void find(void* library, const char* name, Function& to) {
  to = reinterpret_cast<Function>(dlsym(library, name));
  if (!to) throw std::runtime_error(std::string(kLibrary) + " has no " + name);
}

Library load() {
  void* found = dlopen(kLibrary, RTLD_NOW | RTLD_NOLOAD);
  if (!found) found = dlopen(kLibrary, RTLD_NOW);
  if (!found) {
    throw std::runtime_error(std::string(kLibrary) + " is neither loaded nor found (" + dlerror() +
                             "): install the torch that CUDA 13 comes with");
  }
  Library library{};
  find(found, "cublasLtGetVersion", library.version);
  find(found, "cublasLtCreate", library.create);
  find(found, "cublasLtMatmulDescCreate", library.desc_create);
  find(found, "cublasLtMatmulDescDestroy", library.desc_destroy);
  find(found, "cublasLtMatmulDescSetAttribute", library.desc_set);
  find(found, "cublasLtMatrixLayoutCreate", library.layout_create);
  find(found, "cublasLtMatrixLayoutDestroy", library.layout_destroy);
  find(found, "cublasLtMatmulPreferenceCreate", library.preference_create);
  find(found, "cublasLtMatmulPreferenceDestroy", library.preference_destroy);
  find(found, "cublasLtMatmulPreferenceSetAttribute", library.preference_set);
  find(found, "cublasLtMatmulAlgoGetHeuristic", library.heuristic);
  find(found, "cublasLtMatmul", library.matmul);
  return library;
}

const Library& library() {
  static const Library loaded = load();
  return loaded;
}

void require(int status, const char* what) {
  if (status == kSuccess) return;
  throw std::runtime_error(std::string(what) + ": cuBLASLt status " + std::to_string(status));
}

// For the life of the process, as is the device's context.
Opaque handle() {
  static const Opaque made = [] {
    Opaque handle = nullptr;
    require(library().create(&handle), "cublasLtCreate");
    return handle;
  }();
  return made;
}

using Owned = std::unique_ptr<void, int (*)(Opaque)>;

Owned layout(int type, int64_t rows, int64_t columns, int64_t ld) {
  Opaque made = nullptr;
  require(library().layout_create(&made, type, rows, columns, ld), "cublasLtMatrixLayoutCreate");
  return {made, library().layout_destroy};
}

// The library's matrices are column-major: what is x to us is its transpose to it, so it is asked
// for out^T[n, rows] = (w^T)^T[n, k] · x^T[k, rows].
struct Problem {
  Owned desc, a, b, d;

  explicit Problem(const LtProduct& product)
      : desc(nullptr, library().desc_destroy),
        a(layout(type(product), product.k, product.n, product.k)),
        b(layout(type(product), product.k, product.rows, product.x_stride)),
        d(layout(type(product), product.n, product.rows, product.n)) {
    Opaque made = nullptr;
    require(library().desc_create(&made, kCompute32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    desc.reset(made);
    set(kTransA, kTransposed);
    if (product.bias) {
      set(kEpilogue, kEpilogueBias);
      set(kBiasPointer, product.bias);
    }
  }

  static int type(const LtProduct& product) {
    return product.dtype == DType::kBFloat16 ? CUDA_R_16BF : CUDA_R_16F;
  }

 private:
  template <typename Value>
  void set(DescAttribute attribute, const Value& value) {
    require(library().desc_set(desc.get(), attribute, &value, sizeof value),
            "cublasLtMatmulDescSetAttribute");
  }
};

bool run(const LtProduct& product, const Problem& problem, const LtAlgorithm& algorithm,
         LtWorkspace workspace, cudaStream_t stream) {
  const float one = 1, of_before = product.add ? 1 : 0;
  const int status = library().matmul(
      handle(), problem.desc.get(), &one, product.w, problem.a.get(), product.x, problem.b.get(),
      &of_before, product.out, problem.d.get(), product.out, problem.d.get(), &algorithm,
      workspace.data, workspace.bytes, stream);
  if (status == kNotSupported || status == kInvalidValue) return false;
  require(status, "cublasLtMatmul");
  return true;
}

struct Event {
  cudaEvent_t event = nullptr;
  Event() { check(cudaEventCreate(&event), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event); }
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
};

// Clears of the workspace that run while the first launches to be timed are queued: small products
// take less time than a launch does, and a device that waits for the host would be timed.
constexpr int kSpacers = 24;

}  // namespace

int64_t lt_version() { return int64_t(library().version()); }

std::vector<LtAlgorithm> lt_candidates(const LtProduct& product, int64_t workspace, int count,
                                       bool split) {
  const Problem problem(product);
  Opaque made = nullptr;
  require(library().preference_create(&made), "cublasLtMatmulPreferenceCreate");
  const Owned preference(made, library().preference_destroy);
  const auto set = [&](PreferenceAttribute attribute, auto value) {
    require(library().preference_set(made, attribute, &value, sizeof value),
            "cublasLtMatmulPreferenceSetAttribute");
  };
  set(kMaxWorkspaceBytes, uint64_t(workspace));
  if (!split) set(kReductionSchemeMask, uint32_t(0));
  for (auto which : {kMinAlignmentA, kMinAlignmentB, kMinAlignmentC, kMinAlignmentD}) {
    set(which, uint32_t(kLtAlignment));
  }
  std::vector<HeuristicResult> results(count);
  int found = 0;
  const int status = library().heuristic(handle(), problem.desc.get(), problem.a.get(),
                                         problem.b.get(), problem.d.get(), problem.d.get(), made,
                                         count, results.data(), &found);
  if (status == kNotSupported) return {};
  require(status, "cublasLtMatmulAlgoGetHeuristic");
  std::vector<LtAlgorithm> algorithms;
  for (int i = 0; i < found; ++i) {
    if (results[i].state == kSuccess) algorithms.push_back(results[i].algorithm);
  }
  return algorithms;
}

bool lt_product(const LtProduct& product, const LtAlgorithm& algorithm, LtWorkspace workspace,
                cudaStream_t stream) {
  return run(product, Problem(product), algorithm, workspace, stream);
}

std::vector<double> lt_rank(LtProduct product, const std::vector<uint64_t>& weights,
                            const std::vector<LtAlgorithm>& algorithms, LtWorkspace workspace,
                            cudaStream_t stream) {
  const Problem problem(product);
  const auto multiply = [&](uint64_t weight, const LtAlgorithm& algorithm) {
    product.w = reinterpret_cast<const void*>(weight);
    return run(product, problem, algorithm, workspace, stream);
  };
  std::vector<double> seconds(algorithms.size(), std::numeric_limits<double>::infinity());
  std::vector<bool> serves;
  for (const auto& algorithm : algorithms) serves.push_back(multiply(weights[0], algorithm));
  for (int i = 0; i < kSpacers; ++i) {
    check(cudaMemsetAsync(workspace.data, 0, workspace.bytes, stream), "cudaMemsetAsync");
  }
  const size_t count = algorithms.size();
  std::vector<Event> marks(2 * (count + 1));
  for (size_t turn = 0; turn < 2; ++turn) {
    const Event* const of_turn = &marks[turn * (count + 1)];
    check(cudaEventRecord(of_turn[0].event, stream), "cudaEventRecord");
    for (size_t i = 0; i < count; ++i) {
      for (const uint64_t weight : weights) {
        if (serves[i]) multiply(weight, algorithms[i]);
      }
      check(cudaEventRecord(of_turn[i + 1].event, stream), "cudaEventRecord");
    }
  }
  check(cudaEventSynchronize(marks.back().event), "cudaEventSynchronize");
  for (size_t i = 0; i < marks.size() - 1; ++i) {
    const size_t which = i % (count + 1);
    if (which == count || !serves[which]) continue;  // between the turns; not run
    float ms = 0;
    check(cudaEventElapsedTime(&ms, marks[i].event, marks[i + 1].event), "cudaEventElapsedTime");
    seconds[which] = std::min(seconds[which], ms / 1e3 / double(weights.size()));
  }
  return seconds;
}

}  // namespace octavo::cuda
