// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA, so that a host compiler runs the kernels. Where threads meet, PAGEDCACHE_WARPS is
// defined; with PAGEDCACHE_WAVE too, the number of lanes, they meet as in waves of AMD's GPUs.

#pragma once

#include <cstddef>
#if defined(PAGEDCACHE_WARPS)
#include <ucontext.h>
#endif

struct uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};
struct Dimension {
  unsigned int x, y;
};
static thread_local Dimension threadIdx, blockIdx, blockDim, gridDim;

// Threads of the host may share a report, so these are as atomic as those of CUDA.
static unsigned long long atomicAdd(unsigned long long* at, unsigned long long value) {
  return __atomic_fetch_add(at, value, __ATOMIC_SEQ_CST);
}
static unsigned long long atomicExch(unsigned long long* at, unsigned long long value) {
  return __atomic_exchange_n(at, value, __ATOMIC_SEQ_CST);
}
static unsigned long long atomicCAS(unsigned long long* at, unsigned long long old,
                                    unsigned long long value) {
  __atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);
  return old;
}
static void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

#define __global__
#define __device__
#if defined(PAGEDCACHE_WAVE)  // each meeting is a place of its own
#define __forceinline__ inline __attribute__((always_inline))
#else
#define __forceinline__ inline
#endif
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static thread_local  // of rows that one warp holds, and warps run in turn

#if defined(PAGEDCACHE_WARPS)
// The lanes of a warp take turns, each on a stack of its own. One that waits for others gives its
// turn to the next.
struct Warp {
#if defined(PAGEDCACHE_WAVE)
  static constexpr unsigned int kLanes = PAGEDCACHE_WAVE;
#else
  static constexpr unsigned int kLanes = 32;
#endif
  static constexpr std::size_t kStack = 1 << 18;
  ucontext_t scheduler;
  struct Lane {
    ucontext_t context;
    float values[2];        // that it brought to the latest shuffles
    unsigned int shuffles;  // that it has come to
    const void* place;      // in the code, where it waits in a wave
    bool done;
    char* stack = new char[kStack];  // <memory> would take a third of the time to compile
    ~Lane() { delete[] stack; }
  } lanes[kLanes];
  unsigned int current, turns;
  float met[kLanes];  // what lanes brought to the place where they are now, and which lanes do
  unsigned long long active;
  void (*run)(void*);
  void* argument;

  void yield() { swapcontext(&lanes[current].context, &scheduler); }
  // Once all lanes of a wave wait or are done, those that wait where one of them does go on: by
  // turns the first and the last, since hardware may take either first.
  void goOn() {
    const void* place = nullptr;
    for (unsigned int i = 0; i < kLanes; ++i) {
      if (lanes[i].place != nullptr && (place == nullptr || turns % 2)) place = lanes[i].place;
    }
    ++turns;
    active = 0;
    for (unsigned int i = 0; place != nullptr && i < kLanes; ++i) {
      if (lanes[i].place != place) continue;
      lanes[i].place = nullptr;
      met[i] = lanes[i].values[0];
      active |= 1ull << i;
    }
  }
};
static thread_local Warp* warp;
static thread_local unsigned int deadlocks;

#if defined(PAGEDCACHE_WAVE)
#define PAGEDCACHE_MEETS __attribute__((noinline)) static
// Lanes run in step, so those that come to one place in the code meet there, whoever they are.
static void meetAt(const void* place, float value) {
  Warp::Lane& lane = warp->lanes[warp->current];
  lane.values[0] = value;
  lane.place = place;
  while (lane.place != nullptr) warp->yield();
}
static unsigned int __lane_id() { return warp->current; }
PAGEDCACHE_MEETS unsigned long long __ballot(int mine) {
  meetAt(__builtin_return_address(0), mine ? 1.0f : 0.0f);
  unsigned long long found = 0;
  for (unsigned int i = 0; i < Warp::kLanes; ++i) {
    if (warp->active >> i & 1 && warp->met[i] != 0.0f) found |= 1ull << i;
  }
  return found;
}
PAGEDCACHE_MEETS float __shfl_xor(float value, int step) {
  meetAt(__builtin_return_address(0), value);
  const unsigned int other = warp->current ^ step;
  if (!(warp->active >> other & 1)) ++deadlocks;  // its register holds anything
  return warp->met[other];
}
PAGEDCACHE_MEETS void __builtin_amdgcn_wave_barrier() { meetAt(__builtin_return_address(0), 0.0f); }
#define __builtin_amdgcn_fence(order, scope)
#else
// Those that are not named in the mask run on, and one that is named but has ended is noticed.
static float __shfl_xor_sync(unsigned int mask, float value, unsigned int step) {
  Warp& w = *warp;
  const unsigned int mine = w.current, other = mine ^ step;
  Warp::Lane& lane = w.lanes[mine];
  if (!(mask >> mine & 1) || !(mask >> other & 1)) ++deadlocks;
  // All lanes wait for each other, so none is two shuffles ahead of another.
  const unsigned int turn = ++lane.shuffles;
  lane.values[turn % 2] = value;
  for (;;) {
    bool all = true, missing = false;
    for (unsigned int i = 0; i < Warp::kLanes; ++i) {
      if (!(mask >> i & 1)) continue;
      const bool here = w.lanes[i].shuffles >= turn;
      all = all && here;
      missing = missing || (!here && w.lanes[i].done);
    }
    if (missing) ++deadlocks;  // that lane never comes
    if (all || missing) break;
    w.yield();
  }
  return w.lanes[other].values[turn % 2];
}

static unsigned int __ballot_sync(unsigned int mask, bool mine) {
  const unsigned int turn = warp->lanes[warp->current].shuffles + 1;
  __shfl_xor_sync(mask, mine ? 1.0f : 0.0f, 0);
  unsigned int found = 0;
  for (unsigned int i = 0; i < Warp::kLanes; ++i) {
    if (mask >> i & 1 && warp->lanes[i].values[turn % 2] != 0.0f) found |= 1u << i;
  }
  return found;
}
static void __syncwarp(unsigned int mask) { __shfl_xor_sync(mask, 0.0f, 0); }
#endif
static int __popc(unsigned int bits) { return __builtin_popcount(bits); }
static int __ffs(int bits) { return __builtin_ffs(bits); }

static void startLane() {
  warp->run(warp->argument);
  warp->lanes[warp->current].done = true;
  warp->yield();
}

// Runs `run(argument)` for threads `first` to `first + count - 1` of a block as one warp.
static void runWarp(unsigned int first, unsigned int count, void (*run)(void*), void* argument) {
  static thread_local Warp made;
  Warp& w = *(warp = &made);
  w.run = run;
  w.argument = argument;
  w.turns = 0;
  for (unsigned int i = 0; i < Warp::kLanes; ++i) {
    w.lanes[i].shuffles = 0;
    w.lanes[i].place = nullptr;
    w.lanes[i].done = i >= count;
    getcontext(&w.lanes[i].context);
    w.lanes[i].context.uc_stack.ss_sp = w.lanes[i].stack;
    w.lanes[i].context.uc_stack.ss_size = Warp::kStack;
    w.lanes[i].context.uc_link = nullptr;
    makecontext(&w.lanes[i].context, startLane, 0);
  }
  for (bool any = true; any;) {
    any = false;
    for (w.current = 0; w.current < Warp::kLanes; ++w.current) {
      if (w.lanes[w.current].done) continue;
      any = true;
      if (w.lanes[w.current].place != nullptr) continue;
      threadIdx.x = first + w.current;
      swapcontext(&w.scheduler, &w.lanes[w.current].context);
    }
#if defined(PAGEDCACHE_WAVE)
    w.goOn();
#endif
  }
}
extern "C" unsigned int take_deadlocks() {
  const unsigned int found = deadlocks;
  deadlocks = 0;
  return found;
}

template <typename Parameters>
void launch(void (*kernel)(Parameters), unsigned int blocks, unsigned int rows,
            unsigned int threads, const void* parameters) {
  struct Call {
    void (*kernel)(Parameters);
    const Parameters* parameters;
  } call{kernel, static_cast<const Parameters*>(parameters)};
  blockDim = {threads, 1};
  gridDim = {blocks, rows};
  for (blockIdx.y = 0; blockIdx.y < rows; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
      for (unsigned int first = 0; first < threads; first += Warp::kLanes)
        runWarp(
            first, threads - first < Warp::kLanes ? threads - first : Warp::kLanes,
            [](void* argument) {
              const Call& made = *static_cast<Call*>(argument);
              made.kernel(*made.parameters);
            },
            &call);
}
#else
#define PAGEDCACHE_GROUPS
// Blocks and threads run one after the other.
template <typename Parameters>
void launch(void (*kernel)(Parameters), unsigned int blocks, unsigned int rows,
            unsigned int threads, const void* parameters) {
  blockDim = {threads, 1};
  gridDim = {blocks, rows};
  for (blockIdx.y = 0; blockIdx.y < rows; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x)
        kernel(*static_cast<const Parameters*>(parameters));
}
#endif
