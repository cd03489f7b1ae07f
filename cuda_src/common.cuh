// SPDX-License-Identifier: Apache-2.0
//
// What the kernels of all operators share. Includes nothing, so that NVRTC needs no headers and a
// host compiler can compile the kernels for tests.

#pragma once

namespace pagedcache {

struct F16 {
  unsigned short bits;
};
struct BF16 {
  unsigned short bits;
};
using F32 = float;

// What a thread moves at a time, by its size in bytes.
template <int kWidth>
struct Vector;
template <>
struct Vector<2> {
  using type = unsigned short;
};
template <>
struct Vector<4> {
  using type = unsigned int;
};
template <>
struct Vector<8> {
  using type = uint2;
};
template <>
struct Vector<16> {
  using type = uint4;
};

// A number to divide by. For any dividend below 2^31, (dividend * multiplier) >> shift is the exact
// quotient (Granlund and Montgomery 1994, with multiplier = floor(2^shift / value) + 1 and
// shift = 31 + ceil(log2 value)): two instructions, where a division takes tens.
struct Divisor {
  unsigned int multiplier;
  unsigned int shift;

  __device__ __forceinline__ unsigned int divide(unsigned int dividend) const {
    return static_cast<unsigned int>((static_cast<unsigned long long>(dividend) * multiplier) >>
                                     shift);
  }
};

// Programmatic dependent launch (compute capability 9.0). A kernel that is launched this way may
// start before the kernel ahead of it on the stream is done. What that kernel writes may only be
// read after waitForKernelAhead. In other launches, both functions do nothing.
__device__ __forceinline__ void letNextKernelStart() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}
__device__ __forceinline__ void waitForKernelAhead() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Prefetches what will be loaded into the L2 cache. This is a hint and reads nothing: all
// multiprocessors write through that cache, so a later write to the same address is not missed.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// Makes the compiler compute a value here, not in the branch that uses it.
template <typename Value>
__device__ __forceinline__ void keep([[maybe_unused]] Value& value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(value));
#endif
}

// Threads meet in groups of 32 neighbours, numbered by threadIdx.x. A group is a warp, or half of a
// wave of 64, of which the other half may be somewhere else.
constexpr unsigned int kGroupThreads = 32;
constexpr unsigned int kWholeGroup = 0xffffffff;

#if !defined(PAGEDCACHE_GROUPS)
// The threads of this group for which `mine` is true, a bit each. All come here.
__device__ __forceinline__ unsigned int ballot(bool mine) {
  return __ballot_sync(kWholeGroup, mine);
}
// The value that the thread whose number has another bit of `step` brings. Those in `group` come.
__device__ __forceinline__ float exchanged(float value, unsigned int step, unsigned int group) {
  return __shfl_xor_sync(group, value, step);
}
// The threads of this group wait for each other's accesses to shared memory.
__device__ __forceinline__ void meet() { __syncwarp(kWholeGroup); }
#endif

// Invalid indices, such as slots outside a cache, that kernels met since the host last took
// the report.
struct Report {
  unsigned long long count;
  unsigned long long lock;  // guards the two below
  long long row;            // the lowest row with one; kNoRow if there is none
  long long value;          // its index
};

constexpr long long kNoRow = 0x7fffffffffffffff;

// Runs `critical` if the lock is free, and returns whether it was. All threads of a warp may call
// it: each releases the lock before it continues, so no two wait for each other, however wide a
// warp is.
template <typename Critical>
__device__ __forceinline__ bool tryLocked(unsigned long long* lock, Critical critical) {
  if (atomicCAS(lock, 0ULL, 1ULL) != 0) return false;
  __threadfence();
  critical();
  __threadfence();
  atomicExch(lock, 0ULL);
  return true;
}

// May be slow, but must cost nothing if all indices are valid.
__device__ __forceinline__ void report(Report* to, long long row, long long value) {
  volatile long long* const lowest = &to->row;
  // If all indices are invalid, most threads find a lower row before they get the lock.
  while (row < *lowest) {
    tryLocked(&to->lock, [=] {
      if (row >= *lowest) return;
      *lowest = row;
      *static_cast<volatile long long*>(&to->value) = value;
    });
  }
  // Counted last, so that whoever sees the count sees the row too.
  __threadfence();
  atomicAdd(&to->count, 1ULL);
}

struct TakeReportCall {
  Report* report;
  Report* taken;
};

struct TakeReportParameters {
  TakeReportCall call;
};

// Moves a report away and leaves an empty one, while other kernels may add to it. Needs one thread.
__global__ void takeReport(const __grid_constant__ TakeReportParameters p) {
  Report* const from = p.call.report;
  Report* const to = p.call.taken;
  bool taken = false;
  while (!taken) {
    taken = tryLocked(&from->lock, [=] {
      volatile long long* const row = &from->row;
      to->count = atomicExch(&from->count, 0ULL);
      to->row = *row;
      to->value = *static_cast<volatile long long*>(&from->value);
      // A row that is not counted yet stays until it is.
      if (to->count != 0) *row = kNoRow;
    });
  }
}

}  // namespace pagedcache
