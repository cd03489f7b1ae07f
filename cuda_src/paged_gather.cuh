// SPDX-License-Identifier: Apache-2.0
//
// The paged gather: reads the rows of slots back, converted, one after the other.

#include "rows.cuh"

namespace pagedcache {

// In the order of the operator's arguments.
struct PagedGatherCall {
  const char* k_cache;
  const char* v_cache;
  const void* slot_mapping;
  char* k_out;
  char* v_out;
  const char* k_scale;
  const char* v_scale;
  long long tokens;
};

struct PagedGatherParameters {
  PagedGatherCall call;
  RowsGrid grid;
  RowsSide k;
  RowsSide v;
  Slots slots;
  Report* report;
  long long first_token;  // the number of this launch's first token in the call
};

template <typename T, typename Slot, typename Format, int kMode, int kElements, bool kAhead>
__device__ __forceinline__ void gatherRows(const PagedGatherParameters& p, const RowsSide& side,
                                           const char* cache, char* out, const char* scales,
                                           bool reports) {
  using Target = FormatOf<T>;
  // A thread takes its elements in parts, all of which are stored by one access each. Those of
  // neighbouring threads are next to each other, so that whole 32-byte sectors are written.
  constexpr int kParts =
      kPackedBytes<Target, kElements> > 16 ? kPackedBytes<Target, kElements> / 16 : 1;
  constexpr int kPart = kElements / kParts;
  constexpr int kFrom = kPackedBytes<Format, kPart>;
  constexpr int kTo = kPackedBytes<Target, kPart>;
  // Two elements of int4 are a byte, but their targets may be at addresses of one element.
  constexpr bool kApart = kFrom == 1;

  const Place at(p.grid, side);
  if (at.token >= p.call.tokens) return;
  const Slot* const slot_at = static_cast<const Slot*>(p.call.slot_mapping) + at.token;
  out += inToken(side.rows, at);
  if (kAhead && at.in_row == 0 && at.head == 0) prefetch(slot_at);

  waitForKernelAhead();
  if (!kAhead) letNextKernelStart();
  const long long slot = *slot_at;
  // As unsigned, padding (any negative slot) is past the end too.
  if (static_cast<unsigned long long>(slot) >= p.slots.count) {
    if (reports && slot >= 0 && at.in_row == 0 && at.head == 0) {
      report(p.report, p.first_token + at.token, slot);
    }
    return;
  }
  const unsigned int from = static_cast<unsigned int>(slot);
  const unsigned int block = p.slots.block_size.divide(from);
  cache += inSlot(side.cache, at.head, from, block);
  if constexpr (kMode == kScaled || kMode == kScaledElements) {
    scales += inSlot(side.scales, at.head, from, block);
  }
  Packed<kFrom> held[kParts];
  float scale[kParts];
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const unsigned int part = at.in_row + i * side.threads;
    held[i] = loadPacked<kFrom>(cache + static_cast<long long>(part) * kFrom);
    if constexpr (kMode == kScaled) {
      const long long group = side.per_group.divide(part);
      scale[i] = *reinterpret_cast<const float*>(scales + group * side.group_stride);
    }
  }
#pragma unroll
  for (int i = 0; i < kParts; ++i) {
    const unsigned int part = at.in_row + i * side.threads;
    char* const to = out + static_cast<long long>(part) * kTo;
    if constexpr (kMode == kCopied) {
      storePacked<kTo>(to, held[i]);
    } else {
      float values[kPart];
      decode<Format>(held[i], values);
#pragma unroll
      for (int j = 0; j < kPart; ++j) {
        if constexpr (kMode == kScaled) values[j] = multiply(values[j], scale[i]);
        if constexpr (kMode == kScaledElements) {
          const long long group = side.per_group.divide(part * kPart + j);
          const char* const one = scales + group * side.group_stride;
          values[j] = multiply(values[j], *reinterpret_cast<const float*>(one));
        }
      }
      storeElements<Target, kPart, kApart>(to, encode<Target>(values));
    }
  }
}

// Grid: a row of blocks for K and, if there is V, one for V. In each, a thread for each vector of
// kElements elements of a row.
template <typename T, typename Slot, typename KFormat, int kKMode, int kKElements, typename VFormat,
          int kVMode, int kVElements, bool kAhead>
__global__ void __launch_bounds__(kMostThreads, 1024 / kMostThreads)
    pagedGather(const __grid_constant__ PagedGatherParameters p) {
  if (kAhead) letNextKernelStart();
  const PagedGatherCall& call = p.call;
  if (blockIdx.y == 0) {
    gatherRows<T, Slot, FormatOf<KFormat>, kKMode, kKElements, kAhead>(
        p, p.k, call.k_cache, call.k_out, call.k_scale, true);
  } else {
    gatherRows<T, Slot, FormatOf<VFormat>, kVMode, kVElements, kAhead>(
        p, p.v, call.v_cache, call.v_out, call.v_scale, false);
  }
}

}  // namespace pagedcache
