// SPDX-License-Identifier: Apache-2.0
//
// Slot mappings: from the position of each token in its request to its slot in the cache.

#include "common.cuh"

namespace pagedcache {

constexpr long long kPadding = -1;

// Division of numbers that nearly always have 32 bits, for which it takes a third of the time.
__device__ __forceinline__ long long divide(long long dividend, long long divisor) {
  if ((dividend | divisor) >> 32 == 0) {
    return static_cast<unsigned int>(dividend) / static_cast<unsigned int>(divisor);
  }
  return dividend / divisor;
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

// A thread for each entry of `out`.
template <typename Table, typename Start, typename Position, typename Slot>
__global__ void slotMapping(const __grid_constant__ SlotMappingParameters p) {
  letNextKernelStart();
  const SlotMappingCall& call = p.call;
  const long long token = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (token >= call.rows) return;
  const Start* const starts = static_cast<const Start*>(call.query_start_loc);
  Slot* const to = static_cast<Slot*>(call.out) + token;
  waitForKernelAhead();
  const long long position =
      token < call.num_positions ? static_cast<const Position*>(call.positions)[token] : kPadding;
  if (position < 0 || token >= starts[call.num_requests]) {
    *to = static_cast<Slot>(kPadding);
    return;
  }
  // The last request that starts at or before this token. Never another, whatever the starts are.
  long long request = 0, end = call.num_requests;
  while (end - request > 1) {
    const long long middle = (request + end) / 2;
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
  if (block < 0) report(p.report, token, position);
  *to = static_cast<Slot>(block < 0 ? kPadding : block * call.block_size + offset);
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
    const long long entry = first + in_table;
    if (first >= 0 && entry < starts[sequence + 1] && entry < call.num_indices) {
      const long long page = static_cast<const Page*>(call.kv_indices)[entry];
      if (page >= 0 && page < call.num_pages) {
        slot = page * call.page_size + position - in_table * call.page_size;
      }
    }
  }
  *to = slot;
}

}  // namespace pagedcache
