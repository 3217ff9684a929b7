// Meetings of lanes and warps, and the barriers of the block.
#include <array>
#include <cstring>
#include <utility>

#include "block.h"

namespace emulator {
namespace {

constexpr int kBarriers = 16, kMostWarps = 4;

struct Barrier {
  const char* what = nullptr;
  int expected = 0, arrived = 0;
  std::vector<int> waiters;
  Votes votes{};
  Clock clock;
};
std::array<Barrier, kBarriers> barriers;

// Runs the action and wakes everybody once all of the party are there.
bool complete_meeting(const Thread& one) {
  const Party party = one.party;
  for (int w = party.first_warp; w < party.first_warp + party.warps; ++w) {
    const unsigned exited = party.mask & ~warps[w].live;
    if (exited && party.aligned) fault("%s: lane %d of warp %d has exited", one.what, __builtin_ctz(exited), w);
    if (party.mask & warps[w].live & ~warps[w].asleep) return false;
  }
  void* payloads[kMostWarps * kWarp] = {};
  const int first = party.first_warp * kWarp, count = party.warps * kWarp;
  for (int i = 0; i < count; ++i) {
    if (!(party.mask >> i % kWarp & 1) || !is_live(first + i)) continue;
    const Thread& other = fibers[first + i];
    if (!other.payload || !(other.party == party)) return false;  // it waits elsewhere
    if (std::strcmp(other.what, one.what) != 0) {
      fault("%s, where thread %d of the same lanes is at %s", one.what, first + i, other.what);
    }
    payloads[i] = other.payload;
  }
  one.action(payloads);
  for (int i = 0; i < count; ++i) {
    if (!payloads[i]) continue;
    fibers[first + i].payload = nullptr;
    wake(first + i);
  }
  return true;
}

void complete_barrier(Barrier& barrier) {
  const Barrier completed = std::exchange(barrier, {});
  for (const int thread : completed.waiters) {
    acquire(completed.clock, thread);
    fibers[thread].votes = completed.votes;
    wake(thread);
  }
}

int live_threads() {
  int count = 0;
  for (const Warp& warp : warps) count += __builtin_popcount(warp.live);
  return count;
}

Barrier& arrive(const char* what, int id, int count, bool vote) {
  if (id < 0 || id >= kBarriers) fault("%s: barrier %d, of 0..%d", what, id, kBarriers - 1);
  if (count % kWarp) fault("%s: %d threads are no whole warps", what, count);
  Barrier& barrier = barriers[id];
  if (!barrier.arrived) barrier.what = what, barrier.expected = count, barrier.votes = {0, 1, 0};
  if (barrier.expected != count || (count == 0 && std::strcmp(barrier.what, what) != 0)) {
    fault("%s of %d threads, where others are at %s of %d (barrier %d, 0: all)", what, count, barrier.what,
          barrier.expected, id);
  }
  ++barrier.arrived;
  barrier.votes.any |= vote, barrier.votes.all &= vote, barrier.votes.count += vote;
  release(barrier.clock, current_thread);
  return barrier;
}
bool is_complete(const Barrier& barrier) {
  return barrier.arrived && barrier.arrived >= (barrier.expected ? barrier.expected : live_threads());
}

}  // namespace

Party lanes_of_warp(unsigned mask) {
  if (!(mask & bit_of(current_thread))) fault("the mask %08x of a warp instruction leaves out its own lane", mask);
  return {warp_of(current_thread), 1, mask, false};
}

Party whole_warps(int count) {
  const int first = warp_of(current_thread) / count * count;
  if (first + count > static_cast<int>(warps.size())) fault("a group of %d warps, and the block ends in it", count);
  return {first, count, 0xffffffffu, true};
}

void meet(const char* what, const Party& party, void* payload, Action action) {
  Thread& self = fibers[current_thread];
  self.what = what, self.party = party, self.payload = payload, self.action = action;
  fall_asleep(current_thread);
  if (!complete_meeting(self)) to_scheduler();
}

Votes barrier(const char* what, int id, int count, bool vote) {
  Barrier& barrier = arrive(what, id, count, vote);
  barrier.waiters.push_back(current_thread);
  fibers[current_thread].what = what;
  fall_asleep(current_thread);
  if (is_complete(barrier)) {
    complete_barrier(barrier);
  } else {
    to_scheduler();
  }
  return fibers[current_thread].votes;
}

void barrier_arrive(const char* what, int id, int count) {
  Barrier& barrier = arrive(what, id, count, false);
  if (is_complete(barrier)) complete_barrier(barrier);
}

void new_barriers() { barriers.fill({}); }

// An exited thread counts neither at a barrier of all nor at a shuffle.
void thread_exited() {
  Warp& warp = warps[warp_of(current_thread)];
  warp.live &= ~bit_of(current_thread);
  for (Barrier& barrier : barriers) {
    if (barrier.expected == 0 && is_complete(barrier)) complete_barrier(barrier);
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const int thread = warp_of(current_thread) * kWarp + lane;
    if (!is_live(thread) || !fibers[thread].payload || !(fibers[thread].party.mask & bit_of(current_thread))) continue;
    complete_meeting(fibers[thread]);
  }
}

}  // namespace emulator
