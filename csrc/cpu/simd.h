// SIMD vectors of LEAF_VECTOR_BYTES bytes by the compiler's vector extensions (GCC, Clang; any architecture), and the
// arithmetic on them that leaf_math.h asks for.
//
// This file is compiled once per instruction set (leaf_loops_*.cpp). So it includes no header whose inline functions
// the linker could merge across instruction sets, and everything in it has internal linkage.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../leaf_math.h"

namespace {

// Storage of the 16-bit types; arithmetic is in float.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class T, class Int>
struct SimdTypes {
  static constexpr int lanes = LEAF_VECTOR_BYTES / sizeof(T);
  typedef T V __attribute__((vector_size(LEAF_VECTOR_BYTES)));
  typedef Int I __attribute__((vector_size(LEAF_VECTOR_BYTES)));
  typedef uint16_t H __attribute__((vector_size(lanes * 2)));
};

template <class To, class From>
inline To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// e^r = 1 + r + r²·(c[0] + c[1]·r + ...) on |r| ≤ ln2/2: minimax in relative error, 2^-28 (float), 2^-57 (double).
template <class T>
struct ExpConstants;
template <>
struct ExpConstants<float> {
  using Int = int32_t;
  static constexpr int mantissa_bits = 23;
  static constexpr int bias = 127 + 26;
  static constexpr float down = 0x1p-26f;                 // e^x / down is normal wherever e^x is not 0
  static constexpr float round_magic = 0x1.8p23f + bias;  // adding it rounds to an integer n; the low bits are bias + n
  static constexpr float zero_at = -106.05152f;           // −bias·ln2: there n is −bias, so the exponent bits are 0
  static constexpr float log2e = 0x1.715476p+0f;
  static constexpr float ln2_hi = 0x1.63p-1f, ln2_lo = -2.1219444005469058e-4f;  // n·ln2_hi is exact
  static constexpr float c[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558f2p-5f, 0x1.1239e2p-7f, 0x1.6a2434p-10f};
};
template <>
struct ExpConstants<double> {
  using Int = int64_t;
  static constexpr int mantissa_bits = 52;
  static constexpr int bias = 1023 + 54;
  static constexpr double down = 0x1p-54;
  static constexpr double round_magic = 0x1.8p52 + bias;
  static constexpr double zero_at = -746.5195134630611;
  static constexpr double log2e = 0x1.71547652b82fep+0;
  static constexpr double ln2_hi = 0x1.62e42feep-1, ln2_lo = 1.90821492927058770002e-10;
  static constexpr double c[] = {0x1.000000000000ap-1,  0x1.55555555554fap-3,  0x1.555555555087cp-5,
                                 0x1.1111111127be5p-7,  0x1.6c16c1842a11dp-10, 0x1.a01a012a57b51p-13,
                                 0x1.a0199a0c677acp-16, 0x1.71df2552390c2p-19, 0x1.28ad72cc30daap-22,
                                 0x1.ad7f6f0799ee2p-26};
};
// For float16 and bfloat16: the error, 2^-22 + |x|·2^-28 (without FMA the second term is |x|·2^-24), is far below the
// precision of these types.
struct ApproximateExpConstants : ExpConstants<float> {
  static constexpr float ln2_hi = 0x1.62e43p-1f, ln2_lo = 0;
  static constexpr float c[] = {0x1.fffdfcp-2f, 0x1.5557bp-3f, 0x1.572a64p-5f, 0x1.10625p-7f};
};

#if LEAF_VECTOR_BYTES == 64
// x·2^n for integral n, rounded once. (The masks select all lanes: in the unmasked intrinsics GCC 12 warns of an
// uninitialised variable.)
inline SimdTypes<float, int32_t>::V scale(SimdTypes<float, int32_t>::V x, SimdTypes<float, int32_t>::V n) {
  return (SimdTypes<float, int32_t>::V)_mm512_maskz_scalef_ps(0xffff, (__m512)x, (__m512)n);
}
inline SimdTypes<double, int64_t>::V scale(SimdTypes<double, int64_t>::V x, SimdTypes<double, int64_t>::V n) {
  return (SimdTypes<double, int64_t>::V)_mm512_maskz_scalef_pd(0xff, (__m512d)x, (__m512d)n);
}
inline SimdTypes<float, int32_t>::V fma(__m512 a, __m512 b, __m512 c) { return _mm512_fmadd_ps(a, b, c); }
inline SimdTypes<double, int64_t>::V fma(__m512d a, __m512d b, __m512d c) { return _mm512_fmadd_pd(a, b, c); }
#elif LEAF_VECTOR_BYTES == 32
inline SimdTypes<float, int32_t>::V fma(__m256 a, __m256 b, __m256 c) { return _mm256_fmadd_ps(a, b, c); }
inline SimdTypes<double, int64_t>::V fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
#elif defined(__aarch64__)
inline SimdTypes<float, int32_t>::V fma(float32x4_t a, float32x4_t b, float32x4_t c) { return vfmaq_f32(c, a, b); }
inline SimdTypes<double, int64_t>::V fma(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmaq_f64(c, a, b); }
#endif

// The larger of the two, x if x is NaN. (By intrinsics: GCC 12 compiles the selection below to no max instruction.)
#if LEAF_VECTOR_BYTES == 32
inline SimdTypes<float, int32_t>::V larger(__m256 least, __m256 x) { return _mm256_max_ps(least, x); }
inline SimdTypes<double, int64_t>::V larger(__m256d least, __m256d x) { return _mm256_max_pd(least, x); }
#elif defined(__x86_64__) && LEAF_VECTOR_BYTES == 16
inline SimdTypes<float, int32_t>::V larger(__m128 least, __m128 x) { return _mm_max_ps(least, x); }
inline SimdTypes<double, int64_t>::V larger(__m128d least, __m128d x) { return _mm_max_pd(least, x); }
#elif defined(__aarch64__)
inline SimdTypes<float, int32_t>::V larger(float32x4_t least, float32x4_t x) { return vmaxq_f32(least, x); }
inline SimdTypes<double, int64_t>::V larger(float64x2_t least, float64x2_t x) { return vmaxq_f64(least, x); }
#else
template <class V>
inline V larger(V least, V x) {
  return x < least ? least : x;
}
#endif

template <class Scalar, class C = ExpConstants<Scalar>>
struct Simd : SimdTypes<Scalar, typename C::Int> {
  using Types = SimdTypes<Scalar, typename C::Int>;
  using Types::lanes;
  using V = typename Types::V;
  using I = typename Types::I;
  using T = V;  // leaf_math.h's name for it
  using Number = Scalar;

  static V broadcast(Scalar x) {
    V v;
    for (int k = 0; k < lanes; ++k) v[k] = x;
    return v;
  }
  // Tests the sign bit only, which takes no comparison. −0 counts as below 0, but at 0 a and b are the same.
  static V select(V z, V a, V b) { return bit_cast<I>(z) < 0 ? b : a; }
  // A number with the sign of a·b, which is all that `select` needs of it.
  static V with_sign_of_product(V a, V b) { return bit_cast<V>(bit_cast<I>(a) ^ bit_cast<I>(b)); }
  static V reciprocal(V x) { return 1 / x; }
  static V divide(V a, V b) { return a / b; }
  static V multiply_add(V a, V b, V c) {
#if LEAF_VECTOR_BYTES >= 32 || defined(__aarch64__)
    return fma(a, b, c);
#else
    return a * b + c;
#endif
  }

  static LEAF_FUNCTION V exp_neg_abs(V z) {
    const V x = bit_cast<V>(bit_cast<I>(z) | bit_cast<I>(broadcast(Scalar(-0.0))));
    // Where e^x is 0, it does not become so by underflow, which is slow on some processors: with LEAF's ReLU form
    // (p3 = 2^16) it is 0 in almost every lane.
#if LEAF_VECTOR_BYTES == 64
    const V t = x;  // scale's mask leaves these lanes out, so that nothing before it waits for the comparison
#else
    const V t = larger(broadcast(C::zero_at), x);  // at zero_at the factor 2^n / down is 0
#endif
    const V shifted = t * C::log2e + C::round_magic;
    const V n = shifted - C::round_magic;
    V r = t - n * C::ln2_hi;
    if constexpr (C::ln2_lo != 0) r -= n * C::ln2_lo;
    // Horner's scheme in r² over pairs of coefficients: a shorter dependency chain, which is what bounds the loops.
    constexpr int count = sizeof(C::c) / sizeof(Scalar);
    const V r2 = r * r;
    const auto pair = [&](int k) { return k + 1 < count ? C::c[k + 1] * r + C::c[k] : broadcast(C::c[k]); };
    constexpr int last = (count - 1) / 2 * 2;
    V q = pair(last);
#pragma GCC unroll 8
    for (int k = last - 2; k >= 0; k -= 2) q = q * r2 + pair(k);
    const V e = q * r2 + r + 1;
#if LEAF_VECTOR_BYTES == 64
    return x < C::zero_at ? V{} : scale(e, n);
#else
    // Two factors, so that a subnormal result is rounded once: 2^n / down, made from its exponent bits, and down.
    const V factor = bit_cast<V>(bit_cast<I>(shifted) << C::mantissa_bits);
    return e * factor * C::down;
#endif
  }
};

// load(p) and store(p, v): one vector from or to storage of type S, at any alignment.
inline Simd<float>::V load(const float* p) {
  Simd<float>::V v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline Simd<double>::V load(const double* p) {
  Simd<double>::V v;
  memcpy(&v, p, sizeof(v));
  return v;
}
inline void store(float* p, Simd<float>::V v) { memcpy(p, &v, sizeof(v)); }
inline void store(double* p, Simd<double>::V v) { memcpy(p, &v, sizeof(v)); }

using FloatV = Simd<float>::V;
using Bits32 = uint32_t __attribute__((vector_size(LEAF_VECTOR_BYTES)));
using Bits16 = Simd<float>::H;

// 16-bit storage to 32-bit integers and back. (GCC 12 does these __builtin_convertvector by halves of a vector.)
inline Bits32 load_bits(const uint16_t* p) {
#if LEAF_VECTOR_BYTES == 64
  return (Bits32)_mm512_maskz_cvtepu16_epi32(0xffff, _mm256_loadu_si256((const __m256i*)p));
#elif LEAF_VECTOR_BYTES == 32
  return (Bits32)_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p));
#else
  Bits16 h;
  memcpy(&h, p, sizeof(h));
  return __builtin_convertvector(h, Bits32);
#endif
}
inline void store_bits(uint16_t* p, Bits32 v) {
#if LEAF_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p, _mm512_maskz_cvtepi32_epi16(0xffff, (__m512i)v));
#elif LEAF_VECTOR_BYTES == 32
  _mm_storeu_si128((__m128i*)p,
                   _mm_packus_epi32(_mm256_castsi256_si128((__m256i)v), _mm256_extracti128_si256((__m256i)v, 1)));
#else
  const Bits16 h = __builtin_convertvector(v, Bits16);
  memcpy(p, &h, sizeof(h));
#endif
}

inline FloatV load(const BFloat16* p) {
#if LEAF_VECTOR_BYTES == 32
  // In each half of the vector, moves four 16-bit words to the upper halves of its four lanes: one shuffle, where
  // widening takes a shift as well.
  const __m256i words = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p));
  const __m256i to = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7,  //
                                      -1, -1, 8, 9, -1, -1, 10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
  return (FloatV)_mm256_shuffle_epi8(words, to);
#else
  return bit_cast<FloatV>(load_bits(&p->bits) << 16);
#endif
}
// Rounds to nearest, ties to even; of a NaN all bits are set.
inline void store(BFloat16* p, FloatV v) {
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 rounded = bits + ((bits << 15) >> 31) + 0x7fffu;
#if LEAF_VECTOR_BYTES == 64
  store_bits(&p->bits, (v == v ? rounded : ~Bits32{}) >> 16);  // the selection is the shift's mask
#else
  store_bits(&p->bits, (rounded | bit_cast<Bits32>(v != v)) >> 16);
#endif
}

// (This tests the width, since GCC does not define __F16C__ for a target that is set by a _Pragma.)
#if LEAF_VECTOR_BYTES >= 32
inline FloatV load(const Half* p) {
#if LEAF_VECTOR_BYTES == 64
  return (FloatV)_mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256((const __m256i*)p));
#else
  return (FloatV)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#endif
}
inline void store(Half* p, FloatV v) {
#if LEAF_VECTOR_BYTES == 64
  _mm256_storeu_si256((__m256i*)p,
                      _mm512_maskz_cvtps_ph(0xffff, (__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#else
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
#endif
}
#elif defined(__aarch64__)
inline FloatV load(const Half* p) { return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&p->bits))); }
inline void store(Half* p, FloatV v) { vst1_u16(&p->bits, vreinterpret_u16_f16(vcvt_f16_f32(v))); }
#else
inline FloatV load(const Half* p) {
  const Bits32 x = load_bits(&p->bits);
  const Bits32 magnitude = (x & 0x7fffu) << 13;
  const FloatV finite = bit_cast<FloatV>(magnitude) * 0x1p112f;  // corrects the exponent's bias, subnormals too
  const Bits32 special = magnitude | 0x7f800000u;                // infinite and NaN
  const Bits32 value = (x & 0x7c00u) == 0x7c00u ? special : bit_cast<Bits32>(finite);
  return bit_cast<FloatV>(value | ((x & 0x8000u) << 16));
}
inline void store(Half* p, FloatV v) {
  const Bits32 bits = bit_cast<Bits32>(v);
  const Bits32 magnitude = bits & 0x7fffffffu;
  const Bits32 normal = (magnitude - 0x38000000u + (((magnitude >> 13) & 1) + 0xfffu)) >> 13;
  // Adding 1/2 leaves a subnormal half's bits, rounded to nearest even, in the lowest bits.
  const Bits32 subnormal = bit_cast<Bits32>(bit_cast<FloatV>(magnitude) + 0.5f) - 0x3f000000u;
  const Bits32 special = magnitude > 0x7f800000u ? (Bits32{} + 0x7e00u) : (Bits32{} + 0x7c00u);
  Bits32 h = magnitude < 0x38800000u ? subnormal : normal;
  h = magnitude >= 0x477ff000u ? special : h;  // from 65520 on: infinite
  h |= (bits >> 16) & 0x8000u;
  store_bits(&p->bits, h);
}
#endif

#if LEAF_VECTOR_BYTES == 64
// Loads the bytes at `from` that the mask selects, and 0 for the others.
template <int bytes>
inline void masked_load(void* to, const void* from, uint64_t mask) {
  if constexpr (bytes == 64) {
    const __m512i v = _mm512_maskz_loadu_epi8(mask, from);
    memcpy(to, &v, bytes);
  } else {
    const __m256i v = _mm256_maskz_loadu_epi8(static_cast<uint32_t>(mask), from);
    memcpy(to, &v, bytes);
  }
}
#endif

#if LEAF_VECTOR_BYTES >= 32
// A streaming (non-temporal) store of a vector of 32 bytes or more, to which p is aligned: for outputs that no cache
// could hold. Their cache lines need not be read first.
template <class S, class V>
inline void stream(S* p, V v) {
  constexpr int bytes = sizeof(V) / sizeof(V{}[0]) * sizeof(S);
  static_assert(bytes >= 32);
  alignas(bytes) S stored[bytes / sizeof(S)];
  store(stored, v);
#if LEAF_VECTOR_BYTES == 64
  if constexpr (bytes == 64) return _mm512_stream_si512((__m512i*)p, bit_cast<__m512i>(stored));
#endif
  if constexpr (bytes == 32) return _mm256_stream_si256((__m256i*)p, bit_cast<__m256i>(stored));
}
#endif
}  // namespace
