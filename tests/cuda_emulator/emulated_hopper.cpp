#include "emulated_hopper.h"

#include <cstring>
#include <vector>

#include "block.h"
#include "memory.h"

namespace gafext::cuda {
namespace {

using emulator::ActingAs;
using emulator::current_thread;
using emulator::fault;
using emulator::kWarp;

constexpr uint64_t kMostBytes = (1 << 20) - 1;  // that a barrier counts

// What the machine keeps beside shared memory; the words there hold the numbers of their barriers. Per block.
struct BarrierState {
  int count, pending;
  int64_t bytes = 0;
  uint32_t phase = 0;
  bool is_visible = false;
  int initialiser;
  emulator::Clock clock, clock_of_phase[2];
};
struct Copy {
  unsigned char* shared;
  TensorMap map;
  size_t barrier;
  int column, row, head, batch, thread;
};
std::vector<BarrierState> barriers;
std::vector<Copy> copies;
uint32_t random_state = 1;

uint32_t random_below(uint32_t n) {
  random_state = random_state * 1664525u + 1013904223u;
  return static_cast<uint32_t>(static_cast<uint64_t>(random_state) * n >> 32);
}

BarrierState& state_of(const Barrier& barrier) {
  emulator::check_atomic(&barrier, sizeof(barrier));
  if (!emulator::is_shared(&barrier, sizeof(barrier))) fault("a barrier outside of shared memory");
  if (barrier >= barriers.size()) fault("a barrier that has not been initialised");
  BarrierState& state = barriers[barrier];
  if (!state.is_visible && state.initialiser != current_thread) {
    fault("a barrier used before its initialiser's barriers_visible()");
  }
  return state;
}

void end_phase_if_complete(BarrierState& state) {
  if (state.pending || state.bytes) return;
  state.clock_of_phase[state.phase % 2] = state.clock;
  ++state.phase;
  state.pending = state.count;
}

void arrive(BarrierState& state, int64_t bytes) {
  if (state.pending == 0) fault("mbarrier.arrive: more arrivals than the %d of a phase", state.count);
  state.bytes += bytes;
  if (state.bytes > static_cast<int64_t>(kMostBytes)) fault("a barrier that expects %ld bytes", state.bytes);
  --state.pending;
  emulator::release(state.clock, current_thread);
  end_phase_if_complete(state);
}

void deliver(const Copy& copy) {
  const TensorMap& map = copy.map;
  const uint32_t row_bytes = map.panel_columns * 2;
  std::vector<unsigned char> panel(static_cast<size_t>(map.panel_rows) * row_bytes);
  const bool is_inside = copy.head >= 0 && copy.batch >= 0 && static_cast<uint64_t>(copy.head) < map.extents[2] &&
                         static_cast<uint64_t>(copy.batch) < map.extents[3];
  ActingAs thread(copy.thread);
  for (uint32_t r = 0; r < map.panel_rows; ++r) {
    for (uint32_t c = 0; c < map.panel_columns; ++c) {
      const int64_t row = int64_t{copy.row} + r, column = int64_t{copy.column} + c;
      if (!is_inside || row < 0 || column < 0 || static_cast<uint64_t>(row) >= map.extents[1] ||
          static_cast<uint64_t>(column) >= map.extents[0]) {
        continue;  // zeros
      }
      const unsigned char* element =
          map.base + column * 2 + row * map.strides[1] + copy.head * map.strides[2] + copy.batch * map.strides[3];
      emulator::check_read(element, 2);
      // The panel starts where the pattern does, so offsets in it swizzle like addresses.
      std::memcpy(&panel[emulated::swizzled(r * row_bytes + c * 2, row_bytes)], element, 2);
    }
  }
  emulator::copy_delivered(copy.shared, panel.data(), panel.size());
  BarrierState& state = barriers[copy.barrier];
  state.bytes -= static_cast<int64_t>(panel.size());
  if (state.bytes < -static_cast<int64_t>(kMostBytes)) fault("bytes that the barrier was not told to expect");
  emulator::release(state.clock, copy.thread);
  end_phase_if_complete(state);
}

// Whenever somebody looks at a barrier, a copy may arrive.
void pass_time() {
  if (copies.empty() || random_below(64)) return;
  const uint32_t index = random_below(static_cast<uint32_t>(copies.size()));
  const Copy copy = copies[index];
  copies.erase(copies.begin() + index);
  deliver(copy);
}

}  // namespace

cudaError_t encode_tensor_map(TensorMap& map, const void* base, bool, const uint64_t (&extents)[4],
                              const uint64_t (&strides)[3], uint32_t panel_columns, uint32_t panel_rows) {
  // What cuda.h asks for at cuTensorMapEncodeTiled, and what hopper.cuh adds to it.
  bool is_valid = reinterpret_cast<uintptr_t>(base) % 16 == 0 && panel_rows >= 1 && panel_rows <= 256 &&
                  (panel_columns == 16 || panel_columns == 32 || panel_columns == 64);
  for (const uint64_t extent : extents) is_valid &= extent >= 1 && extent <= uint64_t{1} << 32;
  for (const uint64_t stride : strides) is_valid &= stride % 16 == 0 && stride > 0 && stride < uint64_t{1} << 40;
  if (!is_valid) return cudaErrorInvalidValue;
  map = {static_cast<const unsigned char*>(base),
         {extents[0], extents[1], extents[2], extents[3]},
         {2, strides[0], strides[1], strides[2]},
         panel_columns,
         panel_rows};
  return cudaSuccess;
}

void barrier_init(Barrier& barrier, int count) {
  if (!emulator::is_shared(&barrier, sizeof(barrier))) fault("a barrier outside of shared memory");
  if (count < 1 || count >= 1 << 20) fault("a barrier of %d arrivals", count);
  emulator::check_write(&barrier, sizeof(barrier));
  barrier = barriers.size();
  barriers.push_back({});
  barriers.back().count = barriers.back().pending = count;
  barriers.back().initialiser = current_thread;
}
void barriers_visible() {
  for (BarrierState& state : barriers) state.is_visible |= state.initialiser == current_thread;
}
void barrier_arrive(Barrier& barrier) { arrive(state_of(barrier), 0); }
void barrier_arrive_expect(Barrier& barrier, int bytes) { arrive(state_of(barrier), bytes); }

void barrier_wait(Barrier& barrier, uint32_t parity) {
  if (parity > 1) fault("mbarrier.try_wait: a parity of %u", parity);
  const size_t number = &state_of(barrier) - barriers.data();
  const auto is_over = [=] { return barriers[number].phase % 2 != parity; };
  while (!is_over()) {
    pass_time();
    if (is_over()) break;
    if (copies.empty()) {
      emulator::wait_until("mbarrier.try_wait", [=] { return is_over() || !copies.empty(); });
    } else {
      emulator::yield();
    }
  }
  emulator::acquire(barriers[number].clock_of_phase[parity], current_thread);
}

void numbered_barrier_wait(int number, int threads) { emulator::barrier("bar.sync", number, threads); }
void numbered_barrier_arrive(int number, int threads) { emulator::barrier_arrive("bar.arrive", number, threads); }

void copy_panel_async(void* shared, const TensorMap& map, Barrier& barrier, int column, int row, int head, int batch) {
  const size_t number = &state_of(barrier) - barriers.data();
  const uint32_t row_bytes = map.panel_columns * 2, address = emulator::shared_address(shared);
  if (address % (8 * row_bytes)) fault("a panel at shared address %u, no multiple of %u", address, 8 * row_bytes);
  emulator::copy_issued(shared, static_cast<size_t>(map.panel_rows) * row_bytes);
  copies.push_back({static_cast<unsigned char*>(shared), map, number, column, row, head, batch, current_thread});
}

uint64_t matrix_descriptor(const void* start, uint32_t leading_bytes, uint32_t stride_bytes, uint32_t panel_row_bytes) {
  const uint64_t swizzle = panel_row_bytes == 128 ? 1 : panel_row_bytes == 64 ? 2 : 3;
  return (emulator::shared_address(start) & 0x3ffff) >> 4 | static_cast<uint64_t>(leading_bytes >> 4) << 16 |
         static_cast<uint64_t>(stride_bytes >> 4) << 32 | swizzle << 62;
}

}  // namespace gafext::cuda

namespace emulator {

using namespace gafext::cuda;

void new_hopper_block() {
  barriers.clear(), copies.clear();
  random_state = options.seed * 2654435761u + options.poison + blockIdx.x;
  emulated::new_block();
}

// What it left behind.
void hopper_thread_exits() {
  emulated::thread_exits();
  int live = 0;
  for (const Warp& warp : warps) live += __builtin_popcount(warp.live);
  if (live == 1 && !copies.empty()) fault("the block ends with %zu copies of panels under way", copies.size());
}

}  // namespace emulator
