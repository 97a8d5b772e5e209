#include "cuda/upload.h"

#include "cuda/check.h"

#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <chrono>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <utility>

namespace octavo::cuda {
namespace {

// Large enough for full speed over PCIe, small enough that what was read is still in a cache.
constexpr std::int64_t kChunk = 4 << 20;

std::vector<Piece> in_chunks(const std::vector<Piece>& pieces) {
  std::vector<Piece> chunks;
  for (const Piece& piece : pieces) {
    for (std::int64_t at = 0; at < piece.bytes; at += kChunk) {
      const std::int64_t bytes = std::min(kChunk, piece.bytes - at);
      chunks.push_back({piece.file, piece.offset + at, piece.to + at, bytes});
    }
  }
  return chunks;
}

void read_fully(int file, char* to, std::int64_t bytes, std::int64_t offset) {
  while (bytes > 0) {
    const ssize_t count = pread(file, to, static_cast<std::size_t>(bytes), offset);
    if (count < 0 && errno == EINTR) continue;
    if (count < 0) throw std::runtime_error(std::string("read: ") + std::strerror(errno));
    if (count == 0) throw std::runtime_error("read: the file ends early");
    to += count;
    offset += count;
    bytes -= count;
  }
}

}  // namespace

// One thread's pinned memory and stream: one half is filled while the other is on its way.
class Buffers {
 public:
  Buffers() {
    try {
      check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
      for (int half = 0; half < 2; ++half) {
        // Whoever waits leaves the core to others: cores may be few, and torch needs one.
        check(cudaEventCreateWithFlags(&left_[half],
                                       cudaEventDisableTiming | cudaEventBlockingSync),
              "cudaEventCreate");
        check(cudaMallocHost(reinterpret_cast<void**>(&bytes_[half]), kChunk), "cudaMallocHost");
      }
    } catch (...) {
      release();
      throw;
    }
  }

  ~Buffers() { release(); }
  Buffers(const Buffers&) = delete;
  Buffers& operator=(const Buffers&) = delete;

  // Memory to be overwritten, once what was in it has left.
  char* take() {
    turn_ ^= 1;
    check(cudaEventSynchronize(left_[turn_]), "cudaEventSynchronize");
    return bytes_[turn_];
  }

  // Sends what was taken last and filled.
  void send(char* to, std::int64_t bytes) {
    check(cudaMemcpyAsync(to, bytes_[turn_], static_cast<std::size_t>(bytes),
                          cudaMemcpyHostToDevice, stream_),
          "cudaMemcpyAsync");
    check(cudaEventRecord(left_[turn_], stream_), "cudaEventRecord");
  }

  void finish() { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  void release() {
    if (stream_ != nullptr) cudaStreamSynchronize(stream_);
    for (int half = 0; half < 2; ++half) {
      if (bytes_[half] != nullptr) cudaFreeHost(bytes_[half]);
      if (left_[half] != nullptr) cudaEventDestroy(left_[half]);
    }
    if (stream_ != nullptr) cudaStreamDestroy(stream_);
  }

  cudaStream_t stream_ = nullptr;
  cudaEvent_t left_[2] = {};
  char* bytes_[2] = {};
  int turn_ = 0;
};

Upload::Upload(std::vector<std::string> paths, std::vector<Piece> pieces, std::int64_t total,
               int readers)
    : paths_(std::move(paths)), pieces_(in_chunks(pieces)), total_(total) {
  for (const Piece& piece : pieces_) {
    const bool known = piece.file >= 0 && piece.file < static_cast<int>(paths_.size());
    if (!known || piece.offset < 0 || piece.to < 0 || piece.to + piece.bytes > total) {
      throw std::invalid_argument("a piece lies outside of the files or of the memory");
    }
  }
  if (total <= 0 || readers <= 0) throw std::invalid_argument("total and readers are positive");
  leader_ = std::thread(&Upload::run, this, readers);
}

Upload::~Upload() {
  stop_ = true;
  if (leader_.joinable()) leader_.join();
  if (memory_ != nullptr) cudaFree(memory_);  // at the process's end the driver may be gone
}

bool Upload::wait(double seconds) {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait_for(lock, std::chrono::duration<double>(seconds), [this] { return ended_; });
  if (ended_ && !problem_.empty()) throw std::runtime_error(problem_);
  return ended_;
}

void Upload::run(int readers) {
  std::vector<std::thread> others;
  try {
    check(cudaSetDevice(0), "cudaSetDevice");
    check(cudaMalloc(reinterpret_cast<void**>(&memory_), static_cast<std::size_t>(total_)),
          "cudaMalloc");
    for (const std::string& path : paths_) {
      files_.push_back(open(path.c_str(), O_RDONLY | O_CLOEXEC));
      if (files_.back() < 0) throw std::runtime_error("open: " + std::string(strerror(errno)));
    }
    for (int i = 1; i < readers; ++i) others.emplace_back(&Upload::read_pieces, this);
    read_pieces();
  } catch (const std::exception& error) {
    fail(error.what());
  }
  for (std::thread& other : others) other.join();
  for (const int file : files_) {
    if (file >= 0) close(file);
  }
  const std::lock_guard<std::mutex> lock(mutex_);
  ended_ = true;
  changed_.notify_all();
}

void Upload::read_pieces() {
  try {
    check(cudaSetDevice(0), "cudaSetDevice");
    Buffers buffers;
    read_all(buffers);
    buffers.finish();
  } catch (const std::exception& error) {
    fail(error.what());
  }
}

void Upload::read_all(Buffers& buffers) {
  while (!stop_) {
    const std::size_t index = next_.fetch_add(1);
    if (index >= pieces_.size()) return;
    const Piece& piece = pieces_[index];
    char* bytes = buffers.take();
    read_fully(files_[static_cast<std::size_t>(piece.file)], bytes, piece.bytes, piece.offset);
    buffers.send(memory_ + piece.to, piece.bytes);
    done_ += piece.bytes;
  }
}

void Upload::fail(const char* what) {
  stop_ = true;
  const std::lock_guard<std::mutex> lock(mutex_);
  if (problem_.empty()) problem_ = what;
}

}  // namespace octavo::cuda
