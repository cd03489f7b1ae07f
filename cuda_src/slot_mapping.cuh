// SPDX-License-Identifier: Apache-2.0
//
// Slot mappings: from the position of each token in its request to its slot in the cache.

#include "common.cuh"

namespace pagedcache {

constexpr long long kPadding = -1;

// Division by what is often a power of two, of what nearly always has 31 bits.
__device__ __forceinline__ long long divide(long long dividend, long long divisor) {
  if ((dividend | divisor) >> 31 != 0) return dividend / divisor;
  const unsigned int by = static_cast<unsigned int>(divisor);
  if ((by & (by - 1)) == 0) return dividend >> (__ffs(static_cast<int>(by)) - 1);
  return static_cast<unsigned int>(dividend) / by;
}

// In the order of the operator's arguments.
struct SlotMappingCall {
  const void* block_tables;
  const void* query_start_loc;
  const void* positions;
  void* out;
  long long num_requests;
  long long num_positions;
  long long block_size;
  long long cp_size;
  long long cp_rank;
  long long cp_interleave;
  long long rows;  // of out
};

struct SlotMappingParameters {
  SlotMappingCall call;
  long long table_length;
  long long table_stride;
  Report* report;
};

constexpr int kLanes = kGroupThreads;

// The requests of a warp's tokens: those from `first` to `end`, but not that one.
struct Requests {
  unsigned int first, end;

  // Finds them by starts that all lanes load at once, every so many of them if there are many.
  template <int kSamples, typename Start>
  __device__ __forceinline__ void find(const Start* starts, unsigned int count, long long token) {
    const unsigned int lane = threadIdx.x % kLanes;
    const unsigned int step = (count + kLanes * kSamples - 1) / (kLanes * kSamples);
    Start samples[kSamples];
    bool there[kSamples];
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      const unsigned int at = (lane + i * kLanes) * step;
      there[i] = at < count;
      samples[i] = there[i] ? starts[at] : 0;
    }
    unsigned int at_first = 0, at_last = 0;  // how many start at or before these tokens
#pragma unroll
    for (int i = 0; i < kSamples; ++i) {
      at_first += __popc(ballot(there[i] && samples[i] <= token));
      at_last += __popc(ballot(there[i] && samples[i] <= token + kLanes - 1));
    }
    first = at_first == 0 ? 0 : (at_first - 1) * step;
    end = at_last * step < count ? at_last * step : count;
  }
};

// A thread for each entry of `out`. All lanes of a warp stay together until the requests are known.
template <typename Table, typename Start, typename Position, typename Slot>
__global__ void slotMapping(const __grid_constant__ SlotMappingParameters p) {
  letNextKernelStart();
  const SlotMappingCall& call = p.call;
  const long long token = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  const Start* const starts = static_cast<const Start*>(call.query_start_loc);
  Slot* const to = static_cast<Slot*>(call.out) + token;
  waitForKernelAhead();
  // All of these loads are under way together.
  const bool is_token = token < call.num_positions && token < call.rows;
  const long long position =
      is_token ? static_cast<const Position*>(call.positions)[token] : kPadding;
  const long long tokens = starts[call.num_requests];
  const unsigned int num_requests = static_cast<unsigned int>(call.num_requests);
  const long long first = token - threadIdx.x % kLanes;
  Requests requests;
  if (num_requests <= 2 * kLanes) {
    requests.find<2>(starts, num_requests, first);
  } else {
    requests.find<8>(starts, num_requests, first);
  }
  if (token >= call.rows) return;
  if (position < 0 || token >= tokens || requests.end == 0 || token < starts[0]) {
    *to = static_cast<Slot>(kPadding);
    return;
  }
  // The last request that starts at or before this token. Never another, whatever the starts are.
  unsigned int request = requests.first, end = requests.end;
  while (end - request > 1) {
    const unsigned int middle = (request + end) / 2;
    (starts[middle] <= token ? request : end) = middle;
  }
  // With context parallelism, a block of the table is a block on each rank.
  const long long together = call.block_size * call.cp_size;
  const long long entry = divide(position, together);
  long long offset = position - entry * together;
  if (call.cp_size > 1) {
    const long long turn = divide(offset, call.cp_interleave);
    const long long round = divide(turn, call.cp_size);
    if (turn - round * call.cp_size != call.cp_rank) {
      *to = static_cast<Slot>(kPadding);
      return;
    }
    offset += (round - turn) * call.cp_interleave;
  }
  long long block = -1;
  if (entry < p.table_length) {
    block = static_cast<const Table*>(call.block_tables)[request * p.table_stride + entry];
  }
  // More blocks than that would have slots that do not fit into 64 bits, or into those of `out`.
  const bool known = block >= 0 && block >> 32 == 0;
  const long long slot = known ? block * call.block_size + offset : kPadding;
  const bool fits = known && static_cast<Slot>(slot) == slot;
  if (!fits) report(p.report, token, position);
  *to = static_cast<Slot>(fits ? slot : kPadding);
}

struct PageSlotsCall {
  const void* batch_indices;
  const void* positions;
  const void* kv_indices;
  const void* kv_indptr;
  void* out;
  long long num_sequences;
  long long num_indices;
  long long page_size;
  long long num_pages;
  long long rows;  // of out
};

struct PageSlotsParameters {
  PageSlotsCall call;
  Report* report;
};

// The same for tables that follow one another, and tokens that name their sequence. What is not in
// the tables gets the first slot past the end, which the write reports.
template <typename Batch, typename Position, typename Page, typename Start>
__global__ void pageSlots(const __grid_constant__ PageSlotsParameters p) {
  letNextKernelStart();
  const PageSlotsCall& call = p.call;
  const long long row = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (row >= call.rows) return;
  const Start* const starts = static_cast<const Start*>(call.kv_indptr);
  long long* const to = static_cast<long long*>(call.out) + row;
  waitForKernelAhead();
  const long long sequence = static_cast<const Batch*>(call.batch_indices)[row];
  const long long position = static_cast<const Position*>(call.positions)[row];
  if (sequence < 0) {
    *to = kPadding;
    return;
  }
  long long slot = call.num_pages * call.page_size;
  if (sequence < call.num_sequences && position >= 0) {
    const long long first = starts[sequence];
    const long long in_table = divide(position, call.page_size);
    const long long after = starts[sequence + 1];
    const long long end = after < call.num_indices ? after : call.num_indices;
    if (first >= 0 && first < end && in_table < end - first) {
      const long long page = static_cast<const Page*>(call.kv_indices)[first + in_table];
      if (page >= 0 && page < call.num_pages) {
        slot = page * call.page_size + position - in_table * call.page_size;
      }
    }
  }
  *to = slot;
}

}  // namespace pagedcache
