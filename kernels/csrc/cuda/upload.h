// Bytes of files to the GPU by threads that need no interpreter: a start reads its weights while
// Python imports torch, which takes longer and keeps the interpreter's lock for most of it.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace octavo::cuda {

// `bytes` bytes of file number `file`, from `offset` there, go to `to` of the memory.
struct Piece {
  int file;
  std::int64_t offset;
  std::int64_t to;
  std::int64_t bytes;
};

// Begins when it is made, on device 0: first the memory (`total` bytes), then the pieces in their
// order by `readers` threads, each with two pinned buffers and a stream of its own.
class Upload {
 public:
  Upload(std::vector<std::string> paths, std::vector<Piece> pieces, std::int64_t total,
         int readers);
  // Ends what is under way and gives the memory back.
  ~Upload();
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;

  // Bytes that were read and are on the device or on their way.
  std::int64_t done() const { return done_.load(std::memory_order_relaxed); }
  // Whether all of it is on the device; waits so long for it. Throws what went wrong.
  bool wait(double seconds);
  // The memory, once wait() was true.
  std::uintptr_t address() const { return reinterpret_cast<std::uintptr_t>(memory_); }
  std::int64_t size() const { return total_; }

 private:
  void run(int readers);
  void read_pieces();
  void read_all(class Buffers& buffers);
  void fail(const char* what);

  std::vector<std::string> paths_;
  std::vector<Piece> pieces_;
  std::int64_t total_;
  std::vector<int> files_;
  char* memory_ = nullptr;
  std::atomic<std::int64_t> done_{0};
  std::atomic<std::size_t> next_{0};
  std::atomic<bool> stop_{false};
  std::mutex mutex_;
  std::condition_variable changed_;
  bool ended_ = false;
  std::string problem_;
  std::thread leader_;
};

}  // namespace octavo::cuda
