// The instructions of a warp: votes, shuffles, matrix products, matrix loads; and the asynchronous copies of a thread.
#include <cmath>
#include <cstring>
#include <deque>

#include "block.h"
#include "emulated_device.h"

namespace emulator {
namespace {

constexpr size_t kCopyBytes = 16;

struct Copy {
  void* shared;
  const void* global;
  bool inside;
};
// What a thread has under way: groups in the order of their commits, and the copies since the last.
struct Copies {
  std::deque<std::vector<Copy>> groups;
  std::vector<Copy> open;
};
std::vector<Copies> copies;

void check_aligned(const char* what, const void* pointer) {
  if (reinterpret_cast<uintptr_t>(pointer) % kCopyBytes) fault("%s: %p is not a multiple of 16", what, pointer);
}

float element(Format format, uint32_t pair, int half) {
  const uint16_t bits = pair >> 16 * half;
  return format == Format::kFloat16 ? Float16::widen(bits) : BFloat16::widen(bits);
}

struct Product {
  float* c;
  const uint32_t *a, *b;
  Format format;
};

// Fragments to matrices, the product, and back. Register r of A: rows + 8 for odd r, columns + 8 for r >= 2.
void multiply(Product* const* lanes) {
  float a[16][16], b[16][8];
  for (int lane = 0; lane < kWarp; ++lane) {
    const Product& mine = *lanes[lane];
    if (mine.format != lanes[0]->format) fault("mma: lane %d has another format than lane 0", lane);
    const int group = lane / 4, in_group = lane % 4;
    for (int half = 0; half < 2; ++half) {
      const int column = 2 * in_group + half;
      for (int r = 0; r < 4; ++r) a[group + r % 2 * 8][column + r / 2 * 8] = element(mine.format, mine.a[r], half);
      for (int r = 0; r < 2; ++r) b[column + r * 8][group] = element(mine.format, mine.b[r], half);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    for (int r = 0; r < 4; ++r) {
      const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
      double sum = lanes[lane]->c[r];
      for (int k = 0; k < 16; ++k) sum += double(a[row][k]) * b[k][column];
      lanes[lane]->c[r] = static_cast<float>(sum);
    }
  }
}

struct MatrixLoad {
  uint32_t* r;
  const void* row;
  bool transposed;
};

// Lane 8 i + r has the address of row r of matrix i.
void distribute(MatrixLoad* const* lanes) {
  uint16_t matrices[4][8][8];
  for (int lane = 0; lane < kWarp; ++lane) std::memcpy(matrices[lane / 8][lane % 8], lanes[lane]->row, kCopyBytes);
  for (int lane = 0; lane < kWarp; ++lane) {
    const int row = lane / 4, column = lane % 4 * 2;
    for (int i = 0; i < 4; ++i) {
      const auto& m = matrices[i];
      const bool t = lanes[lane]->transposed;
      const uint32_t low = t ? m[column][row] : m[row][column], high = t ? m[column + 1][row] : m[row][column + 1];
      lanes[lane]->r[i] = low | high << 16;
    }
  }
}

}  // namespace

float exp2_approximate(float x) {
  const float result = std::exp2(x);
  return std::fabs(result) < 0x1p-126f ? 0.0f : result;
}

uint4 load_16(const void* global, bool inside) {
  uint4 x{};
  if (!inside) return x;
  check_aligned("load_16", global);
  check_read(global, sizeof(x));
  std::memcpy(&x, global, sizeof(x));
  return x;
}

void store_16(void* global, uint4 x) {
  check_aligned("store_16", global);
  check_write(global, sizeof(x));
  std::memcpy(global, &x, sizeof(x));
}

void mma_16x8x16(float* c, const uint32_t* a, const uint32_t* b, Format format) {
  if (format == Format::kBFloat16 && options.capability < 80) fault("mma_16x8x16: no bfloat16 on Turing");
  Product mine{c, a, b, format};
  meet("mma_16x8x16", whole_warps(1), mine, [](Product* const* lanes) { multiply(lanes); });
}

void load_matrices(uint32_t* r, const void* row, bool transposed) {
  const char* what = transposed ? "load_matrices_transposed" : "load_matrices";
  check_aligned(what, row);
  if (!is_shared(row, kCopyBytes)) fault("%s: a row at %p, which isn't all in shared memory", what, row);
  check_read(row, kCopyBytes);
  MatrixLoad mine{r, row, transposed};
  meet(what, whole_warps(1), mine, [](MatrixLoad* const* lanes) { distribute(lanes); });
}

void forget_copies() { copies.assign(threads_of_block, {}); }

// The PTX ISA does not say that a copy ends before the block's shared memory is another block's.
void copying_thread_exits() {
  size_t left = copies[current_thread].open.size();
  for (const std::vector<Copy>& group : copies[current_thread].groups) left += group.size();
  if (left > 0) fault("exits with %zu asynchronous copies under way", left);
}

void copy_16_async(void* shared, const void* global, bool inside) {
  check_aligned("copy_16_async, to", shared);
  check_aligned("copy_16_async, from", global);
  copy_issued(shared, kCopyBytes);
  copies[current_thread].open.push_back({shared, global, inside});
}

void copies_commit() {
  Copies& mine = copies[current_thread];
  mine.groups.push_back(std::move(mine.open));
  mine.open.clear();
}

// The source is read at the last moment, so that whoever doesn't wait reads what was there before.
void copies_wait(int groups) {
  Copies& mine = copies[current_thread];
  for (; static_cast<int>(mine.groups.size()) > groups; mine.groups.pop_front()) {
    for (const Copy& copy : mine.groups.front()) {
      unsigned char data[kCopyBytes] = {};
      if (copy.inside) {
        check_read(copy.global, kCopyBytes);
        std::memcpy(data, copy.global, kCopyBytes);
      }
      copy_delivered(copy.shared, data, kCopyBytes);
    }
  }
}

uint64_t shuffle(const char* what, Shuffle kind, unsigned mask, uint64_t value, int argument, int width) {
  if (width < 1 || width > kWarp || (width & (width - 1))) fault("%s: a width of %d", what, width);
  const int lane = current_thread % kWarp, first = lane & ~(width - 1), last = first + width - 1;
  int source = lane;  // PTX ISA, shfl.sync: out of the segment means one's own value
  if (kind == Shuffle::kIndex) source = first | (argument & (width - 1));
  if (kind == Shuffle::kUp && lane - argument >= first) source = lane - argument;
  if (kind == Shuffle::kDown && lane + argument <= last) source = lane + argument;
  if (kind == Shuffle::kXor && (lane ^ argument) <= last) source = lane ^ argument;
  struct Mine {
    const char* what;
    uint64_t value, result;
    int source;
  } mine{what, value, 0, source};
  meet(what, lanes_of_warp(mask), mine, [](Mine* const* lanes) {
    for (int i = 0; i < kWarp; ++i) {
      if (!lanes[i]) continue;
      const Mine* from = lanes[lanes[i]->source];
      if (!from) fault("%s: lane %d reads lane %d, which does not take part", lanes[i]->what, i, lanes[i]->source);
      lanes[i]->result = from->value;
    }
  });
  return mine.result;
}

}  // namespace emulator

using emulator::kWarp;

namespace {

struct Vote {
  uint64_t value;
  unsigned result;
};

}  // namespace

unsigned __ballot_sync(unsigned mask, int predicate) {
  Vote mine{predicate != 0, 0};
  emulator::meet("__ballot_sync", emulator::lanes_of_warp(mask), mine, [](Vote* const* lanes) {
    unsigned ballot = 0;
    for (int i = 0; i < kWarp; ++i) ballot |= unsigned{lanes[i] && lanes[i]->value} << i;
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i]) lanes[i]->result = ballot;
    }
  });
  return mine.result;
}

int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }

unsigned __match_any_sync(unsigned mask, uint64_t value) {
  Vote mine{value, 0};
  emulator::meet("__match_any_sync", emulator::lanes_of_warp(mask), mine, [](Vote* const* lanes) {
    for (int i = 0; i < kWarp; ++i) {
      for (int j = 0; lanes[i] && j < kWarp; ++j) {
        lanes[i]->result |= unsigned{lanes[j] && lanes[j]->value == lanes[i]->value} << j;
      }
    }
  });
  return mine.result;
}

void __syncwarp(unsigned mask) {
  int thread = emulator::current_thread;
  emulator::meet("__syncwarp", emulator::lanes_of_warp(mask), thread, [](int* const* lanes) {
    emulator::Clock clock;
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i]) emulator::release(clock, *lanes[i]);
    }
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[i]) emulator::acquire(clock, *lanes[i]);
    }
  });
}
