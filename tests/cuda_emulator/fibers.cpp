// Threads as fibers, their order, the launch of a grid, and faults.
#include <execinfo.h>
#include <signal.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <numeric>
#include <string>

#include "block.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace emulator {

Options options{};
Fault first_fault{};
int current_thread = 0, threads_of_block = 0;
std::vector<Thread> fibers;
std::vector<Warp> warps;

namespace {

constexpr size_t kStack = 128 * 1024, kPage = 4096;

const std::function<void()>* body = nullptr;
const void* running_kernel = nullptr;
unsigned char* stacks = nullptr;
jmp_buf scheduler;
uint32_t random_state = 1;
uint64_t steps = 0;

uint32_t random_below(uint32_t n) {
  random_state ^= random_state << 13, random_state ^= random_state >> 17, random_state ^= random_state << 5;
  return random_state % n;
}

// 0..n-1 in the sequence's order.
void arrange(std::vector<int64_t>& order, int64_t n, int sequence) {
  order.resize(n);
  std::iota(order.begin(), order.end(), 0);
  if (sequence == kReverse) std::reverse(order.begin(), order.end());
  if (sequence == kRandom) {
    for (int64_t i = n - 1; i > 0; --i) std::swap(order[i], order[random_below(i + 1)]);
  }
}

void record_fault(const char* format, va_list arguments) {
  Fault& fault = first_fault;
  if (fault.kernel) return;
  std::vsnprintf(fault.message, sizeof(fault.message), format, arguments);
  fault.kernel = running_kernel;
  fault.frame_count = backtrace(fault.frames, std::size(fault.frames));
  fault.block = {blockIdx.x, blockIdx.y, blockIdx.z};
  fault.thread = current_thread;
}

// A thread that was started once comes back here for the next block.
void fiber_main() {
  for (;;) {
    (*body)();
    copying_thread_exits();
    hopper_thread_exits();
    thread_exited();
    to_scheduler();
  }
}

// Runs the thread until it stops; false after a fault.
__attribute__((noinline)) bool resume(int index) {
  Thread& thread = fibers[index];
  current_thread = index;
  threadIdx = thread.index;
  const int reason = _setjmp(scheduler);
  if (reason == 0) {
    if (thread.is_started) _longjmp(thread.context, 1);
    thread.is_started = true;
    setcontext(&thread.start);
  }
  return reason == 1;
}

enum class Progress { kNone, kSome, kFault };

// One pass over the lanes of a warp.
Progress run_warp(int warp) {
  static std::vector<int64_t> lanes;
  arrange(lanes, kWarp, options.lanes);
  Progress progress = Progress::kNone;
  for (const int64_t lane : lanes) {
    if (!(warps[warp].live & ~warps[warp].asleep & 1u << lane)) continue;
    const Thread& thread = fibers[warp * kWarp + lane];
    if (thread.condition && !thread.condition(thread.condition_data)) continue;
    if (!resume(warp * kWarp + lane)) return Progress::kFault;
    progress = Progress::kSome;
  }
  return progress;
}

// "threads 0..31 wait at __syncthreads, 32..63 have exited"
void report_deadlock() {
  const auto state = [](int thread) -> std::string {
    if (!is_live(thread)) return "exited";
    std::string text = std::string("wait at ") + fibers[thread].what;
    if (!fibers[thread].payload) return text;
    char mask[24];
    std::snprintf(mask, sizeof(mask), " (mask %08x)", fibers[thread].party.mask);
    return text + mask;
  };
  std::string text;
  for (int first = 0, next; first < threads_of_block && text.size() < 600; first = next) {
    next = first + 1;
    while (next < threads_of_block && state(next) == state(first)) ++next;
    text += (first ? ", " : "") + std::to_string(first) + ".." + std::to_string(next - 1) + " " + state(first);
  }
  if (_setjmp(scheduler) == 0) fault("nobody can go on: threads %s", text.c_str());
}

// False after a fault.
bool run_block() {
  static std::vector<int64_t> order;
  for (;;) {
    arrange(order, warps.size(), options.warps);
    bool any_live = false, any_progress = false;
    for (const int64_t warp : order) {
      Progress progress;
      do {
        progress = warps[warp].live ? run_warp(warp) : Progress::kNone;
        if (progress == Progress::kFault) return false;
        any_progress |= progress == Progress::kSome;
      } while (progress == Progress::kSome && options.warp_by_warp);
      any_live |= warps[warp].live != 0;
    }
    if (!any_live) return true;
    if (!any_progress) {
      report_deadlock();
      return false;
    }
  }
}

void prepare_stacks() {
  void* memory =
      mmap(nullptr, kStack * kMaxThreads, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("cuda_emulator: no memory for the stacks");
    std::abort();
  }
  stacks = static_cast<unsigned char*>(memory);
  fibers.resize(kMaxThreads);
}

void prepare_thread(int i) {
  Thread& thread = fibers[i];
  thread.index = {i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y};
  thread.what = nullptr, thread.condition = nullptr, thread.payload = nullptr;
  warps[warp_of(i)].live |= bit_of(i);
  if (thread.is_started) return;
  mprotect(stacks + i * kStack, kPage, PROT_NONE);
  getcontext(&thread.start);
  thread.start.uc_stack.ss_sp = stacks + i * kStack;
  thread.start.uc_stack.ss_size = kStack;
  thread.start.uc_link = nullptr;
  makecontext(&thread.start, fiber_main, 0);
}

void prepare_block(size_t shared_bytes) {
  warps.assign((threads_of_block + kWarp - 1) / kWarp, {});
  for (int i = 0; i < threads_of_block; ++i) prepare_thread(i);
  new_barriers();
  new_clocks(threads_of_block);
  new_shared_memory(shared_bytes, options.poison);
  forget_copies();
  new_hopper_block();
}

void on_signal(int signal, siginfo_t* info, void*) {
  const auto* address = static_cast<const unsigned char*>(info->si_addr);
  if (signal == SIGFPE) fault("division of an integer by zero");
  if (signal == SIGILL) fault("__trap");
  if (address >= stacks && address < stacks + kStack * kMaxThreads)
    fault("the stack of %zu KiB is full", kStack / 1024);
  fault("access to %p, which is no device memory", info->si_addr);
}

// The machine's signal handlers, on a stack of their own, while it lives.
class Signals {
 public:
  Signals() {
    static unsigned char memory[64 * 1024];
    stack_t stack{};
    stack.ss_sp = memory, stack.ss_size = sizeof(memory);
    sigaltstack(&stack, &stack_before_);
    struct sigaction action{};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &action, &before_[i]);
  }
  ~Signals() {
    for (size_t i = 0; i < kSignals.size(); ++i) sigaction(kSignals[i], &before_[i], nullptr);
    sigaltstack(&stack_before_, nullptr);
  }
  Signals(const Signals&) = delete;

 private:
  static constexpr std::array kSignals{SIGSEGV, SIGBUS, SIGFPE, SIGILL};
  struct sigaction before_[kSignals.size()];
  stack_t stack_before_{};
};

}  // namespace

void count_step() {
  if (++steps > options.most_steps) fault("%llu steps and no end", static_cast<unsigned long long>(steps));
}

__attribute__((noinline)) void to_scheduler() {
  count_step();
  if (_setjmp(fibers[current_thread].context) == 0) _longjmp(scheduler, 1);
}

void fault(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  if (!running_kernel) {
    std::vfprintf(stderr, format, arguments);
    std::abort();
  }
  record_fault(format, arguments);
  va_end(arguments);
  _longjmp(scheduler, 2);
}

void clear_fault() { first_fault = {}; }

void wait_until(const char* what, bool (*condition)(const void*), const void* data) {
  if (condition(data)) return;
  Thread& self = fibers[current_thread];
  self.what = what, self.condition = condition, self.condition_data = data;
  to_scheduler();
  self.condition = nullptr;
}

void yield() { to_scheduler(); }

bool run_grid(const void* kernel, Dimensions grid, Dimensions block, size_t shared_bytes,
              const std::function<void()>& kernel_body) {
  if (first_fault.kernel) return false;
  if (!stacks) prepare_stacks();
  const Signals signals;
  body = &kernel_body, running_kernel = kernel, steps = 0;
  gridDim = dim3(grid.x, grid.y, grid.z), blockDim = dim3(block.x, block.y, block.z);
  threads_of_block = block.x * block.y * block.z;
  random_state = options.seed * 2654435761u | 1;
  static std::vector<int64_t> order;
  arrange(order, int64_t{grid.x} * grid.y * grid.z, options.blocks);
  bool succeeded = true;
  for (const int64_t i : order) {
    blockIdx = {static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                static_cast<unsigned>(i / grid.x / grid.y)};
    prepare_block(shared_bytes);
    succeeded = run_block();
    if (!succeeded) break;
  }
  if (!succeeded) {  // where the fibers stopped nobody will go on
    for (Thread& thread : fibers) thread.is_started = false;
    // Each stack and its guard are a mapping of their own, and a process has 65530: those of some 40 libraries.
    munmap(stacks, kStack * kMaxThreads);
    stacks = nullptr;
  }
  current_thread = 0, running_kernel = nullptr;
  return succeeded;
}

}  // namespace emulator
