// SPDX-License-Identifier: Apache-2.0
//
// The operations of expressions, by their names in pagedcache/expressions/tree.py, whose NumPy
// functions in evaluate.py are the specification. Numbers are float32, integers have 64 bits and
// wrap around.

#pragma once

#include "formats.cuh"

namespace pagedcache {
namespace language {

using Whole = long long;

__device__ __forceinline__ Whole wrapped(unsigned long long bits) {
  return static_cast<Whole>(bits);
}
__device__ __forceinline__ unsigned long long bitsOf(Whole value) {
  return static_cast<unsigned long long>(value);
}

__device__ __forceinline__ float add(float a, float b) { return pagedcache::add(a, b); }
__device__ __forceinline__ Whole add(Whole a, Whole b) { return wrapped(bitsOf(a) + bitsOf(b)); }
__device__ __forceinline__ float negative(float a) { return asFloat(asBits(a) ^ 0x80000000u); }
__device__ __forceinline__ float subtract(float a, float b) { return pagedcache::subtract(a, b); }
__device__ __forceinline__ Whole subtract(Whole a, Whole b) {
  return wrapped(bitsOf(a) - bitsOf(b));
}
__device__ __forceinline__ float multiply(float a, float b) { return pagedcache::multiply(a, b); }
__device__ __forceinline__ Whole multiply(Whole a, Whole b) {
  return wrapped(bitsOf(a) * bitsOf(b));
}
__device__ __forceinline__ float divide(float a, float b) { return pagedcache::divide(a, b); }
__device__ __forceinline__ Whole negative(Whole a) { return wrapped(0 - bitsOf(a)); }
__device__ __forceinline__ float abs(float a) { return magnitude(a); }
__device__ __forceinline__ Whole abs(Whole a) { return a < 0 ? negative(a) : a; }

// Comparisons of floats keep subnormal numbers, whatever options the compiler was given.
#if defined(__CUDA_ARCH__)
#define PAGEDCACHE_COMPARED(name, instruction, operator)                             \
  __device__ __forceinline__ bool name(float a, float b) {                           \
    unsigned int is;                                                                 \
    asm("{\n.reg .pred p;\n" instruction ".f32 p, %1, %2;\nselp.b32 %0, 1, 0, p;\n}" \
        : "=r"(is)                                                                   \
        : "f"(a), "f"(b));                                                           \
    return is != 0;                                                                  \
  }
#else
#define PAGEDCACHE_COMPARED(name, instruction, operator) \
  __device__ __forceinline__ bool name(float a, float b) { return a operator b; }
#endif
PAGEDCACHE_COMPARED(less, "setp.lt", <)
PAGEDCACHE_COMPARED(less_equal, "setp.le", <=)
PAGEDCACHE_COMPARED(equal, "setp.eq", ==)
#undef PAGEDCACHE_COMPARED
__device__ __forceinline__ bool less(Whole a, Whole b) { return a < b; }
__device__ __forceinline__ bool less_equal(Whole a, Whole b) { return a <= b; }
__device__ __forceinline__ bool equal(Whole a, Whole b) { return a == b; }
template <typename Value>
__device__ __forceinline__ bool not_equal(Value a, Value b) {
  return !equal(a, b);
}
__device__ __forceinline__ bool isnan(float a) { return isNan(a); }
__device__ __forceinline__ bool isnan(Whole) { return false; }

// If one is a NaN, the other; of two zeros, the first.
template <typename Value>
__device__ __forceinline__ Value max(Value a, Value b) {
  return less(a, b) || isnan(a) ? b : a;
}
template <typename Value>
__device__ __forceinline__ Value min(Value a, Value b) {
  return less(b, a) || isnan(a) ? b : a;
}

// Rounding to whole numbers. From 2^23 on, all are whole. The sign of a zero stays.
__device__ __forceinline__ float signedAs(float value, float sign) {
  return asFloat((asBits(value) & 0x7fffffffu) | (asBits(sign) & 0x80000000u));
}
__device__ __forceinline__ bool isWhole(float a) { return !(magnitude(a) < 8388608.0f); }
__device__ __forceinline__ float trunc(float a) {
  return isWhole(a) ? a : signedAs(static_cast<float>(static_cast<int>(a)), a);
}
__device__ __forceinline__ float floor(float a) {
  const float whole = trunc(a);
  return less(a, whole) ? signedAs(pagedcache::add(whole, -1.0f), a) : whole;
}
// Toward zero; 0 for a NaN, and the nearest integer of 64 bits for what is too large.
__device__ __forceinline__ Whole truncated(float a) {
  if (magnitude(a) < 9223372036854775808.0f) return static_cast<Whole>(a);
  if (isNan(a)) return 0;
  return less(0.0f, a) ? 0x7fffffffffffffff : -0x7fffffffffffffff - 1;
}
__device__ __forceinline__ float ceil(float a) {
  const float whole = trunc(a);
  return less(whole, a) ? signedAs(pagedcache::add(whole, 1.0f), a) : whole;
}
__device__ __forceinline__ float rint(float a) {
  if (isWhole(a)) return a;
  // In a sum with 2^23, the last bit is that of the units.
  const float whole = pagedcache::add(pagedcache::add(magnitude(a), 8388608.0f), -8388608.0f);
  return signedAs(whole, a);
}
// Halves away from zero.
__device__ __forceinline__ float round(float a) {
  if (isWhole(a)) return a;
  const float whole = trunc(a);
  const float rest = subtract(a, whole);
  return magnitude(rest) >= 0.5f ? pagedcache::add(whole, signedAs(1.0f, a)) : whole;
}

__device__ __forceinline__ float floor_divide(float a, float b) { return floor(divide(a, b)); }
__device__ __forceinline__ float remainder(float a, float b) {
  return subtract(a, multiply(b, floor_divide(a, b)));
}
// Rounded down; 0 by 0.
__device__ __forceinline__ Whole floor_divide(Whole a, Whole b) {
  if (b == 0) return 0;
  if (b == -1) return negative(a);
  const Whole quotient = a / b;
  return quotient - (quotient * b != a && (a < 0) != (b < 0));
}
__device__ __forceinline__ Whole remainder(Whole a, Whole b) {
  return subtract(a, multiply(b, floor_divide(a, b)));
}

template <typename Value>
__device__ __forceinline__ Value where(bool test, Value yes, Value no) {
  return test ? yes : no;
}

// The least power of two at or above; 0 for 0, and a NaN for what is below.
__device__ __forceinline__ float pow2_ceil(float a) {
  if (less(0.0f, a)) return asFloat((asBits(a) + 0x7fffffu) & 0x7f800000u);
  return equal(a, 0.0f) ? 0.0f : asFloat(0x7fffffffu);
}

// Rounded to a type and back.
__device__ __forceinline__ float float16(float a) { return fromF16(toF16(a)); }
__device__ __forceinline__ float bfloat16(float a) {
  return FloatFormat<BF16>::value(FloatFormat<BF16>::two(a, 0.0f) & 0xffffu);
}

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float sqrt(float a) {
  float root;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(root) : "f"(a));
  return root;
}
#define PAGEDCACHE_NEAR(name) \
  __device__ __forceinline__ float name(float a) { return ::name##f(a); }
#else
#if !defined(PAGEDCACHE_IN_DOUBLE)
#define PAGEDCACHE_IN_DOUBLE(name) __builtin_##name
#endif
__device__ __forceinline__ float sqrt(float a) { return __builtin_sqrtf(a); }
#define PAGEDCACHE_NEAR(name)                                         \
  __device__ __forceinline__ float name(float a) {                    \
    return static_cast<float>(PAGEDCACHE_IN_DOUBLE(name)(double(a))); \
  }
#endif
PAGEDCACHE_NEAR(exp)
PAGEDCACHE_NEAR(exp2)
PAGEDCACHE_NEAR(log)
PAGEDCACHE_NEAR(log2)
PAGEDCACHE_NEAR(sin)
PAGEDCACHE_NEAR(cos)
PAGEDCACHE_NEAR(tanh)
#undef PAGEDCACHE_NEAR
// CUDA's powf may be off by more than 2 units in the last place.
__device__ __forceinline__ float power(float a, float b) {
#if defined(__CUDA_ARCH__)
  return static_cast<float>(::pow(static_cast<double>(a), static_cast<double>(b)));
#else
  return static_cast<float>(PAGEDCACHE_IN_DOUBLE(pow)(double(a), double(b)));
#endif
}

// A number among the parameters, which keeps subnormal numbers.
__device__ __forceinline__ float numberOf(double value) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("cvt.rn.f32.f64 %0, %1;" : "=f"(result) : "d"(value));
  return result;
#else
  return static_cast<float>(value);
#endif
}
__device__ __forceinline__ Whole numberOf(long long value) { return value; }

// What an element of a parameter is as a value: float32, an integer of 64 bits, or a bool.
__device__ __forceinline__ float valueOf(float stored) { return stored; }
__device__ __forceinline__ float valueOf(F16 stored) { return fromF16(stored.bits); }
__device__ __forceinline__ float valueOf(BF16 stored) {
  return FloatFormat<BF16>::value(stored.bits);
}
__device__ __forceinline__ Whole valueOf(long long stored) { return stored; }
__device__ __forceinline__ Whole valueOf(int stored) { return stored; }
__device__ __forceinline__ bool valueOf(bool stored) { return stored; }

// A parameter with axes. An index that leaves it reads nothing, and is told; axes whose bit is not
// in kChecked were checked by the host. Where the last axis has stride 1, aligned vectors of
// kAccess elements may be read at once; else, kAccess is 0. kLast is the length of the last axis,
// if that has to be known.
template <typename Stored, int kAxes, int kAccess = 0, int kLast = 0>
struct Array {
  static constexpr int kLength = kLast;
  using Value = decltype(valueOf(Stored()));

  const Stored* data;
  Whole lengths[kAxes];
  Whole strides[kAxes];  // in elements

  // Where an element is, or the first of an axis without an index.
  template <unsigned int kChecked, typename... Indices>
  __device__ __forceinline__ const Stored* find(bool& inside, Indices... indices) const {
    const Whole each[] = {indices..., 0};
    Whole offset = 0;
#pragma unroll
    for (int i = 0; i < static_cast<int>(sizeof...(Indices)); ++i) {
      if (kChecked >> i & 1) inside = inside && each[i] >= 0 && each[i] < lengths[i];
      offset += each[i] * strides[i];
    }
    return data + offset;
  }
  template <unsigned int kChecked, typename... Indices>
  __device__ __forceinline__ Value at(bool& inside, Indices... indices) const {
    static_assert(sizeof...(Indices) == kAxes, "one index for each axis");
    const Stored* const found = find<kChecked>(inside, indices...);
    return inside ? valueOf(*found) : Value();
  }
  // The element whose last index is that of the place in its row.
  template <unsigned int kChecked, typename Place, typename... Indices>
  __device__ __forceinline__ Value along(const Place& place, bool& inside,
                                         Indices... indices) const {
    static_assert(sizeof...(Indices) == kAxes - 1, "an index for each axis but the last");
    const Stored* const row = find<kChecked>(inside, indices...);
    if (!inside) return Value();
    if constexpr (kAccess == 0 || Place::kWidth == 1) {
      return valueOf(row[place.dim * strides[kAxes - 1]]);
    } else {
      // All elements of a vector read the whole vector, of which the compiler makes one access.
      float values[Place::kWidth];
      vectorOf(row + (place.dim - place.in_vector), values);
      return values[place.in_vector];
    }
  }
  // Elements along the last axis of what `find` found.
  template <int kWidth>
  __device__ __forceinline__ void fetch(const Stored* row, unsigned int first,
                                        float (&values)[kWidth]) const {
    if constexpr (kAccess == 0) {
#pragma unroll
      for (int i = 0; i < kWidth; ++i) values[i] = valueOf(row[(first + i) * strides[kAxes - 1]]);
    } else {
      vectorOf(row + first, values);
    }
  }
  // Elements from an address on, which are next to each other.
  template <int kWidth>
  __device__ __forceinline__ static void vectorOf(const Stored* from, float (&values)[kWidth]) {
    using Format = FormatOf<Stored>;
    decode<Format>(loadVector<Format, kWidth, kAccess>(reinterpret_cast<const char*>(from)),
                   values);
  }
};

// The value of a row function, which all elements of a row share.
struct RowValue {
  float value;
  bool inside;
};

}  // namespace language
}  // namespace pagedcache
