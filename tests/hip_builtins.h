// SPDX-License-Identifier: Apache-2.0
// What HIP's runtime compiler has by itself, as far as the kernels use it, for a clang without it.

#pragma once

#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __forceinline__ inline __attribute__((always_inline))
#define FUNCTION static __device__ __forceinline__

struct uint2 {
  unsigned int x, y;
};
struct alignas(16) uint4 {
  unsigned int x, y, z, w;
};

// Reads of the members of threadIdx and others are calls.
#define COORDINATES(name, of_x, of_y)                                     \
  struct name##Type {                                                     \
    __declspec(property(get = getX)) unsigned int x;                      \
    __declspec(property(get = getY)) unsigned int y;                      \
    __device__ __forceinline__ unsigned int getX() const { return of_x; } \
    __device__ __forceinline__ unsigned int getY() const { return of_y; } \
  };                                                                      \
  extern const __device__ __attribute__((weak)) name##Type name;
COORDINATES(threadIdx, __builtin_amdgcn_workitem_id_x(), __builtin_amdgcn_workitem_id_y())
COORDINATES(blockIdx, __builtin_amdgcn_workgroup_id_x(), __builtin_amdgcn_workgroup_id_y())
COORDINATES(blockDim, __builtin_amdgcn_workgroup_size_x(), __builtin_amdgcn_workgroup_size_y())
COORDINATES(gridDim, __builtin_amdgcn_grid_size_x() / __builtin_amdgcn_workgroup_size_x(),
            __builtin_amdgcn_grid_size_y() / __builtin_amdgcn_workgroup_size_y())

using Word = unsigned long long;
FUNCTION Word atomicAdd(Word* at, Word value) {
  return __atomic_fetch_add(at, value, __ATOMIC_RELAXED);
}
FUNCTION Word atomicExch(Word* at, Word value) {
  return __atomic_exchange_n(at, value, __ATOMIC_RELAXED);
}
FUNCTION Word atomicCAS(Word* at, Word old, Word value) {
  __atomic_compare_exchange_n(at, &old, value, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return old;
}
FUNCTION void __threadfence() { __builtin_amdgcn_fence(__ATOMIC_SEQ_CST, "agent"); }

FUNCTION unsigned int __lane_id() {
  return __builtin_amdgcn_mbcnt_hi(~0u, __builtin_amdgcn_mbcnt_lo(~0u, 0));
}
FUNCTION Word __ballot(int mine) {
  return __builtin_amdgcn_uicmp(mine, 0, 33);  // 33: is not equal
}
FUNCTION float __shfl_xor(float value, int step) {
  const int from = static_cast<int>(__lane_id()) ^ step;
  const int bits = __builtin_bit_cast(int, value);
  return __builtin_bit_cast(float, __builtin_amdgcn_ds_bpermute(from << 2, bits));
}
// Of these, only the names are right.
FUNCTION double exp(double a) { return a; }
FUNCTION double exp2(double a) { return a; }
FUNCTION double log(double a) { return a; }
FUNCTION double log2(double a) { return a; }
FUNCTION double sin(double a) { return a; }
FUNCTION double cos(double a) { return a; }
FUNCTION double tanh(double a) { return a; }
FUNCTION double pow(double a, double b) { return a * b; }
FUNCTION int __popc(unsigned int bits) { return __builtin_popcount(bits); }
FUNCTION int __ffs(int bits) { return __builtin_ffs(bits); }
