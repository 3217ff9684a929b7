// The state of the block that runs, shared by fibers.cpp and meetings.cpp.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <vector>

#include "cuda_runtime.h"
#include "machine.h"

namespace emulator {

constexpr int kWarp = 32, kMaxThreads = 1024;

// A fiber runs the kernel once a block and stops wherever it waits.
struct Thread {
  jmp_buf context;
  ucontext_t start;
  bool is_started = false;
  uint3 index;
  const char* what = nullptr;  // it waits for
  bool (*condition)(const void*) = nullptr;
  const void* condition_data = nullptr;
  Party party{};  // with which it meets, and has a payload
  void* payload = nullptr;
  Action action = nullptr;
  Votes votes{};  // of the barrier that woke it
};
struct Warp {
  unsigned live = 0, asleep = 0;  // lanes; those asleep are woken at a meeting or a barrier
};
extern std::vector<Thread> fibers;
extern std::vector<Warp> warps;

inline int warp_of(int thread) { return thread / kWarp; }
inline unsigned bit_of(int thread) { return 1u << thread % kWarp; }
inline void fall_asleep(int thread) { warps[warp_of(thread)].asleep |= bit_of(thread); }
inline void wake(int thread) { warps[warp_of(thread)].asleep &= ~bit_of(thread); }
inline bool is_live(int thread) { return warps[warp_of(thread)].live & bit_of(thread); }

void to_scheduler();   // the current thread stops here
void thread_exited();  // whoever waited for it need not
void new_barriers();
void forget_copies();  // asynchronous ones, of the block before
void copying_thread_exits();

void new_hopper_block();  // emulated_hopper.cpp
void hopper_thread_exits();

}  // namespace emulator
