#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "machine.h"

namespace emulator {
namespace {

constexpr size_t kArena = size_t{1} << 29, kGap = size_t{1} << 20, kAlignment = 1024;
constexpr uint32_t kSharedWindow = 1024;  // the address of shared memory's first byte: 0 is no address

struct Allocation {
  std::string name;
  unsigned char* begin;
  size_t bytes;
};

unsigned char* reserve(size_t bytes) {
  void* memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (memory == MAP_FAILED) {
    std::perror("cuda_emulator: no memory for the arena");
    std::abort();
  }
  return static_cast<unsigned char*>(memory);
}
unsigned char* const arena = reserve(kArena);
uint8_t* const arena_states = reserve(kArena);
size_t used = 0;
std::vector<Allocation> allocations;

unsigned char* shared = nullptr;
size_t shared_bytes = 0;

// The last accesses to a byte of shared memory. An epoch is a thread and its clock at the time; 0: none. Of the readers
// since the last write two are kept, the first and the last of those that don't know of each other.
struct Epoch {
  uint32_t clock = 0;
  uint16_t thread = 0;
  bool atomic = false;
};
struct History {
  Epoch write, read[2];
};
std::vector<History> histories;
std::vector<uint32_t> clocks;  // [thread, thread]
int clock_threads = 0;

bool known(const Epoch& epoch, int thread) {
  return epoch.clock == 0 || epoch.thread == thread || clocks[thread * clock_threads + epoch.thread] >= epoch.clock;
}

// "key + 24", or where else the address lies.
std::string place(const unsigned char* pointer) {
  if (shared && pointer >= shared - kGap / 2 && pointer < shared + shared_bytes + kGap / 2) {
    const ptrdiff_t offset = pointer - shared;
    if (offset < 0) return std::to_string(-offset) + " bytes before shared memory";
    if (offset < static_cast<ptrdiff_t>(shared_bytes)) return "shared memory + " + std::to_string(offset);
    return std::to_string(offset - shared_bytes) + " bytes after the " + std::to_string(shared_bytes) +
           " bytes of shared memory";
  }
  for (const Allocation& a : allocations) {
    const ptrdiff_t offset = pointer - a.begin;
    if (offset < 0 && -offset < static_cast<ptrdiff_t>(kGap) / 2) {
      return std::to_string(-offset) + " bytes before " + a.name;
    }
    if (offset >= 0 && offset < static_cast<ptrdiff_t>(a.bytes)) return a.name + " + " + std::to_string(offset);
    if (offset >= 0 && offset < static_cast<ptrdiff_t>(a.bytes + kGap / 2)) {
      return std::to_string(offset - a.bytes) + " bytes after the end of " + a.name;
    }
  }
  return "far from every tensor";
}

[[noreturn]] void refuse(const char* access, const unsigned char* pointer, size_t bytes, uint8_t needed) {
  const uint8_t* state = states(pointer);
  const unsigned char* first = pointer;  // byte that is refused
  while (*state & needed && !(*state & kArriving) && first + 1 < pointer + bytes) ++state, ++first;
  const char* why = "out of bounds";
  if (*state & kArriving) {
    why = "an asynchronous copy is still under way there";
  } else if (*state == kWritable) {
    why = "nothing has been written there";
  } else if (*state == kReadable) {
    why = "an input is not to be written";
  }
  fault("%s of %zu bytes: %s (%s)", access, bytes, why, place(first).c_str());
}

[[noreturn]] void race(const char* access, const unsigned char* pointer, const char* other, const Epoch& epoch) {
  fault("race: %s of %s, and no barrier since thread %d's %s", access, place(pointer).c_str(), epoch.thread, other);
}

void check_races(const unsigned char* pointer, size_t bytes, bool is_write, bool is_atomic) {
  const int thread = current_thread;
  const char* access = is_atomic ? "atomic access" : is_write ? "write" : "read";
  const Epoch now{clocks[thread * clock_threads + thread], static_cast<uint16_t>(thread), is_atomic};
  for (size_t i = 0; i < bytes; ++i) {
    History& history = histories[pointer - shared + i];
    if (!known(history.write, thread) && !(is_atomic && history.write.atomic)) {
      race(access, pointer + i, "write", history.write);
    }
    if (!is_write) {
      history.read[known(history.read[0], thread) ? 0 : 1] = now;
      continue;
    }
    for (const Epoch& read : history.read) {
      if (!known(read, thread)) race(access, pointer + i, "read", read);
    }
    history = {now, {}};
  }
}

// Whether all bytes have the bit `needed` and no copy under way.
bool allowed(const uint8_t* state, size_t bytes, uint8_t needed) {
  uint8_t all = 0xff, any = 0;
  for (size_t i = 0; i < bytes; ++i) all &= state[i], any |= state[i];
  return all & needed && !(any & kArriving);
}

void access(const void* address, size_t bytes, bool is_write, bool is_atomic) {
  const unsigned char* pointer = static_cast<const unsigned char*>(address);
  const size_t offset = pointer - arena;
  if (offset >= kArena) return;
  count_step();
  uint8_t* state = arena_states + offset;
  const uint8_t needed = is_write ? kWritable : kReadable;
  if (!allowed(state, bytes, needed)) refuse(is_write ? "write" : "read", pointer, bytes, needed);
  if (is_atomic && !allowed(state, bytes, kReadable)) refuse("atomic access", pointer, bytes, kReadable);
  if (is_write) {
    for (size_t i = 0; i < bytes; ++i) state[i] |= kReadable;
  }
  if (static_cast<size_t>(pointer - shared) < shared_bytes) check_races(pointer, bytes, is_write, is_atomic);
}

}  // namespace

unsigned char* allocate(size_t bytes, size_t residue, const char* name) {
  const size_t begin = (used + kGap + kAlignment - 1) / kAlignment * kAlignment + residue;
  if (begin + bytes + kGap > kArena) return nullptr;
  used = begin + bytes;
  allocations.push_back({name, arena + begin, bytes});
  return arena + begin;
}

void free_all() {
  madvise(arena, used, MADV_DONTNEED);
  madvise(arena_states, used, MADV_DONTNEED);
  allocations.clear();
  used = shared_bytes = 0;
  shared = nullptr;
}

uint8_t* states(const void* pointer) { return arena_states + (static_cast<const unsigned char*>(pointer) - arena); }

void check_read(const void* pointer, size_t bytes) { access(pointer, bytes, false, false); }
void check_write(const void* pointer, size_t bytes) { access(pointer, bytes, true, false); }
void check_atomic(const void* pointer, size_t bytes) { access(pointer, bytes, true, true); }

void copy_issued(void* destination, size_t bytes) {
  if (!is_shared(destination, bytes)) {
    fault("asynchronous copy of %zu bytes to %s", bytes, place(static_cast<unsigned char*>(destination)).c_str());
  }
  check_write(destination, bytes);
  std::fill_n(states(destination), bytes, kWritable | kArriving);
}

void copy_delivered(void* destination, const void* data, size_t bytes) {
  std::fill_n(states(destination), bytes, kWritable);
  check_write(destination, bytes);
  std::memcpy(destination, data, bytes);
}

void new_shared_memory(size_t bytes, uint32_t poison) {
  if (!shared || bytes > shared_bytes) shared = allocate(bytes, 0, "shared memory");
  std::fill_n(states(shared), std::max(bytes, shared_bytes), kNothing);
  shared_bytes = bytes;
  std::fill_n(states(shared), bytes, kWritable);
  for (size_t i = 0; i < bytes; ++i) shared[i] = poison >> 8 * (i % 4);
  histories.assign(bytes, {});
}

unsigned char* shared_memory() { return shared; }

bool is_shared(const void* pointer, size_t bytes) {
  const size_t offset = static_cast<const unsigned char*>(pointer) - shared;
  return offset < shared_bytes && bytes <= shared_bytes - offset;
}

uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(pointer) - shared) + kSharedWindow;
}
unsigned char* shared_pointer(uint32_t address) {
  return shared + (static_cast<int32_t>(address) - int32_t{kSharedWindow});
}

void new_clocks(int threads) {
  clock_threads = threads;
  clocks.assign(static_cast<size_t>(threads) * threads, 0);
  for (int i = 0; i < threads; ++i) clocks[i * threads + i] = 1;
}

void release(Clock& clock, int thread) {
  clock.resize(clock_threads);
  uint32_t* mine = &clocks[static_cast<size_t>(thread) * clock_threads];
  for (int i = 0; i < clock_threads; ++i) clock[i] = std::max(clock[i], mine[i]);
  ++mine[thread];
}

void acquire(const Clock& clock, int thread) {
  uint32_t* mine = &clocks[static_cast<size_t>(thread) * clock_threads];
  for (size_t i = 0; i < clock.size(); ++i) mine[i] = std::max(mine[i], clock[i]);
}

}  // namespace emulator

// The compiler's hooks.
extern "C" {

#define GAFEXT_ACCESS(kind, check, bytes)                                       \
  void __tsan_##kind##bytes(void* pointer) {                                    \
    if (reinterpret_cast<uintptr_t>(pointer) % bytes) {                         \
      emulator::fault(#kind " of %d bytes at %p, not aligned", bytes, pointer); \
    }                                                                           \
    emulator::check(pointer, bytes);                                            \
  }                                                                             \
  void __tsan_unaligned_##kind##bytes(void* pointer) { emulator::check(pointer, bytes); }
#define GAFEXT_ACCESSES(bytes)                                                     \
  GAFEXT_ACCESS(read, check_read, bytes)                                           \
  GAFEXT_ACCESS(write, check_write, bytes)                                         \
  void __tsan_volatile_read##bytes(void* pointer) { __tsan_read##bytes(pointer); } \
  void __tsan_volatile_write##bytes(void* pointer) { __tsan_write##bytes(pointer); }
GAFEXT_ACCESSES(1)
GAFEXT_ACCESSES(2)
GAFEXT_ACCESSES(4)
GAFEXT_ACCESSES(8)
GAFEXT_ACCESSES(16)

void* emulated_memcpy(void* destination, const void* source, size_t bytes) {
  emulator::check_read(source, bytes);
  emulator::check_write(destination, bytes);
  return std::memmove(destination, source, bytes);
}
void* emulated_memmove(void* destination, const void* source, size_t bytes) {
  return emulated_memcpy(destination, source, bytes);
}
void* emulated_memset(void* destination, int value, size_t bytes) {
  emulator::check_write(destination, bytes);
  return std::memset(destination, value, bytes);
}
void __tsan_init() {}
void __tsan_read_range(void* pointer, size_t bytes) { emulator::check_read(pointer, bytes); }
void __tsan_write_range(void* pointer, size_t bytes) { emulator::check_write(pointer, bytes); }
void __tsan_vptr_update(void*, void*) {}

// -fsanitize=alignment: a pointer to uint4, say, that isn't a multiple of 16. The first field of its data is 16 bytes
// of source location, then the type and the logarithm of its alignment.
struct MismatchData {
  const char* file;
  uint32_t line, column;
  const void* type;
  unsigned char log_alignment, kind;
};
void __ubsan_handle_type_mismatch_v1(MismatchData* data, void* pointer) {
  emulator::fault("access at %p, which is not a multiple of %d, at line %u", pointer, 1 << data->log_alignment,
                  data->line);
}
}
