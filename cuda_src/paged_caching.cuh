// The paged caching kernel: copies the K and V of each token to the slot that it was given.
//
// Includes nothing, so that NVRTC needs no header and a host compiler can run it in a test.
// A write is a copy, so the arithmetic type T only names the instance; kWidth, the bytes that one
// thread moves at a time, decides the code.

namespace pagedcache {

struct F16 {
  unsigned short bits;
};
struct BF16 {
  unsigned short bits;
};
using F32 = float;

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

__device__ __forceinline__ unsigned int multiplyHigh(unsigned int a, unsigned int b) {
  return __umulhi(a, b);
}
__device__ __forceinline__ unsigned long long multiplyHigh(unsigned long long a,
                                                           unsigned long long b) {
  return __umul64hi(a, b);
}

// A number to divide by, with floor((2^bits - 1) / value): one multiplication and one correction
// give the exact quotient of any dividend, where a division takes tens of instructions.
template <typename Unsigned>
struct Divisor {
  Unsigned value;
  Unsigned reciprocal;

  __device__ __forceinline__ Unsigned divide(Unsigned dividend, Unsigned& remainder) const {
    Unsigned quotient = multiplyHigh(dividend, reciprocal);
    remainder = dividend - quotient * value;
    if (remainder >= value) {
      remainder -= value;
      ++quotient;
    }
    return quotient;
  }
};

// How the rows of K, or those of V, lie in the source and in the cache. Strides are in bytes.
struct Rows {
  long long source_token_stride;
  long long source_head_stride;
  long long cache_block_stride;
  long long cache_slot_stride;
  long long cache_head_stride;
  unsigned long long vectors_per_head;
};

// The host packs this struct as 8-byte words: see pagedcache/backend/nvidia/paged_caching.py.
struct PagedCachingParameters {
  // of this launch
  char* k_cache;
  char* v_cache;
  const char* k;
  const char* v;
  const void* slot_mapping;
  unsigned long long vectors;  // tokens x vectors per token, below 2^32
  // of the descriptor
  unsigned long long num_slots;
  Divisor<unsigned long long> block_size;
  Divisor<unsigned int> vectors_per_token;
  Divisor<unsigned int> vectors_per_head;  // of the longer of K and V
  Rows k_rows;
  Rows v_rows;
};

// Grid: threads for at least `vectors`. Each copies one vector of K and the one of V at the same
// place, so both share the look-up of the slot; consecutive threads copy consecutive vectors, so
// neither a head nor a token leaves threads idle.
template <typename T, typename Slot, int kWidth>
__global__ void pagedCaching(const __grid_constant__ PagedCachingParameters p) {
  static_assert(kWidth % sizeof(T) == 0, "a vector must hold whole elements");
  using V = typename Vector<kWidth>::type;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // Launched programmatically, this may run before the kernel ahead of it is done: nothing of what
  // that one wrote may be read before here. The next one may be set up from now on, and will wait
  // for this one in turn. Launched otherwise, both do nothing.
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const unsigned int index = blockIdx.x * blockDim.x + threadIdx.x;
  if (index >= p.vectors) return;
  unsigned int in_token, in_head;
  const long long token = p.vectors_per_token.divide(index, in_token);
  const long long head = p.vectors_per_head.divide(in_token, in_head);
  const long long in_row = static_cast<long long>(in_head) * kWidth;
  const bool has_k = in_head < p.k_rows.vectors_per_head;
  const bool has_v = in_head < p.v_rows.vectors_per_head;

  // All three loads are under way before the slot is needed.
  const long long slot = static_cast<const Slot*>(p.slot_mapping)[token];
  V k, v;
  if (has_k) {
    k = *reinterpret_cast<const V*>(p.k + token * p.k_rows.source_token_stride +
                                    head * p.k_rows.source_head_stride + in_row);
  }
  if (has_v) {
    v = *reinterpret_cast<const V*>(p.v + token * p.v_rows.source_token_stride +
                                    head * p.v_rows.source_head_stride + in_row);
  }

  // As unsigned, padding (any negative slot) is past the end too.
  if (static_cast<unsigned long long>(slot) >= p.num_slots) return;
  unsigned long long in_block;
  const long long block = p.block_size.divide(slot, in_block);
  const long long offset = in_block;
  if (has_k) {
    *reinterpret_cast<V*>(p.k_cache + block * p.k_rows.cache_block_stride +
                          offset * p.k_rows.cache_slot_stride + head * p.k_rows.cache_head_stride +
                          in_row) = k;
  }
  if (has_v) {
    *reinterpret_cast<V*>(p.v_cache + block * p.v_rows.cache_block_stride +
                          offset * p.v_rows.cache_slot_stride + head * p.v_rows.cache_head_stride +
                          in_row) = v;
  }
}

}  // namespace pagedcache
