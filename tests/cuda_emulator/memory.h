// Emulated device memory: one arena for tensors and shared memory, and for each of its bytes what may be done with it.
//
// Kernels are compiled with the compiler's hooks for thread sanitizers (-fsanitize=thread without its library), which
// call check_read or check_write before every access that isn't provably to a local variable. So bounds, reads of what
// nobody has written, writes to inputs and races are found at the access, to the byte.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace emulator {

// States of a byte. Reading takes kReadable, writing kWritable, which then adds kReadable.
enum : uint8_t { kNothing = 0, kReadable = 1, kWritable = 2, kArriving = 4 };

// `bytes` bytes whose address is `residue` mod 1024, far from all others; null when there are none
// left. Nothing may be done with them yet.
unsigned char* allocate(size_t bytes, size_t residue, const char* name);
void free_all();
uint8_t* states(const void* pointer);  // of the bytes from there on

// An access by the current thread: a fault if the bytes don't allow it or if it races with another thread's.
void check_read(const void* pointer, size_t bytes);
void check_write(const void* pointer, size_t bytes);
void check_atomic(const void* pointer, size_t bytes);  // races only with what isn't atomic

// An asynchronous copy to shared memory. Until it is delivered nobody may touch the bytes.
void copy_issued(void* shared, size_t bytes);
void copy_delivered(void* shared, const void* data, size_t bytes);

// The block's dynamic shared memory. Addresses as PTX counts them, in the shared window.
void new_shared_memory(size_t bytes, uint32_t poison);
unsigned char* shared_memory();
uint32_t shared_address(const void* pointer);
unsigned char* shared_pointer(uint32_t address);
bool is_shared(const void* pointer, size_t bytes);

// Who knows of whose accesses (vector clocks). release: what the thread has done so far is known to whoever acquires
// the clock afterwards. A barrier is a release by all and an acquire by all.
using Clock = std::vector<uint32_t>;
void new_clocks(int threads);
void release(Clock& clock, int thread);
void acquire(const Clock& clock, int thread);

}  // namespace emulator
