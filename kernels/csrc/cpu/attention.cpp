// Paged attention for one instruction set.
//
// The reduction order of a query is a function of its position alone: keys are taken in tiles of
// kTile counted from position 0, a tile's products in a fixed order, tiles one after another with
// a running maximum. So a sequence gets the same bits alone or in a batch, whole or in chunks,
// for any block size and any number of threads.
#include "cpu/dispatch.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

#include <type_traits>

namespace octavo {
namespace OCTAVO_ISA {
namespace {

constexpr int kTile = 32;   // keys a tile; a multiple of kLanes
constexpr int kChunks = 4;  // vectors of the output that stay in registers over a tile
// Below this many products a thread, waking it costs more than it does.
constexpr int64_t kProductsPerThread = 1 << 17;

// Pairwise sums of neighbours: lanes of a first, then lanes of b.
OCTAVO_INLINE Vec fold(Vec a, Vec b) {
  VecInt even{}, odd{};
  for (int i = 0; i < kLanes; ++i) {
    even[i] = 2 * i;
    odd[i] = 2 * i + 1;
  }
  return __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
}

// Lane j: the product of the query with keys[j], over `dim` (padded) elements.
OCTAVO_INLINE Vec products(const float* query, const float* const* keys, int64_t dim) {
  Vec partial[kLanes] = {};
  for (int64_t at = 0; at < dim; at += kLanes) {
    const Vec q = load(query + at);
#pragma GCC unroll 16
    for (int j = 0; j < kLanes; ++j) partial[j] += q * load(keys[j] + at);
  }
#pragma GCC unroll 4
  for (int left = kLanes / 2; left > 0; left /= 2) {
#pragma GCC unroll 8
    for (int j = 0; j < left; ++j) partial[j] = fold(partial[2 * j], partial[2 * j + 1]);
  }
  return partial[0];
}

// One query row's state while it walks over the tiles.
struct Row {
  const float* query;  // [dim], padded with zeros
  float* mixed;        // [dim], weighted values so far
  float maximum;
  Vec weight;          // sums of weights, lane by lane
};

// Keys and values of one tile, as float rows; rows that no query sees are zeros.
struct Tile {
  const float* keys[kTile];
  const float* values[kTile];
};

// The row's query takes in positions first..count of the tile.
OCTAVO_INLINE void attend(Row& row, const Tile& tile, int first, int count, int64_t dim,
                          float scale, float softcap) {
  const Vec lowest = splat(-INFINITY);
  alignas(64) float weights[kTile];
  float maximum = row.maximum;
  const int begin = first / kLanes * kLanes;
  for (int at = begin; at < count; at += kLanes) {
    const VecInt position = lane_numbers() + at;
    Vec score = products(row.query, tile.keys + at, dim) * scale;
    if (softcap > 0) score = tanh(score / softcap) * softcap;
    score = position >= first ? score : lowest;
    score = position < count ? score : lowest;
    store(weights + at, score);
    const float most = max_lanes(score);
    maximum = most > maximum ? most : maximum;
  }
  const float shrink = exp(splat(row.maximum - maximum))[0];
  Vec sum = row.weight * shrink;
  for (int at = begin; at < count; at += kLanes) {
    const Vec weight = exp(load(weights + at) - maximum);  // 0 where the score is the lowest
    store(weights + at, weight);
    sum += weight;
  }
  row.weight = sum;
  row.maximum = maximum;
  int64_t at = 0;
  for (; at + kChunks * kLanes <= dim; at += kChunks * kLanes) {
    Vec mixed[kChunks];
    for (int c = 0; c < kChunks; ++c) mixed[c] = load(row.mixed + at + c * kLanes) * shrink;
    for (int j = first; j < count; ++j) {
      const float* value = tile.values[j] + at;
      for (int c = 0; c < kChunks; ++c) mixed[c] += weights[j] * load(value + c * kLanes);
    }
    for (int c = 0; c < kChunks; ++c) store(row.mixed + at + c * kLanes, mixed[c]);
  }
  for (; at < dim; at += kLanes) {
    Vec mixed = load(row.mixed + at) * shrink;
    for (int j = first; j < count; ++j) mixed += weights[j] * load(tile.values[j] + at);
    store(row.mixed + at, mixed);
  }
}

// Working memory of an item, in floats; `dim` is padded.
OCTAVO_INLINE int64_t item_floats(int64_t rows, int64_t dim) {
  const int64_t row_structs = round_up(sizeof(Row) * rows / sizeof(float) + 16, 16);
  return row_structs + (2 * rows + 2 * kTile + 1) * dim;
}

template <typename T>
class ItemRun {
 public:
  ItemRun(const PagedAttention& args, const AttentionItem& item, float* memory)
      : args_(args),
        item_(item),
        group_(args.heads / args.kv_heads),
        rows_(item.count * group_),
        dim_(round_up(args.dim, kLanes)),
        table_(args.block_tables + item.seq * args.max_blocks) {
    row_ = reinterpret_cast<Row*>(memory);
    memory += round_up(sizeof(Row) * rows_ / sizeof(float) + 16, 16);
    queries_ = memory;
    mixed_ = queries_ + rows_ * dim_;
    keys_ = mixed_ + rows_ * dim_;
    values_ = keys_ + kTile * dim_;
    zeros_ = values_ + kTile * dim_;
    memset(mixed_, 0, sizeof(float) * rows_ * dim_);
    memset(zeros_, 0, sizeof(float) * dim_);
    if (dim_ != args.dim) {  // padding lanes are zero and stay zero
      memset(queries_, 0, sizeof(float) * rows_ * dim_);
      memset(keys_, 0, sizeof(float) * 2 * kTile * dim_);
    }
  }

  void run() {
    start_rows();
    const int64_t first_position = position_of(0), last = first_position + item_.count;
    const int64_t seen_from = window_start(first_position);
    for (int64_t begin = seen_from / kTile * kTile; begin < last; begin += kTile) {
      gather(begin, seen_from > begin ? int(seen_from - begin) : 0,
             begin + kTile < last ? kTile : int(last - begin));
      for (int64_t r = 0; r < rows_; ++r) {
        const int64_t position = first_position + r / group_;
        const int64_t seen = position + 1 - begin, behind = window_start(position) - begin;
        if (seen <= 0 || behind >= kTile) continue;
        attend(row_[r], tile_, behind > 0 ? int(behind) : 0, seen < kTile ? int(seen) : kTile,
               dim_, args_.scale, args_.softcap);
      }
    }
    finish_rows();
  }

 private:
  int64_t first_row() const { return args_.query_start[item_.seq] + item_.first; }

  int64_t position_of(int64_t query) const {
    const int64_t queries = args_.query_start[item_.seq + 1] - args_.query_start[item_.seq];
    return args_.seq_lens[item_.seq] - queries + item_.first + query;
  }

  // The first position that a query at `position` sees.
  int64_t window_start(int64_t position) const {
    return args_.window > 0 && position >= args_.window ? position + 1 - args_.window : 0;
  }

  // Row r is query r / group under head kv_head * group + r % group.
  int64_t head_of(int64_t r) const { return item_.kv_head * group_ + r % group_; }

  void start_rows() {
    const T* query = static_cast<const T*>(args_.query);
    for (int64_t r = 0; r < rows_; ++r) {
      const T* token = query + (first_row() + r / group_) * args_.query_stride;
      widen_row(token + head_of(r) * args_.dim, args_.dim, queries_ + r * dim_);
      row_[r] = Row{queries_ + r * dim_, mixed_ + r * dim_, -INFINITY, Vec{}};
      if (args_.sinks != nullptr) {  // as a first key whose value is zero
        row_[r].maximum = args_.sinks[head_of(r)];
        row_[r].weight[0] = 1.0f;
      }
    }
  }

  void finish_rows() {
    T* out = static_cast<T*>(args_.out);
    for (int64_t r = 0; r < rows_; ++r) {
      T* to = out + ((first_row() + r / group_) * args_.heads + head_of(r)) * args_.dim;
      const float total = sum_lanes(row_[r].weight);
      for (int64_t d = 0; d < args_.dim; ++d) narrow(row_[r].mixed[d] / total, to + d);
    }
  }

  // Points the tile at positions begin + first..begin + count, at zeros elsewhere; copies rows
  // that are not padded floats.
  void gather(int64_t begin, int first, int count) {
    for (int j = 0; j < first; ++j) tile_.keys[j] = tile_.values[j] = zeros_;
    const T* keys = static_cast<const T*>(args_.key_cache);
    const T* values = static_cast<const T*>(args_.value_cache);
    for (int j = first; j < count; ++j) {
      const int64_t position = begin + j;
      const int64_t block = table_[position / args_.block_size];
      const int64_t slot = block * args_.block_size + position % args_.block_size;
      const int64_t at = (slot * args_.kv_heads + item_.kv_head) * args_.dim;
      tile_.keys[j] = float_row(keys + at, keys_ + j * dim_);
      tile_.values[j] = float_row(values + at, values_ + j * dim_);
    }
    for (int j = count; j < kTile; ++j) tile_.keys[j] = tile_.values[j] = zeros_;
  }

  const float* float_row(const float* from, float* copy) const {
    if (dim_ == args_.dim) return from;
    memcpy(copy, from, sizeof(float) * args_.dim);
    return copy;
  }

  template <typename U>
  const float* float_row(const U* from, float* copy) const {
    widen_row(from, args_.dim, copy);
    return copy;
  }

  const PagedAttention& args_;
  const AttentionItem& item_;
  const int64_t group_, rows_, dim_;
  const int32_t* table_;
  Row* row_;
  float *queries_, *mixed_, *keys_, *values_, *zeros_;
  Tile tile_;
};

}  // namespace

void attention_items(const PagedAttention& args, const AttentionItem* items, int64_t count) {
  const int64_t group = args.heads / args.kv_heads;
  int64_t rows = 0, products = 0;
  for (int64_t i = 0; i < count; ++i) {
    rows = items[i].count > rows ? items[i].count : rows;
    const int64_t length = args.seq_lens[items[i].seq];
    const int64_t seen = args.window > 0 && args.window < length ? args.window : length;
    products += items[i].count * group * seen * args.dim;
  }
  const int64_t floats = item_floats(rows * group, round_up(args.dim, kLanes));
  const int64_t paid = products / kProductsPerThread, useful = paid < count ? paid : count;
  const int threads = useful < 2 ? 1 : useful < args.threads ? int(useful) : args.threads;
  int64_t next = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
  {
    float* const memory = scratch(floats);
    for (;;) {
      const int64_t i = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED);
      if (i >= count) break;
      with_type(args.dtype, [&](auto* type) {
        ItemRun<std::remove_pointer_t<decltype(type)>>(args, items[i], memory).run();
      });
    }
  }
}

}  // namespace OCTAVO_ISA
}  // namespace octavo
