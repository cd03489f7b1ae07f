// SPDX-License-Identifier: Apache-2.0
//
// The paged caching kernel: copies the K and V of each token to its slot. The operator and its
// name follow InfiniCore's pagedCaching<T>; the code does not.
//
// A write is a copy, so the arithmetic type T only names the instance; kWidth, the bytes that one
// thread moves at a time, decides the code.

#include "common.cuh"
#include "strides.cuh"

namespace pagedcache {

// What changes from call to call. The host packs these words in this order.
struct PagedCachingCall {
  const char* k;
  const char* v;
  const void* slot_mapping;
  long long tokens;
  char* k_cache;
  char* v_cache;
};

// In the order of use: what the loads need, what the stores need, and what few kernels need.
struct PagedCachingParameters {
  PagedCachingCall call;
  Divisor vectors_per_row;  // of the longer of K and V
  Divisor rows_per_tile;
  unsigned int tile_rows;
  unsigned int tile_shift;  // a tile is 2^tile_shift tokens
  unsigned int k_vectors;   // in a row
  unsigned int v_vectors;
  TokenRows k_source;
  TokenRows v_source;

  Divisor block_size;
  unsigned long long num_slots;  // at most 2^31
  CacheRows k_to;
  CacheRows v_to;

  Report* report;
  long long first_token;  // the number of this launch's first token in the call
};

// Grid: a thread for each vector of a row. It copies that vector of K and the one of V at the same
// place, so both share one lookup of the slot. Threads go along the rows of one head of a tile's
// tokens, then to the next head, then to the next tile. So neither a head nor a token leaves
// threads idle, and where these rows are next to each other in the cache, threads write whole
// 32-byte sectors, however long a row is. A sector that is written in two parts costs more than two
// sectors.
//
// In a grid of two rows of blocks, the first copies K and the second V. Where there are more
// threads than a device holds, memory is faster with fewer streams at a time.
//
// A kernel that gets ahead (kAhead) lets the next one start at once, and prefetches, so that
// several are on the device at once and prefetch what they will load. The next one may then run
// before the kernel ahead of this one is done, so what it does before its own wait must not depend
// on any kernel.
//
// The launch bounds say that 2048 threads must fit on a multiprocessor, with 32 registers each.
// They have no effect where fewer fit: 1536 on compute capability 8.6, 8.9 and 12.0, 1024 on 7.5.
template <typename T, typename Slot, int kWidth, bool kAhead>
__global__ void __launch_bounds__(kMostThreads, 2048 / kMostThreads)
    pagedCaching(const __grid_constant__ PagedCachingParameters p) {
  static_assert(kWidth % sizeof(T) == 0, "a vector must hold whole elements");
  using V = typename Vector<kWidth>::type;

  // Whenever the next kernel starts, it waits for this one, as this one waits below.
  if (kAhead) letNextKernelStart();
  const unsigned int index = blockIdx.x * blockDim.x + threadIdx.x;
  const unsigned int row = p.vectors_per_row.divide(index);
  const unsigned int in_row = index - row * (p.k_vectors > p.v_vectors ? p.k_vectors : p.v_vectors);
  const unsigned int tile = p.rows_per_tile.divide(row);
  const unsigned int in_tile = row - tile * p.tile_rows;
  const unsigned int shift = p.tile_shift;
  const unsigned int head = in_tile >> shift;
  const unsigned int token = (tile << shift) + (in_tile & ((1u << shift) - 1));
  if (token >= p.call.tokens) return;
  const bool first_row = blockIdx.y == 0, last_row = blockIdx.y == gridDim.y - 1;
  const bool has_k = first_row && in_row < p.k_vectors;
  const bool has_v = last_row && in_row < p.v_vectors;
  const bool first_of_token = first_row && in_row == 0 && head == 0;
  const long long offset = static_cast<long long>(in_row) * kWidth;
  const Slot* const slot_at = static_cast<const Slot*>(p.call.slot_mapping) + token;
  const char* const k_at =
      p.call.k + token * p.k_source.token_stride + head * p.k_source.head_stride + offset;
  const char* const v_at =
      p.call.v + token * p.v_source.token_stride + head * p.v_source.head_stride + offset;
  if (kAhead && in_row % (kLine / kWidth) == 0) {
    if (first_of_token) prefetch(slot_at);
    if (has_k) prefetch(k_at);
    if (has_v) prefetch(v_at);
  }

  waitForKernelAhead();
  if (!kAhead) letNextKernelStart();
  // All loads are under way before the slot is needed. Stores wait for the slot, so what can be
  // computed before it comes is: a compiler would move that into the branch of the store.
  long long slot = *slot_at;
  V k, v;
  if (has_k) k = *reinterpret_cast<const V*>(k_at);
  if (has_v) v = *reinterpret_cast<const V*>(v_at);
  // As unsigned, padding (any negative slot) is past the end too.
  const bool valid = static_cast<unsigned long long>(slot) < p.num_slots;
  const unsigned int to = valid ? static_cast<unsigned int>(slot) : 0;
  const unsigned int block = p.block_size.divide(to);
  long long k_to =
      head * p.k_to.head_stride + offset + to * p.k_to.slot_stride + block * p.k_to.block_step;
  long long v_to =
      head * p.v_to.head_stride + offset + to * p.v_to.slot_stride + block * p.v_to.block_step;
  keep(k_to);
  keep(v_to);
  if (valid && has_k) *reinterpret_cast<V*>(p.call.k_cache + k_to) = k;
  if (valid && has_v) *reinterpret_cast<V*>(p.call.v_cache + v_to) = v;
  keep(slot);  // compared anew, so that the report is not a branch before the stores
  if (first_of_token && slot >= static_cast<long long>(p.num_slots)) {
    report(p.report, p.first_token + token, slot);
  }
}

}  // namespace pagedcache
