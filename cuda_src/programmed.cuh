// SPDX-License-Identifier: Apache-2.0
//
// Writes and reads whose rows go through steps of the user's. What is in them is generated
// (pagedcache/operators/programs): a struct for each of q, K and V, the parameters, and a Program
// that names them.

#include "rows.cuh"
#include "steps.cuh"

namespace pagedcache {
namespace language {

// What q, K and V each have. Strides are in bytes.
struct ProgramSide {
  TokenRows rows;    // by token
  TokenRows out;     // by token, as they are after the steps
  CacheRows cache;   // by slot
  CacheRows scales;  // 0 where the slot does not matter
  long long group_stride;
  Divisor per_token;    // groups of heads that a thread holds
  unsigned int groups;  // the same
};

// Which index a report is of: of a slot if it is not negative, else of a step.
constexpr long long kOfQ = -1, kOfK = -2, kOfV = -3;

// The blocks that the rows of a side need. Blocks have 2^thread_bits threads.
template <typename Held, typename Parameters>
__device__ __forceinline__ unsigned int blocksOf(const Parameters& p, const ProgramSide& side) {
  const unsigned int tokens = static_cast<unsigned int>(p.call.tokens);
  const unsigned int threads = tokens * side.groups * Held::kLanes;
  return (threads + (1u << p.thread_bits) - 1) >> p.thread_bits;
}

// The place of a thread, and what it needs to know of its token.
template <typename Held, typename Program>
struct Token {
  using Slot = typename Program::Slot;
  using Parameters = typename Program::Parameters;

  Held rows;
  bool exists;
  bool valid;  // whether the slot is one of the cache
  unsigned int number, slot, block;
  const Slot* slot_at;

  __device__ __forceinline__ Token(const Parameters& p, const ProgramSide& side,
                                   unsigned int in_side, float* exchange) {
    const unsigned int index = (in_side << p.thread_bits) + threadIdx.x;
    const unsigned int row = index / Held::kLanes;
    number = side.per_token.divide(row);
    rows.lane = index % Held::kLanes;
    rows.head = (row - number * side.groups) * Held::kHeads;
    rows.shared = exchange + threadIdx.x / Held::kLanes * (Held::kElements * Held::kLanes);
    // Threads past the last token do the same as some of that token's, but store nothing, since
    // all threads of a warp meet in the steps.
    const unsigned int tokens = static_cast<unsigned int>(p.call.tokens);
    exists = number < tokens;
    if (!exists) number = tokens - 1;
    rows.token = p.first_token + number;
    slot_at = static_cast<const Slot*>(p.call.slot_mapping) + number;
  }
  __device__ __forceinline__ void read(const Slots& slots) {
    rows.slot = *slot_at;
    // As unsigned, padding (any negative slot) is past the end too.
    valid = static_cast<unsigned long long>(rows.slot) < slots.count;
    slot = valid ? static_cast<unsigned int>(rows.slot) : 0;
    block = slots.block_size.divide(slot);
    const Whole size = slots.in_block;
    rows.block = valid ? block : floor_divide(rows.slot, size);
    rows.offset = rows.slot - rows.block * size;
#pragma unroll
    for (int h = 0; h < Held::kHeads; ++h) rows.inside[h] = true;
    valid = valid && exists;
  }
  // A row that was padding is nobody's, so what its steps met is not reported.
  __device__ __forceinline__ void tell(const Parameters& p, long long of, bool slots) const {
    if (rows.lane != 0 || !exists) return;
    if (slots && rows.head == 0 && rows.slot >= static_cast<long long>(p.slots.count)) {
      report(p.report, rows.token, rows.slot);
    }
#pragma unroll
    for (int h = 0; h < Held::kHeads; ++h) {
      if (!rows.inside[h] && valid) report(p.report, rows.token, of);
    }
  }
};

// The elements of a thread as they are in memory.
template <typename Held, typename Format, int kAccess>
struct Raw {
  static constexpr int kBytes = kPackedBytes<Format, Held::kWidth>;
  Packed<kBytes> parts[Held::kHeads][Held::kParts];

  __device__ __forceinline__ static unsigned int at(const Held& rows, int part) {
    return (part * Held::kLanes + rows.lane) * kBytes;
  }
  __device__ __forceinline__ static void prefetchAll(const Held& rows, const char* from,
                                                     long long head_stride) {
#pragma unroll
    for (int h = 0; h < Held::kHeads; ++h) {
#pragma unroll
      for (int part = 0; part < Held::kParts; ++part) {
        const unsigned int place = at(rows, part);
        if (place % kLine < kBytes && rows.has(part * Held::kWidth)) {
          prefetch(from + h * head_stride + place);
        }
      }
    }
  }
  __device__ __forceinline__ void load(const Held& rows, const char* from, long long head_stride) {
#pragma unroll
    for (int h = 0; h < Held::kHeads; ++h) {
#pragma unroll
      for (int part = 0; part < Held::kParts; ++part) {
        parts[h][part] = {};
        if (rows.has(part * Held::kWidth)) {
          parts[h][part] =
              loadVector<Format, Held::kWidth, kAccess>(from + h * head_stride + at(rows, part));
        }
      }
    }
  }
  __device__ __forceinline__ void decodeInto(Held& rows) const {
#pragma unroll
    for (int h = 0; h < Held::kHeads; ++h) {
#pragma unroll
      for (int part = 0; part < Held::kParts; ++part) {
        float values[Held::kWidth];
        decode<Format>(parts[h][part], values);
#pragma unroll
        for (int w = 0; w < Held::kWidth; ++w) rows.x[h][part * Held::kWidth + w] = values[w];
      }
    }
  }
  __device__ __forceinline__ void encodeFrom(const float (&values)[Held::kElements], int h) {
#pragma unroll
    for (int part = 0; part < Held::kParts; ++part) {
      float some[Held::kWidth];
#pragma unroll
      for (int w = 0; w < Held::kWidth; ++w) some[w] = values[part * Held::kWidth + w];
      parts[h][part] = encode<Format>(some);
    }
  }
  __device__ __forceinline__ void store(const Held& rows, int h, char* to) const {
#pragma unroll
    for (int part = 0; part < Held::kParts; ++part) {
      if (rows.has(part * Held::kWidth)) {
        storeVector<Format, Held::kWidth, kAccess>(to + at(rows, part), parts[h][part]);
      }
    }
  }
};

// Stores the scales of the groups of one row: its thread with the first element does.
template <int kGroup, typename Held>
__device__ __forceinline__ void storeScales(const Held& rows, const float (&found)[Held::kElements],
                                            char* to, long long group_stride) {
#pragma unroll
  for (int i = 0; i < Held::kElements; ++i) {
    const unsigned int dim = rows.dim(i);
    if (rows.has(i) && dim % kGroup == 0) {
      // With one NaN, as in formats.
      *reinterpret_cast<unsigned int*>(to + dim / kGroup * group_stride) =
          FloatFormat<F32>::two(found[i], 0.0f);
    }
  }
}

// Reads the scale of each element; one for all if kGroup is that of the row.
template <int kGroup, typename Held>
__device__ __forceinline__ void loadScales(const Held& rows, float (&found)[Held::kElements],
                                           const char* from, long long group_stride) {
#pragma unroll
  for (int i = 0; i < Held::kElements; ++i) {
    const unsigned int group = rows.has(i) ? rows.dim(i) / kGroup : 0;
    found[i] = *reinterpret_cast<const float*>(from + group * group_stride);
  }
}

// Writes rows of q, K or V through the steps of Side.
template <typename Program, typename Side, typename Held, bool kAhead>
__device__ __forceinline__ void writeRows(const typename Program::Parameters& p,
                                          const ProgramSide& side, const char* from,
                                          [[maybe_unused]] char* out, [[maybe_unused]] char* cache,
                                          [[maybe_unused]] char* scales, unsigned int in_side,
                                          float* exchange) {
  using Source = Raw<Held, typename Side::Source, Side::kAccess>;
  constexpr int kMode = Side::kMode;
  Token<Held, Program> at(p, side, in_side, exchange);
  Held& rows = at.rows;
  from += at.number * side.rows.token_stride + rows.head * side.rows.head_stride;
  if (kAhead) {
    if (rows.lane == 0) prefetch(at.slot_at);
    Source::prefetchAll(rows, from, side.rows.head_stride);
  }

  waitForKernelAhead();
  if (!kAhead) letNextKernelStart();
  at.read(p.slots);
  Source source;
  source.load(rows, from, side.rows.head_stride);
  source.decodeInto(rows);
  const typename Program::Values values(p);
  Side::apply(rows, values);
  if constexpr (Side::kChecks) rows.agree();
#pragma unroll
  for (int h = 0; h < Held::kHeads; ++h) {
    [[maybe_unused]] float codes[Held::kElements], found[Held::kElements];
    if constexpr (kMode == kQuantized) {
      Side::quantize(rows, values, h, codes, found);
      if constexpr (Side::kCodesCheck) rows.agree();
    }
    if constexpr (Side::kHasOut) {
      char* const to =
          out + at.number * side.out.token_stride + (rows.head + h) * side.out.head_stride;
      if constexpr (Side::kOutIsCopied) {
        if (at.exists && rows.inside[h]) source.store(rows, h, to);
      } else {
        Raw<Held, typename Side::Out, Side::kAccess> made;
        made.encodeFrom(rows.x[h], h);
        if (at.exists && rows.inside[h]) made.store(rows, h, to);
      }
    }
    if constexpr (Side::kIsStored) {
      char* const to = cache + inSlot(side.cache, rows.head + h, at.slot, at.block);
      [[maybe_unused]] char* const scales_at =
          scales + inSlot(side.scales, rows.head + h, at.slot, at.block);
      if constexpr (kMode == kCopied) {
        if (at.valid && rows.inside[h]) source.store(rows, h, to);
      } else {
        float (&x)[Held::kElements] = rows.x[h];
        if constexpr (kMode == kScaled) {
          divideAll(x, *reinterpret_cast<const float*>(scales_at));
        } else if constexpr (kMode == kScaledElements) {
          loadScales<1>(rows, found, scales_at, side.group_stride);
#pragma unroll
          for (int i = 0; i < Held::kElements; ++i) x[i] = divide(x[i], found[i]);
        } else if constexpr (kMode == kComputed) {
#pragma unroll
          for (int i = 0; i < Held::kElements; ++i) found[i] = magnitude(x[i]);
          rows.template reduce<Magnitude, Side::kGroup>(found);
#pragma unroll
          for (int i = 0; i < Held::kElements; ++i) {
            found[i] = larger(divideByMost<typename Side::Format>(found[i]), 1e-6f);
            x[i] = pagedcache::multiply(x[i], reciprocalOf(found[i]));
          }
        }
        Raw<Held, typename Side::Format, Side::kCacheAccess> made;
        if constexpr (kMode == kQuantized) {
          made.encodeFrom(codes, h);
        } else {
          made.encodeFrom(x, h);
        }
        if (at.valid && rows.inside[h]) {
          made.store(rows, h, to);
          if constexpr (kMode == kComputed || kMode == kQuantized) {
            storeScales<Side::kGroup>(rows, found, scales_at, side.group_stride);
          }
        }
      }
    }
  }
  at.tell(p, Side::kOf, Side::kOf == kOfK);
}

// Warps have to wait for memory, so many of them must fit; how many blocks on a multiprocessor.
template <typename Program, int kHeads>
constexpr int kBlocks = Program::kMostElements * kHeads <= 32 ? 768 / Program::kMostInBlock : 1;

// Grid: blocks for the rows of q, then of K, then of V. A thread holds a part of up to kHeads rows.
//
// kAhead is as in paged_caching.cuh: such a kernel lets the next one start at once, and prefetches.
template <typename Program, int kHeads, bool kAhead>
__global__ void __launch_bounds__(Program::kMostInBlock, (kBlocks<Program, kHeads>))
    programmedWrite(const __grid_constant__ typename Program::Parameters p) {
  if (kAhead) letNextKernelStart();
  __shared__ float exchange[Program::kMostInBlock * Program::kMostElements];
  const auto& call = p.call;
  unsigned int block = blockIdx.x;
  if constexpr (Program::kHasQ) {
    using Side = typename Program::Q;
    using Held = typename Side::template Held<kHeads>;
    const unsigned int blocks = blocksOf<Held>(p, p.q);
    if (block < blocks) {
      writeRows<Program, Side, Held, kAhead>(p, p.q, call.q, call.q_out, nullptr, nullptr, block,
                                             exchange);
      return;
    }
    block -= blocks;
  }
  using K = typename Program::K;
  using HeldK = typename K::template Held<kHeads>;
  const unsigned int blocks = blocksOf<HeldK>(p, p.k);
  if (block < blocks) {
    writeRows<Program, K, HeldK, kAhead>(p, p.k, call.k, call.k_out, call.k_cache, call.k_scale,
                                         block, exchange);
    return;
  }
  using V = typename Program::V;
  using HeldV = typename V::template Held<kHeads>;
  writeRows<Program, V, HeldV, kAhead>(p, p.v, call.v, call.v_out, call.v_cache, call.v_scale,
                                       block - blocks, exchange);
}

// Reads rows of K or V back through the steps of Side.
template <typename Program, typename Side, typename Held, bool kAhead>
__device__ __forceinline__ void readRows(const typename Program::Parameters& p,
                                         const ProgramSide& side, const char* cache, char* out,
                                         [[maybe_unused]] const char* scales, unsigned int in_side,
                                         float* exchange) {
  Token<Held, Program> at(p, side, in_side, exchange);
  Held& rows = at.rows;
  if (kAhead && rows.lane == 0) prefetch(at.slot_at);

  waitForKernelAhead();
  if (!kAhead) letNextKernelStart();
  at.read(p.slots);
  // Of a slot that is not valid, the first is read, and nothing is stored.
  Raw<Held, typename Side::Format, Side::kCacheAccess> stored;
  stored.load(rows, cache + inSlot(side.cache, rows.head, at.slot, at.block),
              side.cache.head_stride);
  stored.decodeInto(rows);
  if constexpr (Side::kMode > kConverted) {
#pragma unroll
    for (int h = 0; h < Held::kHeads; ++h) {
      float found[Held::kElements];
      loadScales<Side::kGroup>(rows, found,
                               scales + inSlot(side.scales, rows.head + h, at.slot, at.block),
                               side.group_stride);
#pragma unroll
      for (int i = 0; i < Held::kElements; ++i) {
        rows.x[h][i] = pagedcache::multiply(rows.x[h][i], found[i]);
      }
    }
  }
  const typename Program::Values values(p);
  Side::apply(rows, values);
  if constexpr (Side::kChecks) rows.agree();
#pragma unroll
  for (int h = 0; h < Held::kHeads; ++h) {
    char* const to =
        out + at.number * side.out.token_stride + (rows.head + h) * side.out.head_stride;
    if constexpr (Side::kMode == kCopied) {
      if (at.valid) stored.store(rows, h, to);
    } else {
      Raw<Held, typename Side::Out, Side::kAccess> made;
      made.encodeFrom(rows.x[h], h);
      if (at.valid && rows.inside[h]) made.store(rows, h, to);
    }
  }
  at.tell(p, Side::kOf, Side::kOf == kOfK);
}

// Grid: blocks for the rows of K, then of V.
template <typename Program, int kHeads, bool kAhead>
__global__ void __launch_bounds__(Program::kMostInBlock, (kBlocks<Program, kHeads>))
    programmedRead(const __grid_constant__ typename Program::Parameters p) {
  if (kAhead) letNextKernelStart();
  __shared__ float exchange[Program::kMostInBlock * Program::kMostElements];
  const auto& call = p.call;
  using K = typename Program::K;
  using HeldK = typename K::template Held<kHeads>;
  const unsigned int blocks = blocksOf<HeldK>(p, p.k);
  if (blockIdx.x < blocks) {
    readRows<Program, K, HeldK, kAhead>(p, p.k, call.k_cache, call.k_out, call.k_scale, blockIdx.x,
                                        exchange);
  } else if constexpr (Program::kHasV) {
    using V = typename Program::V;
    using HeldV = typename V::template Held<kHeads>;
    readRows<Program, V, HeldV, kAhead>(p, p.v, call.v_cache, call.v_out, call.v_scale,
                                        blockIdx.x - blocks, exchange);
  }
}

}  // namespace language
}  // namespace pagedcache
