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
  unsigned long long vectors_per_row;
};

// Slots past the end that were met since the host last cleared this. The host writes it as EMPTY.
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
  long long tokens;
  long long first_token;  // number of this launch's first token in the call
  // of the descriptor
  InvalidSlots* invalid;
  unsigned long long num_slots;  // at most 2^31
  Divisor block_size;
  Divisor vectors_per_row;  // of the longer of K and V
  Divisor rows_per_tile;
  unsigned long long tile_shift;  // a tile is 2^tile_shift tokens
  Rows k_rows;
  Rows v_rows;
};

// It may cost what it will, but must cost nothing where slots are valid.
__device__ __forceinline__ void reportInvalid(InvalidSlots* invalid, long long token,
                                              long long slot) {
  atomicAdd(&invalid->count, 1ULL);
  // Of the threads here together, the first has the lowest token. It alone takes the lock: two of
  // a warp might wait for each other, one to free it and one to go on together.
  if (static_cast<int>(threadIdx.x % 32) != __ffs(__activemask()) - 1) return;
  volatile long long* const lowest = &invalid->token;
  // Most find a lower one before they get it, where a mapping is wrong throughout.
  while (token < *lowest) {
    if (atomicCAS(&invalid->lock, 0ULL, 1ULL) != 0) continue;
    __threadfence();
    if (token < *lowest) {
      *lowest = token;
      *static_cast<volatile long long*>(&invalid->slot) = slot;
    }
    __threadfence();
    atomicExch(&invalid->lock, 0ULL);
  }
}

// Has a value computed here, and not in the branch that uses it: by then the slot has come and the
// store could go.
template <typename Value>
__device__ __forceinline__ void keep([[maybe_unused]] Value& value) {
#if defined(__CUDA_ARCH__)
  asm volatile("" : "+l"(value));
#endif
}

// Brings what will be loaded from memory to the L2 cache. That is a hint, and reads nothing: all
// multiprocessors write through that cache, so a later write to the same place is not missed.
__device__ __forceinline__ void prefetch([[maybe_unused]] const void* address) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// In a block; THREADS of the host has no more. The bound below says that 2048 of them must fit on a
// multiprocessor, so 32 registers each; where only 1536 can stand (7.5, 8.6, 8.9, 12.0) it is void.
constexpr int kMostThreads = 512;

// Threads that prefetch: about as many as are on a large GPU at once. The others start when the
// wait is over, and would ask for the same bytes twice.
constexpr unsigned int kFirstThreads = 1u << 18;

// Grid: a thread for each vector of a row. It copies that of K and the one of V at the same place,
// so both share the look-up of the slot. Threads go along the rows of one head of a tile's tokens,
// then to the next head, then to the next tile: neither a head nor a token leaves threads idle, and
// where the cache has these rows one behind the other, they write whole 32-byte sectors of it,
// however long a row is. A sector written in two parts costs more than two sectors.
//
// In a grid of two rows of blocks the first row copies K and the second V. Memory is the faster for
// having fewer streams at once, where there are more threads than a device holds.
template <typename T, typename Slot, int kWidth>
__global__ void __launch_bounds__(kMostThreads, 2048 / kMostThreads)
    pagedCaching(const __grid_constant__ PagedCachingParameters p) {
  static_assert(kWidth % sizeof(T) == 0, "a vector must hold whole elements");
  using V = typename Vector<kWidth>::type;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // The next kernel may be set up from now on, if it was launched programmatically; whatever it
  // reads, it waits for this one, as this one waits below.
  asm volatile("griddepcontrol.launch_dependents;");
#endif
  const unsigned int index = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned int row = p.vectors_per_row.divide(index);
  const unsigned int in_row = index - row * p.vectors_per_row.value;
  const unsigned int tile = p.rows_per_tile.divide(row);
  const unsigned int in_tile = row - tile * p.rows_per_tile.value;
  const unsigned int shift = static_cast<unsigned int>(p.tile_shift);
  const unsigned int head = in_tile >> shift;
  const unsigned int token = (tile << shift) + (in_tile & ((1u << shift) - 1));
  if (token >= p.tokens) return;
  const bool first_row = blockIdx.y == 0, last_row = blockIdx.y == gridDim.y - 1;
  const bool has_k = first_row && in_row < p.k_rows.vectors_per_row;
  const bool has_v = last_row && in_row < p.v_rows.vectors_per_row;
  const long long offset = static_cast<long long>(in_row) * kWidth;
  const Slot* const slot_at = static_cast<const Slot*>(p.slot_mapping) + token;
  const char* const k_at =
      p.k + token * p.k_rows.source_token_stride + head * p.k_rows.source_head_stride + offset;
  const char* const v_at =
      p.v + token * p.v_rows.source_token_stride + head * p.v_rows.source_head_stride + offset;
  const bool early = first_row && index < kFirstThreads;
  if (early) prefetch(slot_at);
  if (early && has_k) prefetch(k_at);
  if (early && has_v) prefetch(v_at);

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  // Launched programmatically, this may run before the kernel ahead of it is done: nothing of what
  // that one wrote may be read above, and all of it may be read below.
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
  // All loads are under way before the slot is needed.
  long long slot = *slot_at;
  V k, v;
  if (has_k) k = *reinterpret_cast<const V*>(k_at);
  if (has_v) v = *reinterpret_cast<const V*>(v_at);
  // As unsigned, padding (any negative slot) is past the end too.
  const bool valid = static_cast<unsigned long long>(slot) < p.num_slots;
  const unsigned int to = valid ? static_cast<unsigned int>(slot) : 0;
  const unsigned int block = p.block_size.divide(to);
  long long k_to = head * p.k_rows.cache_head_stride + offset + to * p.k_rows.cache_slot_stride +
                   block * p.k_rows.cache_block_step;
  long long v_to = head * p.v_rows.cache_head_stride + offset + to * p.v_rows.cache_slot_stride +
                   block * p.v_rows.cache_block_step;
  keep(k_to);
  keep(v_to);
  if (valid && has_k) *reinterpret_cast<V*>(p.k_cache + k_to) = k;
  if (valid && has_v) *reinterpret_cast<V*>(p.v_cache + v_to) = v;
  keep(slot);  // compared anew, so that the report is no branch before the stores
  const bool first_of_token = first_row && in_row == 0 && head == 0;
  if (first_of_token && slot >= static_cast<long long>(p.num_slots)) {
    reportInvalid(p.invalid, p.first_token + token, slot);
  }
}

}  // namespace pagedcache
