// SPDX-License-Identifier: Apache-2.0
//
// The paged caching write for caches in other formats than K and V: converts the rows of each
// token, and stores them in its slot.

#include "rows.cuh"

namespace pagedcache {

// In the order of the operator's arguments.
struct PagedStoringCall {
  char* k_cache;
  char* v_cache;
  const char* k;
  const char* v;
  const void* slot_mapping;
  char* k_scale;
  char* v_scale;
  long long tokens;
};

struct PagedStoringParameters {
  PagedStoringCall call;
  RowsGrid grid;
  RowsSide k;
  RowsSide v;
  Slots slots;
  Report* report;
  long long first_token;  // the number of this launch's first token in the call
};

// The largest value that any of `lanes` neighbouring threads has.
__device__ __forceinline__ float largestOf(float value, unsigned int lanes) {
  const unsigned int in_warp = threadIdx.x % 32;
  const unsigned int ours =
      lanes == 32 ? 0xffffffffu : ((1u << lanes) - 1) << (in_warp & ~(lanes - 1));
  for (unsigned int step = lanes / 2; step > 0; step /= 2) {
    value = larger(value, __shfl_xor_sync(ours, value, step));
  }
  return value;
}

// The slow path: one division for each element, for scales and values that Quotients rejects. It
// loads and stores them one by one, which takes few registers.
template <typename Source, typename Format, int kElements>
__device__ __forceinline__ void storeOneByOne(const char* from, char* cache, float scale) {
  constexpr int kOne = Format::kBits == 4 && kElements > 1 ? 2 : 1;
  constexpr int kFrom = kPackedBytes<Source, kOne>, kTo = kPackedBytes<Format, kOne>;
#pragma unroll 1
  for (int i = 0; i < kElements / kOne; ++i) {
    float values[kOne];
    decode<Source>(loadElements<Source, kOne, true>(from + i * kFrom), values);
    for (float& value : values) value = divide(value, scale);
    storePacked<kTo>(cache + i * kTo, encode<Format>(values));
  }
}

template <typename T, typename Slot, typename Format, int kMode, int kElements, bool kAhead>
__device__ __forceinline__ void storeRows(const PagedStoringParameters& p, const RowsSide& side,
                                          const char* from, char* cache, char* scales,
                                          bool reports) {
  using Source = FormatOf<T>;
  constexpr int kFrom = kPackedBytes<Source, kElements>;
  constexpr int kTo = kPackedBytes<Format, kElements>;
  // Two elements of int4 are a byte, but their sources may be at addresses of one element.
  constexpr bool kApart = kTo == 1;
  constexpr bool kComputes = kMode == kComputed || kMode == kComputedPower;

  const Place at(p.grid, side);
  if (at.token >= p.call.tokens) return;
  const unsigned int lane = at.in_row & (side.lanes - 1);
  const unsigned int unit = at.in_row >> side.lane_bits;
  const unsigned int first = unit * side.vectors_per_unit;
  const Slot* const slot_at = static_cast<const Slot*>(p.call.slot_mapping) + at.token;
  from += inToken(side.rows, at) + static_cast<long long>(first) * kFrom;
  scales += at.head * side.scales.head_stride;
  const bool has_vector = lane < side.vectors_per_unit;
  if (kAhead) {
    if (at.in_row == 0 && at.head == 0) prefetch(slot_at);
    if (has_vector && (first + lane) * kFrom % kLine < kFrom) prefetch(from + lane * kFrom);
  }

  waitForKernelAhead();
  if (!kAhead) letNextKernelStart();
  const long long slot = *slot_at;
  Packed<kFrom> held = {};
  if (has_vector) held = loadElements<Source, kElements, kApart>(from + lane * kFrom);
  float scale = 1.0f;
  if constexpr (kMode == kScaled) scale = *reinterpret_cast<const float*>(scales);
  // As unsigned, padding (any negative slot) is past the end too.
  if (static_cast<unsigned long long>(slot) >= p.slots.count) {
    if (reports && slot >= 0 && at.in_row == 0 && at.head == 0) {
      report(p.report, p.first_token + at.token, slot);
    }
    return;
  }
  const unsigned int to = static_cast<unsigned int>(slot);
  const unsigned int block = p.slots.block_size.divide(to);
  cache += inSlot(side.cache, at.head, to, block) + static_cast<long long>(first) * kTo;
  if constexpr (kComputes) {
    float values[kElements];
    float most = 0.0f;
    for (unsigned int i = lane; i < side.vectors_per_unit; i += side.lanes) {
      decode<Source>(i == lane ? held : loadElements<Source, kElements, kApart>(from + i * kFrom),
                     values);
#pragma unroll
      for (int j = 0; j < kElements; ++j) most = larger(most, magnitude(values[j]));
    }
    most = largestOf(most, side.lanes);
    scale = divide(most, Format::kMost);
    if constexpr (kMode == kComputedPower) {
      scale = asFloat((asBits(larger(scale, 1e-4f)) + 0x7fffffu) & 0x7f800000u);
    } else {
      scale = larger(scale, 1e-6f);
    }
    if (lane == 0) {
      // The head's part is in `scales` already.
      scales += inSlot(side.scales, 0, to, block) + unit * side.group_stride;
      *reinterpret_cast<float*>(scales) = scale;
    }
    scale = divide(1.0f, scale);
  }
  for (unsigned int i = lane; i < side.vectors_per_unit; i += side.lanes) {
    if (kComputes && i != lane) held = loadElements<Source, kElements, kApart>(from + i * kFrom);
    if constexpr (kMode == kCopied) {
      storePacked<kFrom>(cache + i * kTo, held);
    } else {
      float values[kElements];
      decode<Source>(held, values);
      if constexpr (kMode == kScaled) {
        if (!Quotients(scale).of(values)) {
          storeOneByOne<Source, Format, kElements>(from + i * kFrom, cache + i * kTo, scale);
          continue;
        }
      }
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        if constexpr (kComputes) values[j] = multiply(values[j], scale);
        if constexpr (kMode == kScaledElements) {
          const long long element = static_cast<long long>(first + i) * kElements + j;
          const char* const one = scales + element * side.group_stride;
          values[j] = divide(values[j], *reinterpret_cast<const float*>(one));
        }
      }
      storePacked<kTo>(cache + i * kTo, encode<Format>(values));
    }
  }
}

// Grid: two rows of blocks, for K and for V. In each, a thread for each vector of kElements
// elements of a row; where scales are computed, up to 32 threads for each unit, which go through
// its vectors together.
//
// kAhead is as in paged_caching.cuh: such a kernel lets the next one start at once, and prefetches.
template <typename T, typename Slot, typename KFormat, int kKMode, int kKElements, typename VFormat,
          int kVMode, int kVElements, bool kAhead>
__global__ void __launch_bounds__(kMostThreads, 1024 / kMostThreads)
    pagedStoring(const __grid_constant__ PagedStoringParameters p) {
  if (kAhead) letNextKernelStart();
  const PagedStoringCall& call = p.call;
  if (blockIdx.y == 0) {
    storeRows<T, Slot, FormatOf<KFormat>, kKMode, kKElements, kAhead>(p, p.k, call.k, call.k_cache,
                                                                      call.k_scale, true);
  } else {
    storeRows<T, Slot, FormatOf<VFormat>, kVMode, kVElements, kAhead>(p, p.v, call.v, call.v_cache,
                                                                      call.v_scale, false);
  }
}

}  // namespace pagedcache
