// SPDX-License-Identifier: Apache-2.0
//
// Storage formats: from float32 to what is stored, and back. pagedcache/cache/formats.py is the
// specification, to the bit.

#pragma once

#include "common.cuh"

// Compute capability 8.9 has these instructions, but NVRTC knows that since CUDA 12.1.
#if defined(__CUDA_ARCH__) && !defined(PAGEDCACHE_SOFTWARE)
#if __CUDA_ARCH__ >= 900 || \
    (__CUDA_ARCH__ == 890 && __CUDACC_VER_MAJOR__ * 100 + __CUDACC_VER_MINOR__ >= 1201)
#define PAGEDCACHE_FLOAT8_INSTRUCTIONS
#endif
#endif

namespace pagedcache {

// Arithmetic that is rounded once, to nearest, and keeps subnormal numbers, whatever options the
// compiler was given. PTX says so for each instruction; a host compiler must be told not to
// contract.
#if defined(__CUDA_ARCH__)
__device__ __forceinline__ float asFloat(unsigned int bits) {
  float value;
  asm("mov.b32 %0, %1;" : "=f"(value) : "r"(bits));
  return value;
}
__device__ __forceinline__ unsigned int asBits(float value) {
  unsigned int bits;
  asm("mov.b32 %0, %1;" : "=r"(bits) : "f"(value));
  return bits;
}
__device__ __forceinline__ float add(float a, float b) {
  float sum;
  asm("add.rn.f32 %0, %1, %2;" : "=f"(sum) : "f"(a), "f"(b));
  return sum;
}
__device__ __forceinline__ float subtract(float a, float b) {
  float difference;
  asm("sub.rn.f32 %0, %1, %2;" : "=f"(difference) : "f"(a), "f"(b));
  return difference;
}
__device__ __forceinline__ float multiply(float a, float b) {
  float product;
  asm("mul.rn.f32 %0, %1, %2;" : "=f"(product) : "f"(a), "f"(b));
  return product;
}
__device__ __forceinline__ float divide(float a, float b) {
  float quotient;
  asm("div.rn.f32 %0, %1, %2;" : "=f"(quotient) : "f"(a), "f"(b));
  return quotient;
}
// These two may flush subnormal numbers, but take a minus sign for nothing, which PTX does not.
__device__ __forceinline__ float multiplyAdd(float a, float b, float c) {
  return __fmaf_rn(a, b, c);
}
__device__ __forceinline__ float multiplyQuickly(float a, float b) { return __fmul_rn(a, b); }
// divide(1, a), in fewer instructions.
__device__ __forceinline__ float reciprocalOf(float a) {
  float result;
  asm("rcp.rn.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
// The reciprocal of the root, within 2^-20 of it.
__device__ __forceinline__ float reciprocalRootNear(float a) {
  float result;
  asm("rsqrt.approx.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
// The larger one; if one is a NaN, the other.
__device__ __forceinline__ float larger(float a, float b) {
  float result;
  asm("max.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
// The smaller one, likewise.
__device__ __forceinline__ float smaller(float a, float b) {
  float result;
  asm("min.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}
__device__ __forceinline__ float magnitude(float a) {
  float result;
  asm("abs.f32 %0, %1;" : "=f"(result) : "f"(a));
  return result;
}
// To the nearest integer, halves away from zero; a NaN becomes 0. Saturates as an int does.
__device__ __forceinline__ int rounded(float a) {
  // Rounded toward zero, the sum never reaches an integer that the exact one does not.
  float moved;
  asm("add.rz.f32 %0, %1, %2;"
      : "=f"(moved)
      : "f"(a), "f"(asFloat((asBits(a) & 0x80000000u) | 0x3f000000u)));
  int whole;
  asm("cvt.rzi.s32.f32 %0, %1;" : "=r"(whole) : "f"(moved));
  return whole;
}
__device__ __forceinline__ float fromF16(unsigned int bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(static_cast<unsigned short>(bits)));
  return value;
}
__device__ __forceinline__ unsigned int toF16(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#else
__device__ __forceinline__ float asFloat(unsigned int bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
__device__ __forceinline__ unsigned int asBits(float value) {
  unsigned int bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}
__device__ __forceinline__ float add(float a, float b) { return a + b; }
__device__ __forceinline__ float subtract(float a, float b) { return a - b; }
__device__ __forceinline__ float multiply(float a, float b) { return a * b; }
__device__ __forceinline__ float divide(float a, float b) { return a / b; }
__device__ __forceinline__ float multiplyAdd(float a, float b, float c) {
  return __builtin_fmaf(a, b, c);
}
__device__ __forceinline__ float multiplyQuickly(float a, float b) { return a * b; }
__device__ __forceinline__ float reciprocalOf(float a) { return 1.0f / a; }
__device__ __forceinline__ float reciprocalRootNear(float a) { return 1.0f / __builtin_sqrtf(a); }
__device__ __forceinline__ float larger(float a, float b) { return b > a || a != a ? b : a; }
__device__ __forceinline__ float smaller(float a, float b) { return b < a || a != a ? b : a; }
__device__ __forceinline__ float magnitude(float a) { return asFloat(asBits(a) & 0x7fffffffu); }
__device__ __forceinline__ int rounded(float a) {
  if (a != a) return 0;
  if (magnitude(a) >= 8388608.0f) return a > 0 ? 0x7fffffff : -0x7fffffff - 1;
  const int whole = static_cast<int>(a);
  const float rest = a - static_cast<float>(whole);
  return whole + (rest >= 0.5f) - (rest <= -0.5f);
}
__device__ __forceinline__ float fromF16(unsigned int bits) {
  const unsigned int sign = (bits & 0x8000u) << 16, rest = bits & 0x7fffu;
  if (rest >= 0x7c00u) return asFloat(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
  // As a float32 with the same bits, the exponent is too small by 127 - 15.
  return asFloat(sign | asBits(asFloat(rest << 13) * 0x1p112f));
}
__device__ __forceinline__ unsigned int toF16(float value) {
  const unsigned int bits = asBits(value), sign = bits >> 16 & 0x8000u, rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return 0x7fffu;
  if (rest >= 0x477ff000u) return sign | 0x7c00u;
  // In a sum with 2^-1, the last bit of a subnormal float16 is the last bit of the float32.
  if (rest < 0x38800000u) return sign | (asBits(asFloat(rest) + 0.5f) - 0x3f000000u);
  return sign | (rest - 0x38000000u + 0xfffu + (rest >> 13 & 1u)) >> 13;
}
#endif

__device__ __forceinline__ bool isNan(float value) {
  return (asBits(value) & 0x7fffffffu) > 0x7f800000u;
}

// Divides by one number many times. The quotients are those of divide(), to the bit.
//
// An instruction that divides takes about thirty, and a thread divides up to 32 elements, so it
// would be the arithmetic that bounds a large write. With the reciprocal known, five are enough:
// `first` is off by half a unit in the last place and hardly more, so its remainder is exact, and
// the last step rounds correctly (Markstein, IBM J. Res. Dev. 34, 1990, theorem on correctly
// rounded division with a correctly rounded reciprocal). It needs numbers far from overflow.
// Otherwise a quotient comes out as a NaN, and all of them are divided again. Quotients that
// underflow on the way are of numbers so small that they become 0 in any format, with the right
// sign.
struct Quotients {
  float divisor;
  float reciprocal;  // to nearest
  float high, low;   // its leading bits, toward zero, and the rest
  bool usual;

  __device__ __forceinline__ explicit Quotients(float by) : Quotients(by, reciprocalOf(by)) {}
  __device__ __forceinline__ Quotients(float by, float to_nearest)
      : divisor(by), reciprocal(to_nearest) {
    usual = by >= 0x1p-40f && by <= 0x1p40f;
    // One less where it was rounded up, so that no product below is a zero of the other sign.
    high = asFloat(asBits(reciprocal) - (multiplyAdd(-reciprocal, by, 1.0f) < 0.0f));
    low = multiply(multiplyAdd(-high, by, 1.0f), reciprocal);
  }

  // Returns whether the quotients are right; if not, the values are lost.
  template <int kElements>
  __device__ __forceinline__ bool of(float (&values)[kElements]) const {
    bool right = usual;
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const float first = multiplyAdd(values[i], high, multiplyQuickly(values[i], low));
      const float beyond = multiplyAdd(first, divisor, -values[i]);
      values[i] = multiplyAdd(-beyond, reciprocal, first);
      right = right && values[i] == values[i];
    }
    return right;
  }
};

// Quotients by what the largest element of a row becomes in a format, by the same method, for
// numbers from 0 to infinity. Those below the smallest normal number may be off.
template <typename Format>
__device__ __forceinline__ float divideByMost(float value) {
  constexpr double kExact = 1.0 / Format::kMost;
  constexpr float kReciprocal = static_cast<float>(kExact);
  constexpr float kLow = static_cast<float>(kExact - kReciprocal);
  const float first = multiplyAdd(value, kReciprocal, multiplyQuickly(value, kLow));
  const float beyond = multiplyAdd(first, Format::kMost, -value);
  const float quotient = multiplyAdd(-beyond, kReciprocal, first);
  return isNan(quotient) ? value : quotient;
}

// Rounds float32 to `kMantissa` bits after the point, ties to even, for a format whose exponents
// are `kBias` less; the result is at most `kMost`, whose bits are those of a float32.
template <int kMantissa, int kBias, unsigned int kMost>
__device__ __forceinline__ unsigned int roundedFloat(float value) {
  constexpr int kDropped = 23 - kMantissa;
  const unsigned int bits = asBits(value), sign = bits >> 24 & 0x80u;
  unsigned int rest = bits & 0x7fffffffu;
  if (rest > 0x7f800000u) return 0x7fu;
  if (rest > kMost) rest = kMost;
  // In a sum with this power of two, the last bit of a number that is subnormal in the format is
  // the last bit of the float32.
  constexpr unsigned int kPower = (kBias + kDropped + 1) << 23;
  if (rest < (kBias + 1) << 23)
    return sign | (asBits(add(asFloat(rest), asFloat(kPower))) - kPower);
  rest += (1u << (kDropped - 1)) - 1 + (rest >> kDropped & 1u);
  return sign | ((rest >> kDropped) - (kBias << kMantissa));
}

// Two codes of 8 bits, which these instructions turn into two float16, as float32.
#if defined(PAGEDCACHE_FLOAT8_INSTRUCTIONS)
#define PAGEDCACHE_TWO_VALUES(instruction)                                            \
  unsigned int both;                                                                  \
  asm(instruction " %0, %1;" : "=r"(both) : "h"(static_cast<unsigned short>(codes))); \
  first = fromF16(both & 0xffffu);                                                    \
  second = fromF16(both >> 16)
#else
#define PAGEDCACHE_TWO_VALUES(instruction) \
  first = value(codes & 0xffu);            \
  second = value(codes >> 8 & 0xffu)
#endif

// What there is of each format: its bits, the magnitude that the largest element of a row becomes,
// two codes of two values, the first in the lower bits, and the value of a code.

struct E4M3 {
  static constexpr int kBits = 8;
  static constexpr float kMost = 448.0f;
  __device__ __forceinline__ static unsigned int two(float first, float second) {
#if defined(PAGEDCACHE_FLOAT8_INSTRUCTIONS)
    unsigned short codes;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
    return codes;
#else
    return roundedFloat<3, 120, 0x43e00000u>(first) | roundedFloat<3, 120, 0x43e00000u>(second)
                                                          << 8;
#endif
  }
  __device__ __forceinline__ static float value(unsigned int code) {
    const unsigned int rest = code & 0x7fu;
    if (rest == 0x7fu) return asFloat(0x7fffffffu);
    // As a float32 with the same bits, the exponent is too small by 127 - 7.
    const float found = multiply(asFloat(rest << 20), 0x1p120f);
    return asFloat(asBits(found) | (code & 0x80u) << 24);
  }
  __device__ __forceinline__ static void twoValues(unsigned int codes, float& first,
                                                   float& second) {
    PAGEDCACHE_TWO_VALUES("cvt.rn.f16x2.e4m3x2");
  }
};

struct E5M2 {
  static constexpr int kBits = 8;
  static constexpr float kMost = 57344.0f;
  __device__ __forceinline__ static unsigned int two(float first, float second) {
#if defined(PAGEDCACHE_FLOAT8_INSTRUCTIONS)
    unsigned short codes;
    asm("cvt.rn.satfinite.e5m2x2.f32 %0, %1, %2;" : "=h"(codes) : "f"(second), "f"(first));
    return codes;
#else
    return roundedFloat<2, 112, 0x47600000u>(first) | roundedFloat<2, 112, 0x47600000u>(second)
                                                          << 8;
#endif
  }
  // The upper half of a float16.
  __device__ __forceinline__ static float value(unsigned int code) { return fromF16(code << 8); }
  __device__ __forceinline__ static void twoValues(unsigned int codes, float& first,
                                                   float& second) {
    PAGEDCACHE_TWO_VALUES("cvt.rn.f16x2.e5m2x2");
  }
};

#undef PAGEDCACHE_TWO_VALUES

// Two integers, saturated and put below what `word` holds.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 750
#define PAGEDCACHE_PUSH(bits)                           \
  asm("cvt.pack.sat.s" #bits ".s32.b32 %0, %1, %2, %0;" \
      : "+r"(word)                                      \
      : "r"(rounded(second)), "r"(rounded(first)));     \
  return word
#else
#define PAGEDCACHE_PUSH(bits) \
  return word << 2 * bits | saturated<bits>(second) << bits | saturated<bits>(first)
template <int kBits>
__device__ __forceinline__ unsigned int saturated(float value) {
  constexpr int kMost = (1 << (kBits - 1)) - 1;
  const int whole = rounded(value);
  const int within = whole > kMost ? kMost : whole < -kMost - 1 ? -kMost - 1 : whole;
  return static_cast<unsigned int>(within) & ((1u << kBits) - 1);
}
#endif

struct I8 {
  static constexpr int kBits = 8;
  static constexpr float kMost = 127.0f;
  __device__ __forceinline__ static unsigned int push(unsigned int word, float first,
                                                      float second) {
    PAGEDCACHE_PUSH(8);
  }
  __device__ __forceinline__ static float value(unsigned int code) {
    return static_cast<float>(static_cast<int>(code << 24) >> 24);
  }
};

struct I4 {
  static constexpr int kBits = 4;
  static constexpr float kMost = 7.0f;
  __device__ __forceinline__ static unsigned int push(unsigned int word, float first,
                                                      float second) {
    PAGEDCACHE_PUSH(4);
  }
  __device__ __forceinline__ static float value(unsigned int code) {
    return static_cast<float>(static_cast<int>(code << 28) >> 28);
  }
};

#undef PAGEDCACHE_PUSH

// The types of K and V can be stored too. F16 and BF16 hold a NaN as all ones but the sign, as the
// processor's conversions make it.
template <typename T>
struct FloatFormat;

template <>
struct FloatFormat<F16> {
  static constexpr int kBits = 16;
  __device__ __forceinline__ static unsigned int two(float first, float second) {
    return toF16(first) | toF16(second) << 16;
  }
  __device__ __forceinline__ static float value(unsigned int code) { return fromF16(code); }
};

template <>
struct FloatFormat<BF16> {
  static constexpr int kBits = 16;
  __device__ __forceinline__ static unsigned int one(float value) {
    const unsigned int bits = asBits(value);
    return isNan(value) ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
  }
  __device__ __forceinline__ static unsigned int two(float first, float second) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800 && !defined(PAGEDCACHE_SOFTWARE)
    unsigned int both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(second), "f"(first));
    return both;
#else
    return one(first) | one(second) << 16;
#endif
  }
  __device__ __forceinline__ static float value(unsigned int code) { return asFloat(code << 16); }
};

template <>
struct FloatFormat<F32> {
  static constexpr int kBits = 32;
  __device__ __forceinline__ static unsigned int two(float first, float) {
    return isNan(first) ? 0x7fffffffu : asBits(first);
  }
  __device__ __forceinline__ static float value(unsigned int code) { return asFloat(code); }
};

template <typename T>
struct FormatOf : T {};
template <>
struct FormatOf<F16> : FloatFormat<F16> {};
template <>
struct FormatOf<BF16> : FloatFormat<BF16> {};
template <>
struct FormatOf<F32> : FloatFormat<F32> {};

template <typename Format>
constexpr bool hasTwoValues = false;
template <>
constexpr bool hasTwoValues<E4M3> = true;
template <>
constexpr bool hasTwoValues<E5M2> = true;
template <typename T>
constexpr bool hasTwoValues<FormatOf<T>> = hasTwoValues<T>;

template <typename Format>
constexpr bool isInteger = false;
template <>
constexpr bool isInteger<I8> = true;
template <>
constexpr bool isInteger<I4> = true;
template <typename T>
constexpr bool isInteger<FormatOf<T>> = isInteger<T>;

// Consecutive elements of a row as a thread holds them: kBytes of memory in words of 4.
template <int kBytes>
struct Packed {
  unsigned int words[(kBytes + 3) / 4];
};

template <int kBytes>
__device__ __forceinline__ Packed<kBytes> loadPacked(const char* at) {
  Packed<kBytes> packed;
  if constexpr (kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 four = reinterpret_cast<const uint4*>(at)[i];
      packed.words[4 * i] = four.x;
      packed.words[4 * i + 1] = four.y;
      packed.words[4 * i + 2] = four.z;
      packed.words[4 * i + 3] = four.w;
    }
  } else if constexpr (kBytes == 8) {
    const uint2 two = *reinterpret_cast<const uint2*>(at);
    packed.words[0] = two.x;
    packed.words[1] = two.y;
  } else if constexpr (kBytes == 4) {
    packed.words[0] = *reinterpret_cast<const unsigned int*>(at);
  } else if constexpr (kBytes == 2) {
    packed.words[0] = *reinterpret_cast<const unsigned short*>(at);
  } else {
    packed.words[0] = *reinterpret_cast<const unsigned char*>(at);
  }
  return packed;
}

template <int kBytes>
__device__ __forceinline__ void storePacked(char* at, const Packed<kBytes>& packed) {
  if constexpr (kBytes >= 16) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      reinterpret_cast<uint4*>(at)[i] = uint4{packed.words[4 * i], packed.words[4 * i + 1],
                                              packed.words[4 * i + 2], packed.words[4 * i + 3]};
    }
  } else if constexpr (kBytes == 8) {
    *reinterpret_cast<uint2*>(at) = uint2{packed.words[0], packed.words[1]};
  } else if constexpr (kBytes == 4) {
    *reinterpret_cast<unsigned int*>(at) = packed.words[0];
  } else if constexpr (kBytes == 2) {
    *reinterpret_cast<unsigned short*>(at) = static_cast<unsigned short>(packed.words[0]);
  } else {
    *reinterpret_cast<unsigned char*>(at) = static_cast<unsigned char>(packed.words[0]);
  }
}

template <typename Format, int kElements>
constexpr int kPackedBytes = Format::kBits * kElements / 8;

// With kApart, each of two elements has an access of its own.
template <typename Format, int kElements, bool kApart>
__device__ __forceinline__ Packed<kPackedBytes<Format, kElements>> loadElements(const char* at) {
  if constexpr (!kApart || kElements == 1) {
    return loadPacked<kPackedBytes<Format, kElements>>(at);
  } else {
    constexpr int kOne = Format::kBits / 8;
    const unsigned int first = loadPacked<kOne>(at).words[0];
    const unsigned int second = loadPacked<kOne>(at + kOne).words[0];
    Packed<kPackedBytes<Format, kElements>> both;
    if constexpr (kOne == 4) {
      both.words[0] = first;
      both.words[1] = second;
    } else {
      both.words[0] = first | second << 8 * kOne;
    }
    return both;
  }
}

template <typename Format, int kElements, bool kApart>
__device__ __forceinline__ void storeElements(
    char* at, const Packed<kPackedBytes<Format, kElements>>& packed) {
  if constexpr (!kApart || kElements == 1) {
    storePacked<kPackedBytes<Format, kElements>>(at, packed);
  } else {
    constexpr int kOne = Format::kBits / 8;
    unsigned int second;
    if constexpr (kOne == 4) {
      second = packed.words[1];
    } else {
      second = packed.words[0] >> 8 * kOne;
    }
    storePacked<kOne>(at, Packed<kOne>{{packed.words[0]}});
    storePacked<kOne>(at + kOne, Packed<kOne>{{second}});
  }
}

// Consecutive elements with accesses of kAccess elements each, or of all.
template <typename Format, int kElements, int kAccess>
__device__ __forceinline__ Packed<kPackedBytes<Format, kElements>> loadVector(const char* at) {
  if constexpr (kAccess >= kElements) {
    return loadPacked<kPackedBytes<Format, kElements>>(at);
  } else {
    constexpr int kOne = kPackedBytes<Format, kAccess>, kWords = (kOne + 3) / 4;
    Packed<kPackedBytes<Format, kElements>> all = {};
#pragma unroll
    for (int i = 0; i < kElements / kAccess; ++i) {
      const Packed<kOne> one = loadPacked<kOne>(at + i * kOne);
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        all.words[i * kOne / 4 + j] |= one.words[j] << i * kOne % 4 * 8;
      }
    }
    return all;
  }
}

template <typename Format, int kElements, int kAccess>
__device__ __forceinline__ void storeVector(char* at,
                                            const Packed<kPackedBytes<Format, kElements>>& packed) {
  if constexpr (kAccess >= kElements) {
    storePacked<kPackedBytes<Format, kElements>>(at, packed);
  } else {
    constexpr int kOne = kPackedBytes<Format, kAccess>, kWords = (kOne + 3) / 4;
#pragma unroll
    for (int i = 0; i < kElements / kAccess; ++i) {
      Packed<kOne> one;
#pragma unroll
      for (int j = 0; j < kWords; ++j) {
        one.words[j] = packed.words[i * kOne / 4 + j] >> i * kOne % 4 * 8;
      }
      storePacked<kOne>(at + i * kOne, one);
    }
  }
}

template <typename Format, int kElements>
__device__ __forceinline__ void decode(const Packed<kPackedBytes<Format, kElements>>& packed,
                                       float (&values)[kElements]) {
  constexpr int kBits = Format::kBits;
  static_assert(kElements == 1 || kElements % 2 == 0, "elements of 8 bits are decoded in pairs");
  if constexpr (hasTwoValues<Format> && kElements > 1) {
#pragma unroll
    for (int i = 0; i < kElements; i += 2) {
      Format::twoValues(packed.words[i * kBits / 32] >> i * kBits % 32 & 0xffffu, values[i],
                        values[i + 1]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      const unsigned int word = packed.words[i * kBits / 32] >> i * kBits % 32;
      values[i] = Format::value(kBits == 32 ? word : word & ((1u << kBits % 32) - 1));
    }
  }
}

// Puts the codes of two values below what `word` holds; of one value in a format of 32 bits.
template <typename Format>
__device__ __forceinline__ unsigned int pushed(unsigned int word, float first, float second) {
  if constexpr (isInteger<Format>) {
    return Format::push(word, first, second);
  } else if constexpr (Format::kBits < 16) {
    return word << 2 * Format::kBits | Format::two(first, second);
  } else {
    return Format::two(first, second);
  }
}

template <typename Format, int kElements>
__device__ __forceinline__ Packed<kPackedBytes<Format, kElements>> encode(
    const float (&values)[kElements]) {
  constexpr int kBits = Format::kBits, kStep = kBits == 32 ? 1 : 2;
  Packed<kPackedBytes<Format, kElements>> packed = {};
#pragma unroll
  for (int i = (kElements - 1) / kStep * kStep; i >= 0; i -= kStep) {
    const float second = kElements > 1 && kStep > 1 ? values[(i + 1) % kElements] : 0.0f;
    unsigned int& word = packed.words[i * kBits / 32];
    word = pushed<Format>(word, values[i], second);
  }
  return packed;
}

}  // namespace pagedcache
