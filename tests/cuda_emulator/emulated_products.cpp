// wgmma for emulated_hopper.h.
#include <cstring>
#include <limits>
#include <map>
#include <vector>

#include "block.h"
#include "emulated_hopper.h"
#include "memory.h"

namespace gafext::cuda {

using emulator::ActingAs;
using emulator::current_thread;
using emulator::fault;
using emulator::kWarp;

namespace emulated {

// Address bits 4.. XOR bits 7.., as many as a row of the panel has 16-byte chunks.
uint32_t swizzled(uint32_t address, uint32_t panel_row_bytes) {
  return address ^ ((address >> 7 & (panel_row_bytes / 16 - 1)) << 4);
}

namespace {

float value_of(uint16_t bits, bool is_bfloat16) {
  return is_bfloat16 ? emulated_halves::BFloat16::widen(bits) : emulated_halves::Float16::widen(bits);
}

constexpr int kDepth = 16, kRows = 16;  // of a warp's part of a product

// An operand in shared memory as its descriptor tells it: element (i, k), i along M or N.
struct Operand {
  uint32_t start, leading, stride, row_bytes;
  bool is_k_major;

  Operand(uint64_t descriptor, bool is_k_major) : is_k_major(is_k_major) {
    const auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
    start = field(0), leading = field(16), stride = field(32);
    const int swizzle = static_cast<int>(descriptor >> 62);
    if (swizzle == 0) fault("a descriptor without swizzle, which is not emulated");
    row_bytes = 256 >> swizzle;
    if (descriptor >> 49 & 7) fault("a descriptor's base offset, which is not emulated");
    const uint32_t pattern = 8 * row_bytes;
    if (is_k_major ? start % pattern + 2 * kDepth > row_bytes : start % pattern != 0) {
      fault("a descriptor starts %u bytes into its pattern of %u", start % pattern, pattern);
    }
  }
  uint32_t address(int i, int k) const {
    const uint32_t columns = row_bytes / 2;
    const uint32_t linear = is_k_major
                                ? start + i / 8 * stride + i % 8 * row_bytes + k * 2
                                : start + i / columns * leading + k / 8 * stride + k % 8 * row_bytes + i % columns * 2;
    return swizzled(linear, row_bytes);
  }
  // Elements [0, extent) x [0, kDepth) from `first` on, as floats; each 16 bytes checked once.
  void read(int first, int extent, bool is_bfloat16, float* out) const {
    for (int i = first; i < first + extent; ++i) {
      for (int k = 0; k < kDepth; ++k) {
        const unsigned char* element = emulator::shared_pointer(address(i, k));
        if ((is_k_major ? k : i) % 8 == 0) emulator::check_read(element, 16);
        uint16_t bits;
        std::memcpy(&bits, element, 2);
        out[(i - first) * kDepth + k] = value_of(bits, is_bfloat16);
      }
    }
  }
  void check(int first, int extent) const {
    for (int i = first; i < first + extent; i += is_k_major ? 1 : 8) {
      for (int k = 0; k < kDepth; k += is_k_major ? 8 : 1) {
        emulator::check_read(emulator::shared_pointer(address(i, k)), 16);
      }
    }
  }
};

// Registers as they were at products_begin, and accumulators under way, of one thread.
struct Pinned {
  const unsigned char* begin;
  std::vector<unsigned char> content;
};
struct Accumulator {
  std::vector<float> value;
  int last_group;
};
struct ThreadState {
  std::vector<Pinned> pinned;
  std::map<float*, Accumulator> accumulators;
  std::vector<float*> expected;  // by the wait under way
};
struct Pending {
  Product product;
  uint32_t a_content[kWarp][4];
  const uint32_t* a_registers[kWarp];
  int group;
};
struct WarpState {
  std::vector<Pending> pending;
  int group = 0;
  size_t products = 0;  // so far
};
std::map<int, ThreadState> threads;
std::map<int, WarpState> warps;
std::map<int, std::vector<Product>> sequences;  // of the products of each warpgroup
const float kInFlight = std::numeric_limits<float>::quiet_NaN();

int first_thread_of_warp() { return current_thread / kWarp * kWarp; }

bool is_as_pinned(const ThreadState& thread, const void* registers, size_t bytes) {
  const unsigned char* begin = static_cast<const unsigned char*>(registers);
  for (const Pinned& pinned : thread.pinned) {
    if (begin < pinned.begin || begin + bytes > pinned.begin + pinned.content.size()) continue;
    return std::memcmp(begin, &pinned.content[begin - pinned.begin], bytes) == 0;
  }
  return false;
}

// What one warp does of a wgmma: 16 rows of the 64, by its first lane as far as memory goes.
void run_product(Product* const* lanes) {
  const int first_thread = first_thread_of_warp(), warp = first_thread / kWarp;
  WarpState& state = warps[warp];
  const Product& one = *lanes[0];
  std::vector<Product>& sequence = sequences[warp / 4];
  if (state.products == sequence.size()) sequence.push_back(one);
  const Product& others = sequence[state.products++];
  if (others.a != one.a || others.b != one.b || others.columns != one.columns || others.accumulate != one.accumulate) {
    fault("wgmma: warp %d's product number %zu is not that of its warpgroup", warp, state.products);
  }
  ActingAs first_lane(first_thread);
  float a[kRows * kDepth], b[256 * kDepth];
  Operand(one.b, one.a_registers == nullptr).read(0, one.columns, one.is_bfloat16, b);
  if (one.a_registers == nullptr) Operand(one.a, true).read(warp % 4 * kRows, kRows, one.is_bfloat16, a);

  state.pending.push_back({one, {}, {}, state.group});
  for (int lane = 0; lane < kWarp; ++lane) {
    const Product& product = *lanes[lane];
    if (product.b != one.b || product.a != one.a || product.accumulate != one.accumulate) {
      fault("wgmma: lanes 0 and %d differ in a descriptor or in accumulating", lane);
    }
    if (one.a_registers == nullptr) continue;
    state.pending.back().a_registers[lane] = product.a_registers;
    std::memcpy(state.pending.back().a_content[lane], product.a_registers, 16);
    if (!is_as_pinned(threads[first_thread + lane], product.a_registers, 16)) {
      fault("wgmma: the A registers of lane %d have no products_begin since they changed", lane);
    }
    for (int i = 0; i < 8; ++i) {  // register i / 2, half i % 2
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      a[row * kDepth + column] = value_of(product.a_registers[i / 2] >> i % 2 * 16, one.is_bfloat16);
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const int count = one.columns / 2;
    float* c = lanes[lane]->c;
    ThreadState& thread = threads[first_thread + lane];
    auto found = thread.accumulators.find(c);
    if (found == thread.accumulators.end()) {
      if (!is_as_pinned(thread, c, count * sizeof(float))) {
        fault("wgmma: the accumulators of lane %d have no products_begin since they changed", lane);
      }
      found = thread.accumulators.emplace(c, Accumulator{std::vector<float>(c, c + count), 0}).first;
      std::fill_n(c, count, kInFlight);
    }
    Accumulator& accumulator = found->second;
    accumulator.last_group = state.group;
    for (int i = 0; i < count; ++i) {
      const int row = lane / 4 + i / 2 % 2 * 8, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      float sum = one.accumulate ? accumulator.value[i] : 0.0f;
      for (int k = 0; k < kDepth; ++k) sum += a[row * kDepth + k] * b[column * kDepth + k];
      accumulator.value[i] = sum;
    }
  }
}

// The groups up to the current one less `pending` are over: operands are read for the last time, results appear.
void complete(int pending) {
  const int first_thread = first_thread_of_warp(), warp = first_thread / kWarp;
  WarpState& state = warps[warp];
  const int last = state.group - 1 - pending;
  {
    ActingAs first_lane(first_thread);
    for (const Pending& p : state.pending) {
      if (p.group > last) continue;
      Operand(p.product.b, p.product.a_registers == nullptr).check(0, p.product.columns);
      if (p.product.a_registers == nullptr) Operand(p.product.a, true).check(warp % 4 * kRows, kRows);
      for (int lane = 0; p.product.a_registers && lane < kWarp; ++lane) {
        if (std::memcmp(p.a_content[lane], p.a_registers[lane], 16)) {
          fault("wgmma: an A register of lane %d was written while in use", lane);
        }
      }
    }
  }
  std::erase_if(state.pending, [&](const Pending& p) { return p.group <= last; });
  emulator::Clock clock;
  for (int lane = 0; lane < kWarp; ++lane) emulator::release(clock, first_thread + lane);
  for (int lane = 0; lane < kWarp; ++lane) {
    emulator::acquire(clock, first_thread + lane);
    ThreadState& thread = threads[first_thread + lane];
    for (auto it = thread.accumulators.begin(); it != thread.accumulators.end();) {
      auto& [c, accumulator] = *it;
      if (accumulator.last_group > last) {
        ++it;
        continue;
      }
      for (size_t i = 0; i < accumulator.value.size(); ++i) {
        if (std::memcmp(&c[i], &kInFlight, 4)) fault("wgmma: accumulator %zu of lane %d written while in use", i, lane);
      }
      std::memcpy(c, accumulator.value.data(), accumulator.value.size() * sizeof(float));
      thread.expected.push_back(c);
      it = thread.accumulators.erase(it);
    }
  }
}

}  // namespace

void new_block() { threads.clear(), warps.clear(), sequences.clear(); }
void thread_exits() {
  const ThreadState& thread = threads[current_thread];
  if (!thread.accumulators.empty()) fault("exits with products under way");
  const WarpState& warp = warps[current_thread / kWarp];
  if (warp.products != sequences[current_thread / kWarp / 4].size()) fault("exits before products of its warpgroup");
}

void set_registers(int registers) {
  emulator::meet("setmaxnreg", emulator::whole_warps(4), registers, [](int* const* values) {
    for (int i = 0; i < 4 * kWarp; ++i) {
      if (*values[i] != *values[0]) fault("setmaxnreg: %d and %d in one warpgroup", *values[0], *values[i]);
    }
  });
}

void begin() { threads[current_thread].pinned.clear(); }

// At a products_begin: remembered. At a products_wait: among those whose results have appeared.
void pin(const void* registers, size_t bytes, bool is_after_wait) {
  ThreadState& thread = threads[current_thread];
  const unsigned char* begin = static_cast<const unsigned char*>(registers);
  if (is_after_wait) {
    std::erase_if(thread.expected, [&](float* c) { return static_cast<const void*>(c) == registers; });
  } else {
    thread.pinned.push_back({begin, {begin, begin + bytes}});
  }
}

void product(Product product) {
  emulator::meet("wgmma.mma_async", emulator::whole_warps(1), product,
                 [](Product* const* lanes) { run_product(lanes); });
}

void wait(int pending) {
  emulator::meet("wgmma.wait_group", emulator::whole_warps(1), pending, [](int* const* lanes) { complete(**lanes); });
}
void wait_over() {
  if (!threads[current_thread].expected.empty()) {
    fault("wgmma.wait_group: accumulators became ready that products_wait was not given");
  }
}

}  // namespace emulated

void products_commit() {
  int nothing = 0;
  emulator::meet("wgmma.commit_group", emulator::whole_warps(1), nothing,
                 [](int* const*) { ++emulated::warps[current_thread / kWarp].group; });
}

}  // namespace gafext::cuda
