// Loops over the runtime's own threads. It does not tell how many there are, so that those which have worked are counted.
#include <atomic>
#include <exception>
#include <thread>

#include "registration.h"

namespace ptq4vm {
namespace {

constexpr int64_t PARTS_OF_A_THREAD = 4;

int64_t cores() {
  static const int64_t count = std::max<int64_t>(1, std::thread::hardware_concurrency());
  return count;
}

std::atomic<int64_t> helpers{0};  // threads that have run parts of another one's loop
thread_local bool is_helper = false;

struct Loop {
  void (*part)(const void*, int64_t, int64_t);
  const void* data;
  int64_t count, parts;
  std::thread::id caller = std::this_thread::get_id();
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error = nullptr;

  void run(int64_t index) {
    if (!is_helper && std::this_thread::get_id() != caller) is_helper = true, helpers++;
    try {
      part(data, count * index / parts, count * (index + 1) / parts);
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  }
};

}  // namespace

int64_t get_num_threads() { return std::min(cores(), 1 + helpers.load(std::memory_order_relaxed)); }

void run_parallel(int64_t count, int64_t grain, void (*part)(const void*, int64_t, int64_t), const void* data) {
  if (count <= 0) return;
  const int64_t threads = std::min(cores(), 2 * get_num_threads());  // a loop may find as many again
  const int64_t parts = std::min(PARTS_OF_A_THREAD * threads, (count + grain - 1) / grain);
  if (parts == 1) return part(data, 0, count);
  Loop loop{.part = part, .data = data, .count = count, .parts = parts};
  ort::Run::current()->parallel_for(
      parts, [](void* of, size_t index) { static_cast<Loop*>(of)->run(static_cast<int64_t>(index)); }, &loop);
  if (loop.error) std::rethrow_exception(loop.error);
}

}  // namespace ptq4vm
