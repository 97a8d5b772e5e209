// Checks what the arithmetic relies on, then gives it to the best instruction set of this host.
#include "cpu/dispatch.h"
#include "cpu/scratch.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

namespace octavo {
namespace {

struct Isa {
  const char* name;
  void (*attention_items)(const PagedAttention&, const AttentionItem*, int64_t);
  void (*rms_norm)(const RmsNorm&);
  void (*layer_norm)(const LayerNorm&);
  void (*rope)(const Rope&);
  void (*activation)(const Activation&);
};

#define OCTAVO_ISA_TABLE(name)                                                         \
  Isa {                                                                                \
    #name, name::attention_items, name::rms_norm, name::layer_norm, name::rope,        \
        name::activation                                                               \
  }

// What this host can run, best first.
const std::vector<Isa>& hosts_isas() {
  static const std::vector<Isa> found = [] {
    std::vector<Isa> list;
#if defined(__x86_64__)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      list.push_back(OCTAVO_ISA_TABLE(avx512));
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
      list.push_back(OCTAVO_ISA_TABLE(avx2));
    }
#endif
    list.push_back(OCTAVO_ISA_TABLE(baseline));
    return list;
  }();
  return found;
}

const Isa*& chosen() {
  static const Isa* isa = &hosts_isas().front();
  return isa;
}

[[noreturn]] void refuse(const std::string& what) { throw std::invalid_argument(what); }

std::string at(const char* name, int64_t index, int64_t value) {
  return std::string(name) + "[" + std::to_string(index) + "] is " + std::to_string(value);
}

void check_sequence(const PagedAttention& args, int64_t s) {
  const int64_t queries = args.query_start[s + 1] - args.query_start[s];
  const int64_t length = args.seq_lens[s];
  if (queries < 0) refuse("paged_attention: query_start falls at " + std::to_string(s + 1));
  if (length < queries) {
    refuse("paged_attention: " + at("seq_lens", s, length) + ", fewer than its " +
           std::to_string(queries) + " queries");
  }
  if (queries == 0) return;
  const int64_t used = (length + args.block_size - 1) / args.block_size;
  if (used > args.max_blocks) {
    refuse("paged_attention: " + at("seq_lens", s, length) + ", which needs " +
           std::to_string(used) + " blocks; block_tables has " + std::to_string(args.max_blocks));
  }
  // Blocks behind the first query's window may be gone already.
  const int64_t seen_from = args.window > 0 ? length - queries + 1 - args.window : 0;
  for (int64_t b = seen_from > 0 ? seen_from / args.block_size : 0; b < used; ++b) {
    const int64_t block = args.block_tables[s * args.max_blocks + b];
    if (block < 0 || block >= args.blocks) {
      refuse("paged_attention: " + at("block_tables", s, block) + " at " + std::to_string(b) +
             "; the cache has " + std::to_string(args.blocks) + " blocks");
    }
  }
}

void check(const PagedAttention& args) {
  if (args.seqs == 0 ? args.tokens != 0
                     : args.query_start[0] != 0 || args.query_start[args.seqs] != args.tokens) {
    refuse("paged_attention: query_start must run from 0 to the " + std::to_string(args.tokens) +
           " tokens of query");
  }
  for (int64_t s = 0; s < args.seqs; ++s) check_sequence(args, s);
}

// A piece has at most this many query rows (queries times heads that share a key head).
constexpr int64_t kItemRows = 64;

std::vector<AttentionItem> pieces(const PagedAttention& args) {
  const int64_t group = args.heads / args.kv_heads;
  const int64_t most = group < kItemRows ? kItemRows / group : 1;
  std::vector<AttentionItem> items;
  for (int64_t s = 0; s < args.seqs; ++s) {
    const int64_t queries = args.query_start[s + 1] - args.query_start[s];
    // The last queries see the most keys: they go first, so that the threads end together.
    for (int64_t left = queries; left > 0;) {
      const int64_t first = (left - 1) / most * most;
      for (int64_t head = 0; head < args.kv_heads; ++head) {
        items.push_back({int32_t(s), int32_t(head), int32_t(first), int32_t(left - first)});
      }
      left = first;
    }
  }
  return items;
}

}  // namespace

float* scratch(int64_t count) noexcept {
  struct Buffer {
    float* data = nullptr;
    int64_t size = 0;
    ~Buffer() { std::free(data); }
  };
  static thread_local Buffer buffer;
  if (buffer.size < count) {
    std::free(buffer.data);
    const int64_t bytes = (count * int64_t(sizeof(float)) + 63) / 64 * 64;
    buffer.data = static_cast<float*>(std::aligned_alloc(64, size_t(bytes)));
    if (buffer.data == nullptr) std::abort();
    buffer.size = count;
  }
  return buffer.data;
}

void paged_attention(const PagedAttention& args) {
  check(args);
  const std::vector<AttentionItem> items = pieces(args);
  if (!items.empty()) chosen()->attention_items(args, items.data(), int64_t(items.size()));
}

void rms_norm(const RmsNorm& args) { chosen()->rms_norm(args); }

void layer_norm(const LayerNorm& args) { chosen()->layer_norm(args); }

void rope(const Rope& args) {
  for (int64_t t = 0; t < args.tokens; ++t) {
    const int64_t position = args.positions[t];
    if (position < 0 || position >= args.max_positions) {
      refuse("rope: " + at("positions", t, position) + "; cos_sin has " +
             std::to_string(args.max_positions) + " rows");
    }
  }
  chosen()->rope(args);
}

void activation(const Activation& args) { chosen()->activation(args); }

std::vector<std::string> isas() {
  std::vector<std::string> names;
  for (const Isa& isa : hosts_isas()) names.emplace_back(isa.name);
  return names;
}

std::string isa() { return chosen()->name; }

void use_isa(const std::string& name) {
  for (const Isa& isa : hosts_isas()) {
    if (name == isa.name) {
      chosen() = &isa;
      return;
    }
  }
  refuse("use_isa: this host cannot run " + name);
}

}  // namespace octavo
