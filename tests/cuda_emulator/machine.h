// The emulated machine: the threads of a block as fibers, and how they meet. For the headers in include/ and for
// whoever emulates further instructions; the kernels see only those headers.
//
// A block runs on one processor core. A thread runs until it must wait for others; which one runs next is the order's
// choice (Options), so that a result that hangs on the order is seen to differ.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>

#include "memory.h"

namespace emulator {

enum Sequence { kForward, kReverse, kRandom };

struct Options {
  int blocks, warps, lanes;  // Sequence
  int warp_by_warp;          // a warp runs until it can't go on; otherwise from one meeting to the next
  uint32_t seed;
  uint32_t poison;  // what shared memory holds at first, repeated
  int capability;   // 80: the device is one of compute capability 8.0
  int multiprocessors;
  uint64_t most_steps;  // accesses and switches of threads, of a launch
};
extern Options options;

// Ends the launch with an error that names kernel, block, thread and source line.
[[noreturn]] void fault(const char* format, ...) __attribute__((format(printf, 1, 2)));

void count_step();  // too many are a fault: a kernel without end

// Threads are counted through the block, x fastest; 0 outside of a kernel.
extern int current_thread;
extern int threads_of_block;

// What happens while it lives is the work of another thread: a copy delivered for it, say.
class ActingAs {
 public:
  explicit ActingAs(int thread) : before_(current_thread) { current_thread = thread; }
  ~ActingAs() { current_thread = before_; }
  ActingAs(const ActingAs&) = delete;

 private:
  int before_;
};

// Blocks this thread until condition(). `what` names the wait when nobody can go on.
void wait_until(const char* what, bool (*condition)(const void*), const void* data);
template <typename Condition>
void wait_until(const char* what, const Condition& condition) {
  wait_until(what, [](const void* data) { return (*static_cast<const Condition*>(data))(); }, &condition);
}
void yield();  // lets the others run

// Who meets: the lanes in `mask` of each of `warps` warps from first_warp on.
struct Party {
  int first_warp, warps;
  unsigned mask;
  bool aligned;  // an .aligned instruction: no lane may have exited; elsewhere such lanes are left out

  bool operator==(const Party&) const = default;
};
Party lanes_of_warp(unsigned mask);  // of this thread's warp; it must be among them
Party whole_warps(int warps);        // 1: this thread's warp; 4: its warpgroup

// Blocks this thread until all of the party are at `what`. The last one to come runs action(payloads); payloads[i] is
// that of thread i of the party, 32 a warp, and null where there is none.
using Action = void (*)(void* const* payloads);
void meet(const char* what, const Party& party, void* payload, Action action);
template <typename Payload, typename Function>
void meet(const char* what, const Party& party, Payload& payload, Function) {
  meet(what, party, &payload, +[](void* const* payloads) { Function()(reinterpret_cast<Payload* const*>(payloads)); });
}

// Barrier `id` of the block (0..15), for `count` threads, or for all that have not exited when count is 0. The threads'
// earlier accesses are ordered before their later ones. Returns the votes of those who came.
struct Votes {
  int any, all, count;
};
Votes barrier(const char* what, int id = 0, int count = 0, bool vote = false);
void barrier_arrive(const char* what, int id, int count);  // without waiting

// A launch: every block runs body() on `threads` fibers.
struct Dimensions {
  unsigned x, y, z;
};
bool run_grid(const void* kernel, Dimensions grid, Dimensions block, size_t shared_bytes,
              const std::function<void()>& body);

// The first fault; kernel null when there was none. Then no launch runs until clear_fault().
struct Fault {
  char message[1024];
  const void* kernel;
  void* frames[32];  // return addresses, the innermost first
  int frame_count;
  Dimensions block;
  int thread;
};
extern Fault first_fault;
void clear_fault();

}  // namespace emulator
