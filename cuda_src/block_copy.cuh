// SPDX-License-Identifier: Apache-2.0
//
// Copies blocks of many arrays to other blocks, and fills blocks with zeros.

#include "common.cuh"

namespace pagedcache {

template <>
struct Vector<1> {
  using type = unsigned char;
};

// An axis within a block, of which there are steps of this many bytes.
struct BlockAxis {
  long long from;
  long long to;
  unsigned int length;
  unsigned int padding;
};

// One array, in vectors of its own width. A block of it is rows of neighbouring vectors, along axes
// of which the last is the innermost.
struct BlockArray {
  const char* from;
  char* to;
  long long from_block;
  long long to_block;
  unsigned int first_tile;  // the number of tiles in all arrays before this one
  unsigned int vectors;
  unsigned int row;  // vectors; as many as in a block if it is contiguous
  unsigned int width;
  BlockAxis outer;
  BlockAxis middle;
  BlockAxis inner;
};

constexpr int kLanes = kGroupThreads;
constexpr int kTile = 4;  // vectors of a lane

struct BlockCopyCall {
  const void* pairs;  // on the device; if null, those below
  long long count;
  long long in_target;  // blocks
  long long in_source;
  const BlockArray* arrays;
  Report* report;
  unsigned int num_arrays;
  unsigned int tiles;
  unsigned int tiles_per_part;
  char inline_pairs[3588];
};

struct BlockCopyParameters {
  BlockCopyCall call;
};

// A list of pairs in which those that depend on each other are neighbours, in the order in which
// they can be done if the source of the last is read first. All but the first of them are marked.
constexpr int kFollows = static_cast<int>(0x80000000);

enum Pairs {
  kOrdered,  // by the host, int32
  kApart,    // of arrays that share no memory
  kWithin,   // of one list of arrays, in any order
  kZeroed,   // not pairs, but blocks
};

// What the host is told of a block that does not exist. A target that an earlier pair has is
// -1 - target.
enum Told { kIsSource, kIsTarget, kIsFilled };
__device__ __forceinline__ long long told(long long block, Told as) {
  constexpr long long kMost = 1ll << 60;
  return (block < kMost ? block : kMost) << 2 | as;
}

// What a warp asks of all pairs. Its lanes look at neighbouring ones, and all learn the answer.
template <typename Index>
struct PairList {
  const Index* pairs;
  long long count, in_target, in_source;
  bool within;

  struct Pair {
    long long source, target;
  };
  __device__ __forceinline__ Pair pair(long long i) const {
    return {static_cast<long long>(pairs[2 * i]), static_cast<long long>(pairs[2 * i + 1])};
  }
  __device__ __forceinline__ bool padding(Pair p) const { return p.source < 0 || p.target < 0; }
  __device__ __forceinline__ bool inside(Pair p) const {
    return !padding(p) && p.source < in_source && p.target < in_target;
  }
  // Whether it changes nothing.
  __device__ __forceinline__ bool idle(Pair p) const { return within && p.source == p.target; }

  // Returns the first pair from `first` on for which a condition holds, or `count`.
  template <typename Condition>
  __device__ __forceinline__ long long find(long long first, Condition condition) const {
    for (long long i = first; i < count; i += kLanes) {
      const long long mine = i + threadIdx.x % kLanes;
      const bool found = mine < count && inside(pair(mine)) && condition(pair(mine));
      if (const unsigned int lanes = ballot(found)) return i + __ffs(static_cast<int>(lanes)) - 1;
    }
    return count;
  }
  // Of several pairs with one target, the first is done and no other.
  __device__ __forceinline__ long long first(long long target) const {
    return find(0, [=](Pair p) { return p.target == target; });
  }
  // The pair that overwrites a block.
  __device__ __forceinline__ long long writer(long long block) const {
    const long long found = first(block);
    return found != count && idle(pair(found)) ? count : found;
  }
  // The next pair from `first` on that reads a block and is done.
  __device__ __forceinline__ long long reader(long long block, long long from) const {
    for (;; ++from) {
      from = find(from, [&](Pair p) { return p.source == block && !idle(p); });
      if (from == count || first(pair(from).target) == from) return from;
    }
  }
};

// The pairs that depend on each other, those that read a block before the one that overwrites it.
// They are a tree, whose last pair is `root`, or a cycle with trees, which is cut before `root`.
template <typename Index>
struct Tree {
  const PairList<Index>& list;
  long long root;

  __device__ __forceinline__ typename PairList<Index>::Pair last() const { return list.pair(root); }
  template <typename Move>
  __device__ __forceinline__ void forAllBefore(Move move) const {
    long long node = root, next = 0;
    for (;;) {
      long long child = list.reader(list.pair(node).target, next);
      if (child == root) child = list.reader(list.pair(node).target, child + 1);
      if (child != list.count) {
        node = child;
        next = 0;
        continue;
      }
      if (node == root) return;
      move(list.pair(node));
      next = node + 1;
      node = list.writer(list.pair(node).source);
    }
  }
};

// A pair on which no other depends.
struct One {
  long long source, target;

  __device__ __forceinline__ const One& last() const { return *this; }
  template <typename Move>
  __device__ __forceinline__ void forAllBefore(Move) const {}
};

// Neighbours in a list that the host has put in order.
struct Run {
  const int* pairs;
  long long first, end;

  struct Pair {
    long long source, target;
  };
  __device__ __forceinline__ Pair pair(long long i) const {
    return {pairs[2 * i] & ~kFollows, pairs[2 * i + 1]};
  }
  __device__ __forceinline__ Pair last() const { return pair(end - 1); }
  template <typename Move>
  __device__ __forceinline__ void forAllBefore(Move move) const {
#pragma unroll 1
    for (long long i = first; i < end - 1; ++i) move(pair(i));
  }
};

// A lane's vectors of one tile, or one of them: where they are in a block.
template <int kWidth, bool kContiguous>
struct Tile {
  // Divisions for each of them would take too many registers.
  static constexpr int kHeld = kContiguous ? kTile : 1;
  using Value = typename Vector<kWidth>::type;
  long long from;
  long long to;
  int left;  // vectors in the array from here on

  __device__ __forceinline__ Tile(const BlockArray& array, unsigned int first) {
    const unsigned int index = first + threadIdx.x % kLanes;
    left = static_cast<int>(array.vectors - index);  // negative past the end
    if constexpr (kContiguous) {
      from = to = static_cast<long long>(index) * kWidth;
    } else {
      unsigned int rows = index / array.row;
      from = to = static_cast<long long>(index - rows * array.row) * kWidth;
      add(array.inner, rows);
      add(array.middle, rows);
      add(array.outer, rows);
    }
  }
  __device__ __forceinline__ void add(const BlockAxis& axis, unsigned int& rows) {
    const unsigned int rest = rows / axis.length;
    const long long at = rows - rest * axis.length;
    from += at * axis.from;
    to += at * axis.to;
    rows = rest;
  }
  __device__ __forceinline__ void load(Value (&values)[kHeld], const char* block) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * kLanes < left) {
        values[i] = *reinterpret_cast<const Value*>(block + from + i * kLanes * kWidth);
      }
    }
  }
  __device__ __forceinline__ void store(const Value (&values)[kHeld], char* block) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * kLanes < left) {
        *reinterpret_cast<Value*>(block + to + i * kLanes * kWidth) = values[i];
      }
    }
  }
};

template <int kWidth, bool kContiguous, typename Moves>
__device__ __forceinline__ void moveTile(const BlockArray& array, unsigned int number,
                                         const Moves& moves) {
  using Part = Tile<kWidth, kContiguous>;
#pragma unroll 1
  for (int i = 0; i < kTile; i += Part::kHeld) {
    const Part tile(array, (number * kTile + i) * kLanes);
    typename Part::Value held[Part::kHeld] = {};
    const auto last = moves.last();
    tile.load(held, array.from + last.source * array.from_block);
    moves.forAllBefore([&](auto pair) {
      typename Part::Value values[Part::kHeld] = {};
      tile.load(values, array.from + pair.source * array.from_block);
      tile.store(values, array.to + pair.target * array.to_block);
    });
    tile.store(held, array.to + last.target * array.to_block);
  }
}

template <int kWidth, bool kContiguous>
__device__ __forceinline__ void zeroTile(const BlockArray& array, unsigned int number,
                                         long long block) {
  using Part = Tile<kWidth, kContiguous>;
#pragma unroll 1
  for (int i = 0; i < kTile; i += Part::kHeld) {
    const typename Part::Value zeros[Part::kHeld] = {};
    Part(array, (number * kTile + i) * kLanes).store(zeros, array.to + block * array.to_block);
  }
}

// Calls `run.template run<width, whether blocks are contiguous>` for each tile of a part.
template <typename RunTile>
__device__ __forceinline__ void forTiles(const BlockCopyCall& call, unsigned int part,
                                         const RunTile& run) {
  // Warps take turns, so that a block of threads goes along memory.
  const unsigned int first = part * call.tiles_per_part;
  const unsigned int end =
      call.tiles_per_part < call.tiles - first ? first + call.tiles_per_part : call.tiles;
  unsigned int tile = first + threadIdx.x / kLanes;
  if (tile >= end) return;
  // The array that has this tile is the last that begins at or before it.
  unsigned int number = 0;
  for (unsigned int i = 1; i < call.num_arrays; i += kLanes) {
    const unsigned int mine = i + threadIdx.x % kLanes;
    number += __popc(ballot(mine < call.num_arrays && call.arrays[mine].first_tile <= tile));
  }
#pragma unroll 1
  for (; tile < end; tile += blockDim.x / kLanes) {
    while (number + 1 < call.num_arrays && call.arrays[number + 1].first_tile <= tile) ++number;
    const BlockArray& array = call.arrays[number];
    const unsigned int in_array = tile - array.first_tile;
    const bool contiguous = array.row == array.vectors;
    if (array.width == 16 && contiguous) {
      run.template run<16, true>(array, in_array);
    } else if (array.width == 16) {
      run.template run<16, false>(array, in_array);
    } else if (array.width == 8) {
      run.template run<8, false>(array, in_array);
    } else if (array.width == 4) {
      run.template run<4, false>(array, in_array);
    } else if (array.width == 2) {
      run.template run<2, false>(array, in_array);
    } else {
      run.template run<1, false>(array, in_array);
    }
  }
}

template <typename Moves>
struct RunMoves {
  const Moves& moves;
  template <int kWidth, bool kContiguous>
  __device__ __forceinline__ void run(const BlockArray& array, unsigned int tile) const {
    moveTile<kWidth, kContiguous>(array, tile, moves);
  }
};

struct RunZero {
  long long block;
  template <int kWidth, bool kContiguous>
  __device__ __forceinline__ void run(const BlockArray& array, unsigned int tile) const {
    zeroTile<kWidth, kContiguous>(array, tile, block);
  }
};

// Returns whether pair `i`, or all that depend on each other with it, is to be done by this warp.
// Of those of a tree that is the last, and of a cycle the first in the list.
template <typename Index>
__device__ __forceinline__ bool leads(const PairList<Index>& list, long long i) {
  long long node = i;
  for (long long steps = 0; steps < list.count; ++steps) {
    node = list.writer(list.pair(node).source);
    if (node == list.count) return steps == 0;
    if (node == i) return true;
    if (node < i) return false;
  }
  return false;  // it is beside a cycle, in which all come after it
}

// A block of threads for each part of each pair. All lanes of a warp stay together.
template <int kPairs, typename Index>
__global__ void __launch_bounds__(256, 4) blockCopy(const __grid_constant__ BlockCopyParameters p) {
  letNextKernelStart();
  const BlockCopyCall& call = p.call;
  // Neighbours copy the same part of different blocks, so that few pages of memory are in use.
  const unsigned int count = static_cast<unsigned int>(call.count);
  const unsigned int part = blockIdx.x / count, i = blockIdx.x - part * count;
  const Index* const pairs =
      static_cast<const Index*>(call.pairs != nullptr ? call.pairs : call.inline_pairs);
  waitForKernelAhead();
  if constexpr (kPairs == kZeroed) {
    const long long block = static_cast<long long>(pairs[i]);
    if (block >= 0 && block < call.in_target) {
      forTiles(call, part, RunZero{block});
    } else if (block >= 0 && part == 0 && threadIdx.x == 0) {
      report(call.report, i, told(block, kIsFilled));
    }
  } else if constexpr (kPairs == kOrdered) {
    if (pairs[2 * i] & kFollows) return;
    Run run{pairs, i, i + 1ll};
    while (run.end < call.count && pairs[2 * run.end] & kFollows) ++run.end;
    const auto pair = run.last();
    if (run.end == i + 1) {
      forTiles(call, part, RunMoves<One>{One{pair.source, pair.target}});
    } else {
      forTiles(call, part, RunMoves<Run>{run});
    }
  } else {
    const PairList<Index> list{pairs, call.count, call.in_target, call.in_source,
                               kPairs == kWithin};
    const auto pair = list.pair(i);
    if (list.padding(pair)) return;
    const bool again = list.inside(pair) && list.first(pair.target) != i;
    if (!list.inside(pair) || again) {
      if (part == 0 && threadIdx.x == 0) {
        const bool is_source = pair.source >= call.in_source;
        const long long outside =
            is_source ? told(pair.source, kIsSource) : told(pair.target, kIsTarget);
        report(call.report, i, again ? -1 - pair.target : outside);
      }
      return;
    }
    if constexpr (kPairs == kWithin) {
      if (list.idle(pair) || !leads(list, i)) return;
      if (list.reader(pair.target, 0) != call.count) {
        const Tree<Index> tree{list, i};
        forTiles(call, part, RunMoves<Tree<Index>>{tree});
        return;
      }
    }
    forTiles(call, part, RunMoves<One>{One{pair.source, pair.target}});
  }
}

}  // namespace pagedcache
