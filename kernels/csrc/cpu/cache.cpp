// Moving keys and values about: bytes only, the same for every instruction set.
#include "kernels.h"

#include <cstring>
#include <stdexcept>
#include <string>

namespace octavo {

void write_kv(const WriteKv& args) {
  for (int64_t token = 0; token < args.tokens; ++token) {
    const int64_t slot = args.slots[token];
    if (slot < -1 || slot >= args.num_slots) {
      throw std::invalid_argument("write_kv: slots[" + std::to_string(token) + "] is " +
                                  std::to_string(slot) + "; the cache has " +
                                  std::to_string(args.num_slots) + " slots");
    }
  }
  const char* key = static_cast<const char*>(args.key);
  const char* value = static_cast<const char*>(args.value);
  char* key_cache = static_cast<char*>(args.key_cache);
  char* value_cache = static_cast<char*>(args.value_cache);
  for (int64_t token = 0; token < args.tokens; ++token) {
    if (args.slots[token] < 0) continue;
    const int64_t to = args.slots[token] * args.row_bytes;
    std::memcpy(key_cache + to, key + token * args.key_stride, args.row_bytes);
    std::memcpy(value_cache + to, value + token * args.value_stride, args.row_bytes);
  }
}

void copy_blocks(const CopyBlocks& args) {
  for (int64_t i = 0; i < 2 * args.num_pairs; ++i) {
    if (args.pairs[i] < 0 || args.pairs[i] >= args.blocks) {
      throw std::invalid_argument("copy_blocks: pairs[" + std::to_string(i / 2) + "] names block " +
                                  std::to_string(args.pairs[i]) + "; the cache has " +
                                  std::to_string(args.blocks));
    }
  }
  char* cache = static_cast<char*>(args.cache);
  for (int64_t plane = 0; plane < args.planes; ++plane) {
    char* blocks = cache + plane * args.blocks * args.block_bytes;
    for (int64_t i = 0; i < args.num_pairs; ++i) {
      const int64_t source = args.pairs[2 * i], destination = args.pairs[2 * i + 1];
      if (source == destination) continue;
      std::memcpy(blocks + destination * args.block_bytes, blocks + source * args.block_bytes,
                  args.block_bytes);
    }
  }
}

}  // namespace octavo
