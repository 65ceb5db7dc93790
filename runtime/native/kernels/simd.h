// Vectors of the instruction set this file is compiled for, through GCC's and clang's vector extensions.
//
// Every kernels_*.cpp compiles this and rows.h once, with its own flags and in its own namespace DEPTHWIRE_ISA. Nothing
// here may use inline code that other files share (std::vector, std::sqrt): the linker keeps one copy of such a
// function, perhaps the one compiled for AVX-512, and an older CPU would run it.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace depthwire::DEPTHWIRE_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kQueriesAtOnce = 4;  // 32 registers
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kQueriesAtOnce = 2;  // 16 registers
#else
constexpr int kLanes = 4;
constexpr int kQueriesAtOnce = 4;
#endif

using F32 [[gnu::vector_size(4 * kLanes)]] = float;
using U32 [[gnu::vector_size(4 * kLanes)]] = uint32_t;
using U16 [[gnu::vector_size(2 * kLanes)]] = uint16_t;

struct f16 {
  uint16_t bits;
};
struct bf16 {
  uint16_t bits;
};

inline F32 splat(float value) { return value - F32{}; }

template <class To, class From>
inline To bits(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

template <class V>
inline V load_raw(const void* from) {
  V to;
  memcpy(&to, from, sizeof to);
  return to;
}

inline float sum_lanes(F32 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#elif defined(__AVX2__)
  __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  half = _mm_add_ps(half, _mm_movehl_ps(half, half));
  return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
#elif defined(__aarch64__)
  return vaddvq_f32(v);
#else
  return (v[0] + v[2]) + (v[1] + v[3]);
#endif
}

// fp16 where the instruction set converts it, else by hand.
inline F32 widen_f16(U16 half) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps(bits<__m256i>(half));
#elif defined(__AVX2__)
  return _mm256_cvtph_ps(bits<__m128i>(half));
#elif defined(__aarch64__)
  return vcvt_f32_f16(bits<float16x4_t>(half));
#else
  // The exponent is moved by a multiplication, which also makes subnormals right; infinities and NaN keep theirs.
  const U32 wide = __builtin_convertvector(half, U32);
  const F32 moved = bits<F32>((wide & 0x7fffu) << 13) * 0x1p112f;
  const U32 special = (U32)((wide & 0x7c00u) == 0x7c00u);
  const U32 magnitude = bits<U32>(moved) | (special & 0x7f800000u);
  return bits<F32>(magnitude | ((wide & 0x8000u) << 16));
#endif
}

inline U16 narrow_f16(F32 value) {
#if defined(__AVX512F__)
  return bits<U16>(_mm512_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__AVX2__)
  return bits<U16>(_mm256_cvtps_ph(value, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#elif defined(__aarch64__)
  return bits<U16>(vcvt_f16_f32(value));
#else
  const U32 raw = bits<U32>(value);
  const U32 magnitude = raw & 0x7fffffffu;
  const U32 normal = (magnitude + (((magnitude >> 13) & 1u) + (0xfffu - (112u << 23)))) >> 13;  // ties to even
  // Adding 1/2 makes the FPU round at the unit of fp16's subnormals, 2^-24, and leaves them in the low bits.
  const U32 subnormal = bits<U32>(bits<F32>(magnitude) + 0.5f) - 0x3f000000u;
  U32 half = magnitude < (113u << 23) ? subnormal : normal;
  half = magnitude >= (143u << 23) ? (U32{} + 0x7c00u) : half;
  half = magnitude > 0x7f800000u ? (U32{} + 0x7e00u) : half;
  return __builtin_convertvector(half | ((raw >> 16) & 0x8000u), U16);
#endif
}

inline F32 load(const float* from) { return load_raw<F32>(from); }
inline F32 load(const f16* from) { return widen_f16(load_raw<U16>(from)); }
inline F32 load(const bf16* from) { return bits<F32>(__builtin_convertvector(load_raw<U16>(from), U32) << 16); }

inline void store(float* to, F32 value) { memcpy(to, &value, sizeof value); }
inline void store(f16* to, F32 value) {
  const U16 half = narrow_f16(value);
  memcpy(to, &half, sizeof half);
}
inline void store(bf16* to, F32 value) {
  const U32 raw = bits<U32>(value);
  const U32 even = raw + (((raw >> 16) & 1u) + 0x7fffu);  // to nearest, ties to even
  const U32 nan = (raw & 0x7fffffffu) > 0x7f800000u ? (raw | 0x400000u) : even;
  const U16 half = __builtin_convertvector(nan >> 16, U16);
  memcpy(to, &half, sizeof half);
}

// The last, partial vector of a row: missing lanes read as zero and are not written.
template <class T>
inline F32 load_first(const T* from, int64_t count) {
  T padded[kLanes] = {};
  memcpy(padded, from, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}
template <class T>
inline void store_first(T* to, F32 value, int64_t count) {
  T padded[kLanes];
  store(padded, value);
  memcpy(to, padded, static_cast<size_t>(count) * sizeof(T));
}

// A value as it is after having been stored.
template <class T>
inline F32 rounded(F32 value) {
  if constexpr (sizeof(T) == sizeof(float)) return value;
  T stored[kLanes];
  store(stored, value);
  return load(stored);
}

// exp of values that are not positive; below -87 zero, NaN stays NaN. Relative error at most 2 units in the last place.
inline F32 exp_nonpositive(F32 x) {
  const F32 lowest = splat(-87.0f);
  const F32 clamped = x < lowest ? lowest : x;  // keeps NaN
  // n = round(x / ln 2): adding 1.5 * 2^23 leaves the integer in the low bits.
  const F32 shifted = clamped * 1.44269504f + 12582912.0f;
  const F32 n = shifted - 12582912.0f;
  const F32 r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  F32 p = r * 1.9875691500e-4f + 1.3981999507e-3f;                  // Cephes' polynomial for e^r
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const U32 power = (bits<U32>(shifted) + (127u - 0x4b400000u)) << 23;
  const F32 result = p * bits<F32>(power);
  return x < lowest ? F32{} : result;
}

}  // namespace
}  // namespace depthwire::DEPTHWIRE_ISA
