// SPDX-License-Identifier: Apache-2.0
// Enough of CUDA for kernels whose threads only meet in atomics, so that a host compiler runs them.

#pragma once

#include <cstddef>

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
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

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
