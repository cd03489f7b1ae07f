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

// A number to divide by. For any dividend below 2^31, (dividend * multiplier) >> shift is the exact
// quotient (Granlund and Montgomery 1994, with multiplier = floor(2^shift / value) + 1 and
// shift = 31 + ceil(log2 value)): two instructions, where a division takes tens.
struct Divisor {
  unsigned int value;
  unsigned int multiplier;
  unsigned long long shift;

  __device__ __forceinline__ unsigned int divide(unsigned int dividend) const {
    return static_cast<unsigned int>((static_cast<unsigned long long>(dividend) * multiplier) >>
                                     shift);
  }
};

// How the rows of K, or those of V, lie in the source and in the cache. Strides are in bytes.
struct Rows {
  long long source_token_stride;
  long long source_head_stride;
  long long cache_slot_stride;
  long long cache_block_step;  // block stride - block size * slot stride: what blocks add to slots
  long long cache_head_stride;
  unsigned long long vectors_per_head;
};

// Slots past the end that were met since the host last cleared this. The host writes it as _EMPTY.
struct InvalidSlots {
  unsigned long long count;  // of tokens
  unsigned long long lock;   // guards the two below
  long long token;           // the lowest, and its slot; the largest long long while there is none
  long long slot;
};

// The host packs this struct as 8-byte words: see pagedcache/backend/nvidia/paged_caching.py.
struct PagedCachingParameters {
  // of this launch
  char* k_cache;
  char* v_cache;
  const char* k;
  const char* v;
  const void* slot_mapping;
  unsigned long long vectors;  // tokens x vectors per token, at most 2^31
  long long first_token;       // number of this launch's first token in the call
  // of the descriptor
  InvalidSlots* invalid;
  unsigned long long num_slots;  // at most 2^31
  Divisor block_size;
  Divisor vectors_per_token;
  Divisor vectors_per_head;  // of the longer of K and V
  Rows k_rows;
  Rows v_rows;
};

// Reports the tokens of this thread's vectors whose slot is past the end. It may cost what it will,
// but must cost a kernel nothing where slots are valid: so it is a call, and loads all again.
template <typename Slot>
__device__ __noinline__ void reportInvalid(const PagedCachingParameters& p, unsigned int first,
                                           int vectors) {
  for (int i = 0; i < vectors; ++i) {
    const unsigned int index = first + i * blockDim.x;
    const unsigned int in_launch = p.vectors_per_token.divide(index);
    // One thread of each token reports it.
    if (index >= p.vectors || index != in_launch * p.vectors_per_token.value) continue;
    const long long slot = static_cast<const Slot*>(p.slot_mapping)[in_launch];
    if (slot < static_cast<long long>(p.num_slots)) continue;
    const long long token = p.first_token + in_launch;
    atomicAdd(&p.invalid->count, 1ULL);
    // Of the threads here together, the first has the lowest token. It alone takes the lock: two of
    // a warp might wait for each other, one to free it and one to go on together.
    if (static_cast<int>(threadIdx.x % 32) != __ffs(__activemask()) - 1) continue;
    volatile long long* const lowest = &p.invalid->token;
    // Most find a lower one before they get it, where a mapping is wrong throughout.
    while (token < *lowest) {
      if (atomicCAS(&p.invalid->lock, 0ULL, 1ULL) != 0) continue;
      __threadfence();
      if (token < *lowest) {
        *lowest = token;
        *static_cast<volatile long long*>(&p.invalid->slot) = slot;
      }
      __threadfence();
      atomicExch(&p.invalid->lock, 0ULL);
    }
  }
}

// Keeps a value in registers. Compilers like to compute an address again where it is used, and here
// that would be when the slot has come and the store could go.
__device__ __forceinline__ void keep([[maybe_unused]] long long& value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(value));
#endif
}

// Vectors of K and of V that a thread copies. One of 16 bytes each keeps enough bytes under way;
// narrower ones need company. PER_THREAD of the host must say the same.
template <int kWidth>
constexpr int kPerThread = kWidth == 16 ? 1 : 2;

// In a block; THREADS of the host has no more. The bound below says that 2048 of them must fit on a
// multiprocessor, so 32 registers each; where only 1536 can stand (7.5, 8.6, 8.9, 12.0) it is void.
constexpr int kMostThreads = 512;

// Grid: enough threads for `vectors`. Each copies a vector of K and the one of V at the same place,
// so both share the look-up of the slot; consecutive threads copy consecutive vectors, so neither a
// head nor a token leaves threads idle.
template <typename T, typename Slot, int kWidth>
__global__ void __launch_bounds__(kMostThreads, 2048 / kMostThreads)
    pagedCaching(const __grid_constant__ PagedCachingParameters p) {
  static_assert(kWidth % sizeof(T) == 0, "a vector must hold whole elements");
  using V = typename Vector<kWidth>::type;
  constexpr int n = kPerThread<kWidth>;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // The next kernel may be set up from now on, if it was launched programmatically; whatever it
  // reads, it waits for this one, as this one waits below.
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const unsigned int first = blockIdx.x * (blockDim.x * n) + threadIdx.x;
  if (first >= p.vectors) return;
  bool has_k[n], has_v[n];
  const Slot* slot_at[n];
  const char *k_at[n], *v_at[n];
  long long k_to[n], v_to[n];  // in the cache, but for the slot; negative: nowhere
#pragma unroll
  for (int i = 0; i < n; ++i) {
    const unsigned int index = first + i * blockDim.x;
    const bool inside = i == 0 || index < p.vectors;
    const unsigned int token = p.vectors_per_token.divide(index);
    const unsigned int in_token = index - token * p.vectors_per_token.value;
    const unsigned int head = p.vectors_per_head.divide(in_token);
    const unsigned int in_head = in_token - head * p.vectors_per_head.value;
    const long long in_row = static_cast<long long>(in_head) * kWidth;
    has_k[i] = inside && in_head < p.k_rows.vectors_per_head;
    has_v[i] = inside && in_head < p.v_rows.vectors_per_head;
    slot_at[i] = static_cast<const Slot*>(p.slot_mapping) + token;
    k_at[i] =
        p.k + token * p.k_rows.source_token_stride + head * p.k_rows.source_head_stride + in_row;
    v_at[i] =
        p.v + token * p.v_rows.source_token_stride + head * p.v_rows.source_head_stride + in_row;
    k_to[i] = has_k[i] ? head * p.k_rows.cache_head_stride + in_row : -1;
    v_to[i] = has_v[i] ? head * p.v_rows.cache_head_stride + in_row : -1;
    if (n == 1) {  // with more there are no registers to spare
      keep(k_to[i]);
      keep(v_to[i]);
    }
  }

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // Launched programmatically, this may run before the kernel ahead of it is done: nothing of what
  // that one wrote may be read above, and all of it may be read below.
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  // All loads are under way before the first slot is needed.
  long long slot[n];
  V k[n], v[n];
#pragma unroll
  for (int i = 0; i < n; ++i) {
    slot[i] = has_k[i] || has_v[i] ? *slot_at[i] : -1;
    if (has_k[i]) k[i] = *reinterpret_cast<const V*>(k_at[i]);
    if (has_v[i]) v[i] = *reinterpret_cast<const V*>(v_at[i]);
  }
#pragma unroll
  for (int i = 0; i < n; ++i) {
    // As unsigned, padding (any negative slot) is past the end too.
    if (static_cast<unsigned long long>(slot[i]) >= p.num_slots) continue;
    long long block = p.block_size.divide(static_cast<unsigned int>(slot[i]));
    keep(block);
    if (k_to[i] >= 0) {
      *reinterpret_cast<V*>(p.k_cache + k_to[i] + slot[i] * p.k_rows.cache_slot_stride +
                            block * p.k_rows.cache_block_step) = k[i];
    }
    if (v_to[i] >= 0) {
      *reinterpret_cast<V*>(p.v_cache + v_to[i] + slot[i] * p.v_rows.cache_slot_stride +
                            block * p.v_rows.cache_block_step) = v[i];
    }
  }
  bool past_end = false;
#pragma unroll
  for (int i = 0; i < n; ++i) {
    keep(slot[i]);  // compared anew: a branch on the comparison above would split the copy in two
    past_end |= slot[i] >= static_cast<long long>(p.num_slots);
  }
  if (past_end) reportInvalid<Slot>(p, first, n);
}

}  // namespace pagedcache
