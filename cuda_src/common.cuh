// SPDX-License-Identifier: Apache-2.0
//
// What kernels of any operator share. Includes nothing, so that NVRTC needs no header and a host
// compiler can run kernels in a test.

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

// Programmatic dependent launch (compute capability 9.0). A kernel that was launched that way may
// run before the one ahead of it on the stream is done: nothing that one wrote may be read before
// waitForKernelAhead, and all of it may be read after. In other launches both do nothing.
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

// Brings what will be loaded from memory to the L2 cache. That is a hint and reads nothing: all
// multiprocessors write through that cache, so a later write to the same place is not missed.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// Has a value computed here, not in the branch that uses it.
template <typename Value>
__device__ __forceinline__ void keep([[maybe_unused]] Value& value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(value));
#endif
}

// Invalid indices, such as slots outside a cache, that kernels met since the host took this.
struct Report {
  unsigned long long count;
  unsigned long long lock;  // guards the two below
  long long row;            // the lowest that had one; kNoRow if none had
  long long value;          // its index
};

constexpr long long kNoRow = 0x7fffffffffffffff;

// Runs `critical` while no other thread does. Threads of one warp may all call it: each lets go of
// the lock before it goes on, so none waits for one that waits for it, however wide a warp is.
template <typename Critical>
__device__ __forceinline__ bool tryLocked(unsigned long long* lock, Critical critical) {
  if (atomicCAS(lock, 0ULL, 1ULL) != 0) return false;
  __threadfence();
  critical();
  __threadfence();
  atomicExch(lock, 0ULL);
  return true;
}

// May be slow, but must cost nothing where all indices are valid.
__device__ __forceinline__ void report(Report* to, long long row, long long value) {
  volatile long long* const lowest = &to->row;
  // Where all indices are invalid, most threads find a lower row before they get the lock.
  while (row < *lowest) {
    tryLocked(&to->lock, [=] {
      if (row >= *lowest) return;
      *lowest = row;
      *static_cast<volatile long long*>(&to->value) = value;
    });
  }
  // Last, so that whoever finds it counted finds its row too.
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

// Moves a report away and leaves an empty one, while other kernels may add to it. One thread.
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
      // A row that is not counted yet stays, for whoever counts it.
      if (to->count != 0) *row = kNoRow;
    });
  }
}

}  // namespace pagedcache
