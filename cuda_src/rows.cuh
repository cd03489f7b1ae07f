// SPDX-License-Identifier: Apache-2.0
//
// Rows of a paged cache: one token of one KV head each. What kernels on them share.

#pragma once

#include "formats.cuh"
#include "strides.cuh"

namespace pagedcache {

// What K and V each have.
struct RowsSide {
  TokenRows rows;    // by token
  CacheRows cache;   // the same rows by slot
  CacheRows scales;  // 0 where the slot does not matter
  long long group_stride;
  Divisor threads_per_row;
  Divisor per_group;       // parts of a gather in a group, or elements where each has its scale
  unsigned int threads;    // in a row
  unsigned int lanes;      // threads that share a unit, a power of two up to 32
  unsigned int lane_bits;  // its logarithm
  unsigned int vectors_per_unit;  // a unit is what has one scale; only where scales are computed
};

// How the threads of a grid are distributed to rows, for K and V alike.
struct RowsGrid {
  Divisor rows_per_tile;
  unsigned int tile_rows;
  unsigned int tile_shift;  // a tile is 2^tile_shift tokens
};

struct Slots {
  Divisor block_size;
  unsigned long long count;  // at most 2^31
  long long in_block;
};

// What happens to the rows of K or V between the token and the slot.
constexpr int kCopied = 0;          // nothing
constexpr int kConverted = 1;       // they are converted
constexpr int kScaled = 2;          // ... with a scale for each vector
constexpr int kScaledElements = 3;  // ... with a scale for each element
constexpr int kComputed = 4;        // ... with a scale for each unit, which is computed
constexpr int kComputedPower = 5;   // ... and is a power of two
constexpr int kQuantized = 6;       // codes and scales are what a step of the user's makes of them

// The place of a thread.
struct Place {
  unsigned int token;
  unsigned int head;
  unsigned int in_row;  // among the threads of the row

  // Threads go along the rows of one head of a tile's tokens, then to the next head, then to the
  // next tile. So where these rows are next to each other in the cache, threads access whole
  // 32-byte sectors, however long a row is.
  __device__ __forceinline__ Place(const RowsGrid& grid, const RowsSide& side) {
    const unsigned int index = blockIdx.x * blockDim.x + threadIdx.x;
    const unsigned int row = side.threads_per_row.divide(index);
    in_row = index - row * side.threads;
    const unsigned int tile = grid.rows_per_tile.divide(row);
    const unsigned int in_tile = row - tile * grid.tile_rows;
    head = in_tile >> grid.tile_shift;
    token = (tile << grid.tile_shift) + (in_tile & ((1u << grid.tile_shift) - 1));
  }
};

__device__ __forceinline__ long long inToken(const TokenRows& rows, const Place& at) {
  return at.token * rows.token_stride + at.head * rows.head_stride;
}

__device__ __forceinline__ long long inSlot(const CacheRows& rows, unsigned int head,
                                            unsigned int slot, unsigned int block) {
  return head * rows.head_stride + slot * rows.slot_stride + block * rows.block_step;
}

}  // namespace pagedcache
