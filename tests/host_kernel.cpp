// Runs the kernel source on the CPU: enough of CUDA for a kernel whose threads never meet.

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

// A warp of one thread.
static unsigned int __activemask() { return 1u << (threadIdx.x % 32); }
static int __ffs(unsigned int value) { return __builtin_ffs(static_cast<int>(value)); }

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#include "paged_caching.cuh"

using Kernel = void (*)(pagedcache::PagedCachingParameters);

template <typename T, typename Slot>
static Kernel pick(int width) {
  switch (width) {
    case 16:
      return pagedcache::pagedCaching<T, Slot, 16>;
    case 8:
      return pagedcache::pagedCaching<T, Slot, 8>;
    case 4:
      return pagedcache::pagedCaching<T, Slot, 4>;
    default:
      if constexpr (sizeof(T) == 2) return pagedcache::pagedCaching<T, Slot, 2>;
      return nullptr;
  }
}

// dtype: 0 F16, 1 BF16, 2 F32. Blocks and threads run one after the other.
extern "C" int run(int dtype, int slot_bytes, int width, unsigned int blocks, unsigned int rows,
                   unsigned int threads, const pagedcache::PagedCachingParameters* parameters) {
  using namespace pagedcache;
  const bool wide = slot_bytes == 8;
  const Kernel kernel = dtype == 0 ? (wide ? pick<F16, long long>(width) : pick<F16, int>(width))
                        : dtype == 1
                            ? (wide ? pick<BF16, long long>(width) : pick<BF16, int>(width))
                            : (wide ? pick<F32, long long>(width) : pick<F32, int>(width));
  if (kernel == nullptr) return 1;
  blockDim = {threads, 1};
  gridDim = {blocks, rows};
  for (blockIdx.y = 0; blockIdx.y < rows; ++blockIdx.y)
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x)
      for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) kernel(*parameters);
  return 0;
}

extern "C" std::size_t parameters_size() { return sizeof(pagedcache::PagedCachingParameters); }

extern "C" unsigned int divide(unsigned int dividend, unsigned long long first,
                               unsigned long long second) {
  const pagedcache::Divisor divisor{static_cast<unsigned int>(first),
                                    static_cast<unsigned int>(first >> 32), second};
  return divisor.divide(dividend);
}

extern "C" int most_threads() { return pagedcache::kMostThreads; }
