// SPDX-License-Identifier: Apache-2.0
//
// What is different on AMD's GPUs, where all other source comes after this file. HIP's runtime
// compiler brings what it has of CUDA by itself.

#pragma once

#if !defined(__grid_constant__)
#define __grid_constant__
#endif

#if defined(__AMDGCN__)
// Its second number would be of waves, not of blocks.
#undef __launch_bounds__
#define __launch_bounds__(threads, ...) __attribute__((amdgpu_flat_work_group_size(1, threads)))
// The compiler has no functions of its own for these.
#define PAGEDCACHE_IN_DOUBLE(name) ::name
#endif

// How the threads of a group meet (see common.cuh). A wave has one group or two, and its lanes run
// in step. Those that have gone another way are inactive, and may be a whole group.
#define PAGEDCACHE_GROUPS

namespace pagedcache {

__device__ __forceinline__ unsigned int ballot(bool mine) {
  // The lanes of the other group are in the other half.
  return static_cast<unsigned int>(__ballot(mine) >> (__lane_id() & 32));
}
__device__ __forceinline__ float exchanged(float value, unsigned int step, unsigned int) {
  return __shfl_xor(value, static_cast<int>(step));
}
__device__ __forceinline__ void meet() {
  // Only keeps the compiler from moving accesses to shared memory.
  __builtin_amdgcn_fence(__ATOMIC_RELEASE, "wavefront");
  __builtin_amdgcn_wave_barrier();
  __builtin_amdgcn_fence(__ATOMIC_ACQUIRE, "wavefront");
}

}  // namespace pagedcache
