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
  const unsigned int in_group = threadIdx.x % kGroupThreads;
  const unsigned int ours =
      lanes == kGroupThreads ? kWholeGroup : ((1u << lanes) - 1) << (in_group & ~(lanes - 1));
  for (unsigned int step = lanes / 2; step > 0; step /= 2) {
    value = larger(value, exchanged(value, step, ours));
  }
  return value;
}

// The elements of a thread. A vector is taken in parts of up to 16 elements, which are as far apart
// as the unit has vectors: so those of neighbouring threads are next to each other, and in formats
// of 8 and 4 bits whole 32-byte sectors are written.
template <typename Source, typename Format, int kElements>
struct Vectors {
  static constexpr int kPart = kElements < 16 ? kElements : 16;
  static constexpr int kParts = kElements / kPart;
  static constexpr int kFrom = kPackedBytes<Source, kPart>;
  static constexpr int kTo = kPackedBytes<Format, kPart>;
  // Two elements of int4 are a byte, but their sources may be at addresses of one element.
  static constexpr bool kApart = kTo == 1;

  Packed<kFrom> parts[kParts];

  __device__ __forceinline__ static void prefetchAll(const char* from, unsigned int vector,
                                                     unsigned int vectors) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      const unsigned int at = (i * vectors + vector) * kFrom;
      if (at % kLine < kFrom) prefetch(from + at);
    }
  }
  __device__ __forceinline__ void load(const char* from, unsigned int vector,
                                       unsigned int vectors) {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      parts[i] = loadElements<Source, kPart, kApart>(from + (i * vectors + vector) * kFrom);
    }
  }
  __device__ __forceinline__ void copy(char* to, unsigned int vector, unsigned int vectors) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      storePacked<kFrom>(to + (i * vectors + vector) * kFrom, parts[i]);
    }
  }
  __device__ __forceinline__ float largest() const {
    float most = 0.0f;
#pragma unroll
    for (const auto& part : parts) {
      float values[kPart];
      decode<Source>(part, values);
#pragma unroll
      for (const float value : values) most = larger(most, magnitude(value));
    }
    return most;
  }
  // Stores what `change` makes of the values of each part, which is also passed the part's number.
  template <typename Change>
  __device__ __forceinline__ void store(char* to, unsigned int vector, unsigned int vectors,
                                        bool valid, const Change& change) const {
#pragma unroll
    for (int i = 0; i < kParts; ++i) {
      float values[kPart];
      decode<Source>(parts[i], values);
      change(values, i * vectors + vector);
      const auto codes = encode<Format>(values);
      if (valid) storePacked<kTo>(to + (i * vectors + vector) * kTo, codes);
    }
  }
};

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

// The scale of a unit whose largest magnitude is `most`.
template <typename Format, bool kPower>
__device__ __forceinline__ float scaleOf(float most) {
  const float scale = divideByMost<Format>(most);
  if constexpr (!kPower) return larger(scale, 1e-6f);
  return asFloat((asBits(larger(scale, 1e-4f)) + 0x7fffffu) & 0x7f800000u);
}

template <typename T, typename Slot, typename Format, int kMode, int kElements, bool kAhead>
__device__ __forceinline__ void storeRows(const PagedStoringParameters& p, const RowsSide& side,
                                          const char* from, char* cache, char* scales,
                                          bool reports) {
  using Source = FormatOf<T>;
  using Held = Vectors<Source, Format, kElements>;
  constexpr bool kComputes = kMode == kComputed || kMode == kComputedPower;

  const Place at(p.grid, side);
  if (at.token >= p.call.tokens) return;
  // Unless scales are computed, a unit is a row.
  const unsigned int lane = kComputes ? at.in_row & (side.lanes - 1) : at.in_row;
  const unsigned int unit = kComputes ? at.in_row >> side.lane_bits : 0;
  const unsigned int vectors = kComputes ? side.vectors_per_unit : side.threads;
  const bool first_of_token = at.in_row == 0 && at.head == 0;
  const Slot* const slot_at = static_cast<const Slot*>(p.call.slot_mapping) + at.token;
  from += inToken(side.rows, at) +
          static_cast<long long>(unit * vectors) * kPackedBytes<Source, kElements>;
  scales += at.head * side.scales.head_stride;
  const bool has_vector = lane < vectors;
  if (kAhead) {
    if (first_of_token) prefetch(slot_at);
    if (has_vector) Held::prefetchAll(from, lane, vectors);
  }

  waitForKernelAhead();
  if (!kAhead) letNextKernelStart();
  // All loads are under way before the slot is needed, so only stores may depend on it.
  long long slot = *slot_at;
  Held held = {};
  if (has_vector) held.load(from, lane, vectors);
  float scale = 1.0f;
  if constexpr (kMode == kScaled) scale = *reinterpret_cast<const float*>(scales);
  // As unsigned, padding (any negative slot) is past the end too.
  const bool valid = static_cast<unsigned long long>(slot) < p.slots.count;
  const unsigned int to = valid ? static_cast<unsigned int>(slot) : 0;
  const unsigned int block = p.slots.block_size.divide(to);
  long long store_at = inSlot(side.cache, at.head, to, block) +
                       static_cast<long long>(unit * vectors) * kPackedBytes<Format, kElements>;
  keep(store_at);  // or it would be computed anew in each branch
  cache += store_at;
  if constexpr (kComputes) {
    float most = held.largest();
#pragma unroll 1
    for (unsigned int i = lane + side.lanes; i < vectors; i += side.lanes) {
      Held more;
      more.load(from, i, vectors);
      most = larger(most, more.largest());
    }
    scale = scaleOf<Format, kMode == kComputedPower>(largestOf(most, side.lanes));
    // The head's part is in `scales` already.
    long long scale_at = inSlot(side.scales, 0, to, block) + unit * side.group_stride;
    keep(scale_at);
    if (valid && lane == 0) *reinterpret_cast<float*>(scales + scale_at) = scale;
    const float factor = reciprocalOf(scale);
    const auto scaled = [=](float (&values)[Held::kPart], unsigned int) {
#pragma unroll
      for (float& value : values) value = multiply(value, factor);
    };
    if (has_vector) held.store(cache, lane, vectors, valid, scaled);
#pragma unroll 1
    for (unsigned int i = lane + side.lanes; i < vectors; i += side.lanes) {
      Held more;
      more.load(from, i, vectors);
      more.store(cache, i, vectors, valid, scaled);
    }
  } else if constexpr (kMode == kCopied) {
    if (valid) held.copy(cache, lane, vectors);
  } else if constexpr (kMode == kConverted) {
    held.store(cache, lane, vectors, valid, [](float (&)[Held::kPart], unsigned int) {});
  } else if constexpr (kMode == kScaledElements) {
    held.store(cache, lane, vectors, valid, [&](float (&values)[Held::kPart], unsigned int part) {
#pragma unroll
      for (int i = 0; i < Held::kPart; ++i) {
        const long long element = static_cast<long long>(part) * Held::kPart + i;
        const char* const one = scales + element * side.group_stride;
        values[i] = divide(values[i], *reinterpret_cast<const float*>(one));
      }
    });
  } else {
    const Quotients quotients(scale);
    bool right = true;
    held.store(cache, lane, vectors, valid, [&](float (&values)[Held::kPart], unsigned int) {
      right = quotients.of(values) && right;
    });
    if (valid && !right) {  // what was stored is replaced
#pragma unroll 1
      for (unsigned int part = lane; part < Held::kParts * vectors; part += vectors) {
        storeOneByOne<Source, Format, Held::kPart>(from + part * Held::kFrom,
                                                   cache + part * Held::kTo, scale);
      }
    }
  }
  keep(slot);  // compared anew, so that the report is not a branch before the stores
  if (reports && first_of_token && slot >= static_cast<long long>(p.slots.count)) {
    report(p.report, p.first_token + at.token, slot);
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
