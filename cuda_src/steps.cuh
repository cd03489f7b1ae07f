// SPDX-License-Identifier: Apache-2.0
//
// The steps of a pipeline, on rows that are held in registers. pagedcache/steps is the
// specification, to the bit.

#pragma once

#include "expressions.cuh"

namespace pagedcache {
namespace language {

constexpr unsigned int powerAtLeast(unsigned int value) {
  unsigned int power = 1;
  while (power < value) power *= 2;
  return power;
}

// What combines two values of a row, and what rows are padded with.
struct Sum {
  static constexpr unsigned int kPadding = 0;
  static constexpr bool kEitherWay = true;  // whether the order of the two does not matter
  __device__ __forceinline__ static float of(float a, float b) { return add(a, b); }
};
struct Largest {
  static constexpr unsigned int kPadding = 0x7fffffffu;
  static constexpr bool kEitherWay = false;
  __device__ __forceinline__ static float of(float a, float b) { return max(a, b); }
};
struct Smallest {
  static constexpr unsigned int kPadding = 0x7fffffffu;
  static constexpr bool kEitherWay = false;
  __device__ __forceinline__ static float of(float a, float b) { return min(a, b); }
};
struct Magnitude {  // of numbers that are not negative, or NaN
  static constexpr unsigned int kPadding = 0;
  static constexpr bool kEitherWay = true;
  __device__ __forceinline__ static float of(float a, float b) { return larger(a, b); }
};

// An element, as expressions see it.
template <typename Rows>
struct Place {
  static constexpr int kWidth = Rows::kWidth;

  const Rows& rows;
  float x;
  unsigned int in_vector;
  Whole dim, head, token, slot, block, offset;
  float s;  // the scale, in the code of a quantiser

  // The element of the row at another dimension; the row must be shared.
  __device__ __forceinline__ float at(bool& inside, Whole other) const {
    inside = inside && other >= 0 && other < Rows::kSize;
    return inside ? rows.shared[other] : 0.0f;
  }
};

// Rows of kHeads neighbouring heads of one token, each of kSize elements. kLanes neighbouring
// threads hold them in vectors of kWidth neighbouring elements, the first of all threads before the
// second of any. kWidth divides kSize.
template <int kSize_, int kLanes_, int kWidth_, int kHeads_>
struct Rows {
  static constexpr int kSize = kSize_, kLanes = kLanes_, kWidth = kWidth_, kHeads = kHeads_;
  static constexpr int kSpan = kLanes * kWidth;  // elements between two vectors of a thread
  static constexpr int kParts = (kSize + kSpan - 1) / kSpan;
  static constexpr int kElements = kParts * kWidth;  // of a row in a thread
  static constexpr bool kFull = kSize % kSpan == 0;

  float x[kHeads][kElements];
  bool inside[kHeads];  // whether no index has left what it is an index of
  unsigned int lane, head;
  Whole token, slot, block, offset;
  float* shared;  // room for one row

  __device__ __forceinline__ unsigned int dim(int i) const {
    return (i / kWidth * kLanes + lane) * kWidth + i % kWidth;
  }
  __device__ __forceinline__ bool has(int i) const { return kFull || dim(i) < kSize; }
  // All threads of a warp come to each of these together, those without a row too.
  __device__ __forceinline__ float from(float value, unsigned int step) const {
    return exchanged(value, step, kWholeGroup);
  }
  // The threads of a row wait for each other's accesses to `shared`.
  __device__ __forceinline__ void meet() const {
    if constexpr (kLanes > 1) pagedcache::meet();
  }
  __device__ __forceinline__ void share(const float (&values)[kElements]) {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      if (has(i)) shared[dim(i)] = values[i];
    }
    meet();
  }
  __device__ __forceinline__ Place<Rows> place(int h, int i, float s = 0.0f) const {
    return {*this,  x[h][i],  static_cast<unsigned int>(i % kWidth),
            dim(i), head + h, token,
            slot,   block,    offset,
            s};
  }

  // Combines neighbours first, whatever kWidth and kLanes are: (x0 + x1) + (x2 + x3) and so on, for
  // kGroup neighbouring elements each, padded to a power of two. All elements of a group get the
  // result. Elements that a row does not have must hold the padding.
  template <typename Combine, int kGroup>
  __device__ __forceinline__ void reduce(float (&v)[kElements]) const {
    // A row may be padded by elements that it does not have, but not a group inside it.
    constexpr int kWhole = kGroup == kSize ? powerAtLeast(kGroup) : kGroup;
    if constexpr ((kWhole & (kWhole - 1)) == 0) {
      constexpr int kIn = kWhole < kWidth ? kWhole : kWidth;
      constexpr int kTogether = kWhole <= kSpan ? 1 : kWhole / kSpan;  // parts of a group
#pragma unroll
      for (int step = 1; step < kIn; step *= 2) {
#pragma unroll
        for (int i = 0; i < kElements; i += 2 * step) v[i] = Combine::of(v[i], v[i + step]);
      }
#pragma unroll
      for (int step = 1; step < kLanes && step * kWidth < kWhole; step *= 2) {
#pragma unroll
        for (int i = 0; i < kElements; i += kWidth) {
          const float other = from(v[i], step);
          if (Combine::kEitherWay || !(lane & step)) {
            v[i] = Combine::of(v[i], other);
          } else {
            v[i] = Combine::of(other, v[i]);
          }
        }
      }
#pragma unroll
      for (int step = 1; step < kTogether; step *= 2) {
#pragma unroll
        for (int part = 0; part < kParts; part += 2 * step) {
          float& value = v[part * kWidth];
          const int next = part + step < kParts ? part + step : 0;
          const float other = next ? v[next * kWidth] : asFloat(Combine::kPadding);
          value = Combine::of(value, other);
        }
      }
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        v[i] = v[kIn < kWidth ? i / kIn * kIn : i / kWidth / kTogether * kTogether * kWidth];
      }
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        if (has(i)) shared[dim(i)] = v[i];
      }
      meet();
#pragma unroll 1
      for (unsigned int group = lane; group < kSize / kGroup; group += kLanes) {
        float* const at = shared + group * kGroup;
#pragma unroll 1
        for (int step = 1; step < kGroup; step *= 2) {
#pragma unroll 1
          for (int i = 0; i < kGroup; i += 2 * step) {
            const float other = i + step < kGroup ? at[i + step] : asFloat(Combine::kPadding);
            at[i] = Combine::of(at[i], other);
          }
        }
      }
      meet();
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        v[i] = has(i) ? shared[dim(i) / kGroup * kGroup] : asFloat(Combine::kPadding);
      }
      meet();
    }
  }

  // The sums of whole rows, as `reduce` finds them. What the heads wait for, they wait for
  // together.
  __device__ __forceinline__ void sum(float (&v)[kHeads][kElements], float (&sums)[kHeads]) const {
    if constexpr (kParts != 2 || kLanes == 1) {
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
        reduce<Sum, kSize>(v[h]);
        sums[h] = v[h][0];
      }
    } else {
      // Of two neighbouring threads, one goes on with the first part, and one with the second.
      const bool second = lane & 1;
#pragma unroll
      for (int h = 0; h < kHeads; ++h) {
#pragma unroll
        for (int step = 1; step < kWidth; step *= 2) {
#pragma unroll
          for (int i = 0; i < kElements; i += 2 * step) v[h][i] = add(v[h][i], v[h][i + step]);
        }
        const float mine = second ? v[h][kWidth] : v[h][0];
        sums[h] = add(mine, from(second ? v[h][0] : v[h][kWidth], 1));
      }
#pragma unroll
      for (int step = 2; step < kLanes; step *= 2) {
#pragma unroll
        for (float& sum : sums) sum = add(sum, from(sum, step));
      }
#pragma unroll
      for (float& sum : sums) sum = add(sum, from(sum, 1));
    }
  }

  // Whether `good` is true in all threads that hold a group, or a row.
  template <int kGroup>
  __device__ __forceinline__ void agree(bool (&good)[kElements]) const {
    float bad[kElements];
#pragma unroll
    for (int i = 0; i < kElements; ++i) bad[i] = good[i] || !has(i) ? 0.0f : 1.0f;
    reduce<Magnitude, kGroup>(bad);
#pragma unroll
    for (int i = 0; i < kElements; ++i) good[i] = bad[i] == 0.0f;
  }
  __device__ __forceinline__ void agree() {
#pragma unroll
    for (int h = 0; h < kHeads; ++h) {
      float bad = inside[h] ? 0.0f : 1.0f;
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) bad = larger(bad, from(bad, step));
      inside[h] = bad == 0.0f;
    }
  }
};

template <int kCount>
__device__ __forceinline__ float meanOf(float sum) {
  if constexpr ((kCount & (kCount - 1)) == 0) return multiply(sum, 1.0f / kCount);  // as exact
  return divide(sum, static_cast<float>(kCount));
}

// What a row function of an expression has found, for each element of a row in a thread.
template <typename Rows>
struct Found {
  float values[Rows::kElements];
  bool inside[Rows::kElements];
};

// Evaluates what each element brings to a row function, and combines it. `function` takes the
// number of an element, its place, and whether indices are inside. With kChecks, they may not be;
// with kShares, the expression has elements of other dimensions.
template <typename Combine, int kGroup, bool kMean, bool kChecks, bool kShares, typename Rows,
          typename Function>
__device__ __forceinline__ void evaluateRow(Rows& rows, int h, Found<Rows>& found,
                                            const Function& function) {
  if constexpr (kShares) rows.share(rows.x[h]);
#pragma unroll
  for (int i = 0; i < Rows::kElements; ++i) {
    found.inside[i] = true;
    found.values[i] = asFloat(Combine::kPadding);
    if (rows.has(i)) found.values[i] = function(i, rows.place(h, i), found.inside[i]);
  }
  if constexpr (kShares) rows.meet();
  rows.template reduce<Combine, kGroup>(found.values);
  if constexpr (kChecks) rows.template agree<kGroup>(found.inside);
  if constexpr (kMean) {
#pragma unroll
    for (float& value : found.values) value = meanOf<kGroup>(value);
  }
}

// Evaluates an expression for each element, into `to`.
template <bool kShares, typename Rows, typename Function>
__device__ __forceinline__ void evaluate(Rows& rows, int h, float (&to)[Rows::kElements],
                                         const Function& function) {
  if constexpr (kShares) rows.share(rows.x[h]);
#pragma unroll
  for (int i = 0; i < Rows::kElements; ++i) {
    if (rows.has(i)) {
      to[i] = function(i, rows.place(h, i), rows.inside[h]);
    } else {
      to[i] = 0.0f;
    }
  }
  if constexpr (kShares) rows.meet();
}

// Whether a number is 0, or so large that `Quotients` loses no bits of it.
__device__ __forceinline__ bool isUsual(float value) {
  return (asBits(value) << 1) - 1 >= (0x2b800000u << 1) - 1;  // 2^-40
}

// The slow path, in a loop: it is rare, and takes long to compile.
template <int kCount>
__device__ __forceinline__ void divideOneByOne(float (&values)[kCount], float by) {
  float kept[kCount];
#pragma unroll
  for (int i = 0; i < kCount; ++i) kept[i] = values[i];
#pragma unroll 1
  for (int i = 0; i < kCount; ++i) kept[i] = divide(kept[i], by);
#pragma unroll
  for (int i = 0; i < kCount; ++i) values[i] = kept[i];
}

// Quotients by one number, to the bit.
template <int kCount>
__device__ __forceinline__ void divideAll(float (&values)[kCount], float by) {
  const Quotients quotients(by);
  bool usual = quotients.usual;
  float most = 0.0f;
#pragma unroll
  for (const float value : values) {
    usual = usual && isUsual(value);
    most = larger(most, magnitude(value));
  }
  if (usual && most < 0x1p40f) {
    quotients.of(values);
  } else {
    divideOneByOne(values, by);
  }
}

// The root of a number and its reciprocal, both to nearest, in straight code, so that a thread can
// find several at once. Where `right` is false, they may be others.
struct Root {
  float root, reciprocal;
  bool right;

  __device__ __forceinline__ explicit Root(float a) {
    const float near = reciprocalRootNear(a);
    const float first = pagedcache::multiply(a, near);
    root = multiplyAdd(multiplyAdd(-first, first, a), pagedcache::multiply(near, 0.5f), first);
    // It is the nearest if its square is closer to `a` than those of the numbers half a unit in the
    // last place away: by the root times that unit, but for powers of two.
    const float unit = asFloat((asBits(root) & 0x7f800000u) - (23u << 23));
    const float beyond = multiplyAdd(-root, root, a), most = pagedcache::multiply(root, unit);
    right = a >= 0x1p-80f && a <= 0x1p80f && beyond <= most && beyond > -most;
    right = right && (asBits(root) & 0x7fffffu) != 0;
    // The second step rounds to nearest, unless all bits of the root are set (Markstein 1990).
    const float better = multiplyAdd(multiplyAdd(-root, near, 1.0f), near, near);
    reciprocal = multiplyAdd(multiplyAdd(-root, better, 1.0f), better, better);
    right = right && (~asBits(root) & 0x7fffffu) != 0;
  }
};

// x / sqrt(mean(x * x) + eps) * weight[dim], or with kOffset times the sum of both.
template <bool kOffset, typename Rows, typename Weight>
__device__ __forceinline__ void rmsNorm(Rows& rows, const Weight& weight, float eps,
                                        [[maybe_unused]] float offset) {
  float squares[Rows::kHeads][Rows::kElements], sums[Rows::kHeads], least[Rows::kHeads];
#pragma unroll
  for (int h = 0; h < Rows::kHeads; ++h) {
    least[h] = 1.0f;
#pragma unroll
    for (int i = 0; i < Rows::kElements; ++i) {
      squares[h][i] = multiply(rows.x[h][i], rows.x[h][i]);
      least[h] = smaller(least[h], squares[h][i]);
    }
  }
  rows.sum(squares, sums);
  float factors[Rows::kElements];
#pragma unroll
  for (int i = 0; i < Rows::kElements; ++i) {
    [[maybe_unused]] bool inside = true;
    factors[i] = rows.has(i) ? weight.template along<0u>(rows.place(0, i), inside) : 0.0f;
    if (kOffset) factors[i] = add(offset, factors[i]);
  }
  bool usual = eps >= 0.0f;
  float squared[Rows::kHeads], roots[Rows::kHeads], reciprocals[Rows::kHeads];
#pragma unroll
  for (int h = 0; h < Rows::kHeads; ++h) {
    squared[h] = add(meanOf<Rows::kSize>(sums[h]), eps);
    const Root found(squared[h]);
    roots[h] = found.root;
    reciprocals[h] = found.reciprocal;
    // If the root is usual, no element is a NaN or so large that its quotient is.
    usual = usual && found.right;
    if (least[h] < 0x1p-80f) {  // it may be 0
#pragma unroll
      for (const float value : rows.x[h]) usual = usual && isUsual(value);
    }
  }
  if (usual) {
#pragma unroll
    for (int h = 0; h < Rows::kHeads; ++h) Quotients(roots[h], reciprocals[h]).of(rows.x[h]);
  } else {
#pragma unroll
    for (int h = 0; h < Rows::kHeads; ++h) divideOneByOne(rows.x[h], sqrt(squared[h]));
  }
#pragma unroll
  for (int h = 0; h < Rows::kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < Rows::kElements; ++i) rows.x[h][i] = multiply(rows.x[h][i], factors[i]);
  }
}

__device__ __forceinline__ void turn(float& a, float& b, float cosine, float sine) {
  const float first = subtract(multiply(a, cosine), multiply(b, sine));
  b = add(multiply(b, cosine), multiply(a, sine));
  a = first;
}

// What a rotation needs of its table: cosines and sines of the pairs of a thread. The position is
// read before all steps, and the table too if a thread holds one row, so that no step waits for
// them. With more rows, registers are scarce, and the table is read when it is needed.
template <bool kHalves, int kFirst, typename Rows, typename Table>
struct Angles {
  static constexpr int kHalf = Table::kLength / 2, kSpan = Rows::kSpan, kWidth = Rows::kWidth;
  static constexpr bool kInThread = kHalves && kFirst % kSpan == 0 && kHalf % kSpan == 0;
  static constexpr bool kInVector =
      !kHalves && kWidth > 1 && kFirst % kWidth == 0 && 2 * kHalf % kWidth == 0;
  static constexpr int kCount = kInThread   ? kHalf / kSpan * kWidth
                                : kInVector ? Rows::kElements / 2
                                            : Rows::kElements;
  static constexpr bool kEarly = Rows::kHeads == 1;

  Table table;
  Whole position;
  bool inside;
  float cosines[kCount], sines[kCount];

  template <typename Positions>
  __device__ __forceinline__ Angles(const Rows& rows, const Table& of, const Positions& positions)
      : table(of) {
    inside = true;
    position = positions.template at<0u>(inside, rows.token);
    inside = position >= 0 && position < table.lengths[0];
    // Of a position that is not in the table, another is taken, and the row is not stored.
    if (!inside) position = 0;
    if constexpr (kEarly) load(rows);
  }
  __device__ __forceinline__ void load(const Rows& rows) {
    const auto* const row = table.data + position * table.strides[0];
    if constexpr (kInThread) {
#pragma unroll
      for (int i = 0; i < kCount; i += kWidth) {
        fetch<kWidth>(row, (i / kWidth * Rows::kLanes + rows.lane) * kWidth, i);
      }
    } else if constexpr (kInVector) {
#pragma unroll
      for (int i = 0; i < kCount; i += kWidth / 2) {
        const unsigned int first = rows.dim(2 * i) - kFirst;
        if (first < 2 * kHalf) fetch<kWidth / 2>(row, first / 2, i);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        const unsigned int at = rows.dim(i) - kFirst;
        if (at < 2 * kHalf) fetch<1>(row, kHalves ? at % kHalf : at / 2, i);
      }
    }
  }
  template <int kWide, typename Stored>
  __device__ __forceinline__ void fetch(const Stored* row, unsigned int pair, int to) {
    float some[kWide], others[kWide];
    table.template fetch<kWide>(row, pair, some);
    table.template fetch<kWide>(row, kHalf + pair, others);
#pragma unroll
    for (int i = 0; i < kWide; ++i) {
      cosines[to + i] = some[i];
      sines[to + i] = others[i];
    }
  }
};

template <bool kHalves, int kFirst, typename Rows, typename Table, typename Positions>
__device__ __forceinline__ Angles<kHalves, kFirst, Rows, Table> anglesOf(
    const Rows& rows, const Table& table, const Positions& positions) {
  return {rows, table, positions};
}

// Turns pairs of elements.
template <bool kHalves, int kFirst, typename Rows, typename Table>
__device__ __forceinline__ void rope(Rows& rows, Angles<kHalves, kFirst, Rows, Table>& angles) {
  using Of = Angles<kHalves, kFirst, Rows, Table>;
  if constexpr (!Of::kEarly) angles.load(rows);
#pragma unroll
  for (int h = 0; h < Rows::kHeads; ++h) {
    float (&x)[Rows::kElements] = rows.x[h];
    rows.inside[h] = rows.inside[h] && angles.inside;
    if constexpr (Of::kInThread) {
      constexpr int kStart = kFirst / Of::kSpan * Of::kWidth;
#pragma unroll
      for (int i = 0; i < Of::kCount; ++i) {
        turn(x[kStart + i], x[kStart + Of::kCount + i], angles.cosines[i], angles.sines[i]);
      }
    } else if constexpr (Of::kInVector) {
#pragma unroll
      for (int i = 0; i < Of::kCount; ++i) {
        if (rows.dim(2 * i) - kFirst >= 2 * Of::kHalf) continue;
        turn(x[2 * i], x[2 * i + 1], angles.cosines[i], angles.sines[i]);
      }
    } else {
      rows.share(x);
#pragma unroll
      for (int i = 0; i < Of::kCount; ++i) {
        const unsigned int dim = rows.dim(i), at = dim - kFirst;
        if (at >= 2 * Of::kHalf) continue;
        const bool second = kHalves ? at >= Of::kHalf : at % 2;
        constexpr unsigned int kAway = kHalves ? Of::kHalf : 1;
        const float other = rows.shared[second ? dim - kAway : dim + kAway];
        float a = second ? other : x[i], b = second ? x[i] : other;
        turn(a, b, angles.cosines[i], angles.sines[i]);
        x[i] = second ? b : a;
      }
      rows.meet();
    }
  }
}

constexpr float rootOfReciprocal(int power) {
  float root = 1.0f;
  for (; power > 2; power /= 4) root /= 2;
  return power == 2 ? root * 0x1.6a09e6p-1f : root;
}

// The orthonormal Walsh-Hadamard transform of each kGroup neighbouring elements, a power of two, by
// sums and differences of neighbours first.
template <int kGroup, typename Rows>
__device__ __forceinline__ void hadamard(Rows& rows) {
  constexpr int kSpan = Rows::kSpan, kWidth = Rows::kWidth;
#pragma unroll
  for (int h = 0; h < Rows::kHeads; ++h) {
    float (&x)[Rows::kElements] = rows.x[h];
#pragma unroll
    for (int step = 1; step < kGroup; step *= 2) {
      if (step >= kWidth && step < kSpan) {
        const unsigned int lanes = step / kWidth;
#pragma unroll
        for (int i = 0; i < Rows::kElements; ++i) {
          const float other = rows.from(x[i], lanes);
          x[i] = rows.lane & lanes ? subtract(other, x[i]) : add(x[i], other);
        }
        continue;
      }
      const int away = step < kWidth ? step : step / kSpan * kWidth;
#pragma unroll
      for (int i = 0; i < Rows::kElements; ++i) {
        if (i & away || i + away >= Rows::kElements) continue;
        const float sum = add(x[i], x[i + away]);
        x[i + away] = subtract(x[i], x[i + away]);
        x[i] = sum;
      }
    }
    // To nearest, that is a power of two and, if kGroup is no square, the root of 1 / 2.
    constexpr float factor = rootOfReciprocal(kGroup);
#pragma unroll
    for (float& value : x) value = multiply(value, factor);
  }
}

// Rounds to a format and back.
template <typename Format, typename Rows>
__device__ __forceinline__ void cast(Rows& rows) {
#pragma unroll
  for (int h = 0; h < Rows::kHeads; ++h) {
#pragma unroll
    for (int i = 0; i < Rows::kElements; i += Rows::kWidth) {
      float some[Rows::kWidth];
#pragma unroll
      for (int w = 0; w < Rows::kWidth; ++w) some[w] = rows.x[h][i + w];
      decode<Format>(encode<Format>(some), some);
#pragma unroll
      for (int w = 0; w < Rows::kWidth; ++w) rows.x[h][i + w] = some[w];
    }
  }
}

}  // namespace language
}  // namespace pagedcache
