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
__device__ __forceinline__ float subtract(float a, float b) {
  return pagedcache::add(a, negative(b));  // a minus sign may flush
}
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
  inline bool name(float a, float b) { return a operator b; }
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

#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float sqrt(float a) {
  float root;
  asm("sqrt.rn.f32 %0, %1;" : "=f"(root) : "f"(a));
  return root;
}
#define PAGEDCACHE_NEAR(name) \
  __device__ __forceinline__ float name(float a) { return ::name##f(a); }
#else
inline float sqrt(float a) { return __builtin_sqrtf(a); }
#define PAGEDCACHE_NEAR(name) \
  inline float name(float a) { return static_cast<float>(__builtin_##name(double(a))); }
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
  return static_cast<float>(__builtin_pow(double(a), double(b)));
#endif
}

// What an element of a parameter is as a value: float32, an integer of 64 bits, or a bool.
__device__ __forceinline__ float valueOf(float stored) { return stored; }
__device__ __forceinline__ float valueOf(F16 stored) { return fromF16(stored.bits); }
__device__ __forceinline__ float valueOf(BF16 stored) {
  return FloatFormat<BF16>::value(stored.bits);
}
__device__ __forceinline__ Whole valueOf(long long stored) { return stored; }
__device__ __forceinline__ Whole valueOf(int stored) { return stored; }
__device__ __forceinline__ bool valueOf(bool stored) { return stored; }

// A parameter with axes. An index that leaves it reads nothing, and is told.
template <typename Stored, int kAxes>
struct Array {
  const Stored* data;
  Whole lengths[kAxes];
  Whole strides[kAxes];  // in elements

  template <typename... Indices>
  __device__ __forceinline__ auto at(bool& inside, Indices... indices) const {
    static_assert(sizeof...(Indices) == kAxes, "one index for each axis");
    const Whole each[] = {indices...};
    Whole offset = 0;
#pragma unroll
    for (int i = 0; i < kAxes; ++i) {
      inside = inside && each[i] >= 0 && each[i] < lengths[i];
      offset += each[i] * strides[i];
    }
    return inside ? valueOf(data[offset]) : decltype(valueOf(*data))();
  }
};

// The value of a row function, which all elements of a row share.
struct RowValue {
  float value;
  bool inside;
};

}  // namespace language
}  // namespace pagedcache
