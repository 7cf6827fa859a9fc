// Vectors of one instruction set: lanes that meet lanes of the same vector, and a tensor's even and odd values.
//
// Values 2i and 2i + 1 of a tensor share a 32-bit lane as they lie in memory; taken apart they are two vectors, so that
// what happens between them, and all conversion of 16-bit types, needs no shuffle.
#pragma once

#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "codec.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfWords __attribute__((vector_size(4 * kLanes)));
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
template <class V> constexpr int kLanesOf = sizeof(V) / sizeof(V{}[0]);

// Vectors lie in memory at any address, as anything.
template <class V> FC_INLINE V load(const void* from) {
    V x;
    __builtin_memcpy(&x, from, sizeof(V));
    return x;
}

template <class V> FC_INLINE void store(V x, void* to) { __builtin_memcpy(to, &x, sizeof(V)); }

// ---- shuffles --------------------------------------------------------------------------------------------------

// Lane i is lane at(i) of x, then of y.
template <class V, class At> FC_INLINE V shuffled(V x, V y, At at) {
    constexpr int kCount = kLanesOf<V>;
#if defined(__clang__)
    V z;
    for (int i = 0; i < kCount; i++) z[i] = at(i) < kCount ? x[at(i)] : y[at(i) - kCount];
    return z;
#else
    typedef decltype(x < y) Lane;  // integers as wide as the numbers
    Lane lane;
    for (int i = 0; i < kCount; i++) lane[i] = at(i);
    return __builtin_shuffle(x, y, lane);
#endif
}

// Every lane's partner, kStride away.
template <int kStride, class V> FC_INLINE V partners(V x) {
    if constexpr (sizeof(x[0]) == 2 && kStride > 1) return (V)partners<kStride / 2>((Words)x);
    else return shuffled(x, x, [](int i) { return i ^ kStride; });
}

FC_INLINE Words larger(Words x, Words y) { return x > y ? x : y; }

// Lane i: the largest lane of vector i among the kCount at v; other lanes repeat them.
template <int kCount> FC_INLINE Words largest_lanes(const Words* v) {
    if constexpr (kCount == 1) {
        Words x = v[0];
        return x;
    } else {
        constexpr int kStride = kCount / 2;
        const Words x = largest_lanes<kStride>(v), y = largest_lanes<kStride>(v + kStride);
        const Words own = shuffled(x, y, [](int i) { return i & kStride ? i + kLanes : i; });
        const Words other = shuffled(x, y, [](int i) { return (i & kStride ? i + kLanes : i) ^ kStride; });
        return larger(own, other);
    }
}

// Whether any lane differs from zero, -0 being zero.
FC_INLINE bool any(Vector x) {
#if defined(__AVX512F__)
    return _mm512_cmp_ps_mask((__m512)x, _mm512_setzero_ps(), _CMP_NEQ_UQ);
#elif defined(__AVX2__)
    return _mm256_movemask_ps(_mm256_cmp_ps((__m256)x, _mm256_setzero_ps(), _CMP_NEQ_UQ));
#elif defined(__SSE2__)
    return _mm_movemask_ps(_mm_cmpneq_ps((__m128)x, _mm_setzero_ps()));
#else
    bool found = false;
    for (int i = 0; i < kLanes; i++) found |= x[i] != 0;
    return found;
#endif
}

// ---- 16-bit words ----------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
typedef __m256i Narrow;  // kLanes 16-bit words
FC_INLINE Narrow lower_halves(Words x) { return _mm512_maskz_cvtepi32_epi16(0xFFFF, (__m512i)x); }
FC_INLINE Words words_of(Narrow x) { return (Words)_mm512_maskz_cvtepu16_epi32(0xFFFF, x); }
#elif defined(__AVX2__)
typedef __m128i Narrow;
FC_INLINE Narrow lower_halves(Words x) {  // of lanes below 2**16
    return _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
}
FC_INLINE Words words_of(Narrow x) { return (Words)_mm256_cvtepu16_epi32(x); }
#else
struct Narrow {
    uint16_t at[kLanes];
};
FC_INLINE Narrow lower_halves(Words x) {
    Narrow y;
    for (int i = 0; i < kLanes; i++) y.at[i] = (uint16_t)x[i];
    return y;
}
#endif

// Upper halves of the products of all lanes.
FC_INLINE HalfWords upper_products(HalfWords x, HalfWords y) {
#if defined(__AVX512F__)
    return (HalfWords)_mm512_mulhi_epu16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
    return (HalfWords)_mm256_mulhi_epu16((__m256i)x, (__m256i)y);
#elif defined(__SSE2__)
    return (HalfWords)_mm_mulhi_epu16((__m128i)x, (__m128i)y);
#else
    HalfWords z;
    for (int i = 0; i < 2 * kLanes; i++) z[i] = (uint16_t)((uint32_t)x[i] * y[i] >> 16);
    return z;
#endif
}

// Sums of the products of neighbouring lanes.
FC_INLINE Lanes sum_products(Shorts x, Shorts y) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_madd_epi16((__m512i)x, (__m512i)y);
#elif defined(__AVX2__)
    return (Lanes)_mm256_madd_epi16((__m256i)x, (__m256i)y);
#elif defined(__SSE2__)
    return (Lanes)_mm_madd_epi16((__m128i)x, (__m128i)y);
#else
    Lanes z;
    for (int i = 0; i < kLanes; i++) z[i] = x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1];
    return z;
#endif
}

// x * y + z, whose product is exact: fused or not, rounded once.
FC_INLINE Vector scaled(Vector x, Vector y, Vector z) {
#if defined(__AVX512F__)
    return (Vector)_mm512_fmadd_ps((__m512)x, (__m512)y, (__m512)z);
#elif defined(__FMA__)
    return (Vector)_mm256_fmadd_ps((__m256)x, (__m256)y, (__m256)z);
#else
    return x * y + z;
#endif
}

// ---- even and odd values ---------------------------------------------------------------------------------------

template <class V> struct Both {
    V even, odd;
};
using Pairs = Both<Vector>;

// Half the lanes, the first or the second, as float32.
template <int kHalf> FC_INLINE Vector numbers(Shorts x) {
#if defined(__AVX512F__)
    const __m256i half = _mm512_maskz_extracti64x4_epi64(0xF, (__m512i)x, kHalf);
    return __builtin_convertvector((Lanes)_mm512_maskz_cvtepi16_epi32(0xFFFF, half), Vector);
#elif defined(__AVX2__)
    const __m128i half = kHalf ? _mm256_extracti128_si256((__m256i)x, 1) : _mm256_castsi256_si128((__m256i)x);
    return __builtin_convertvector((Lanes)_mm256_cvtepi16_epi32(half), Vector);
#elif defined(__SSE2__)
    const __m128i v = (__m128i)x;
    const __m128i both = kHalf ? _mm_unpackhi_epi16(v, v) : _mm_unpacklo_epi16(v, v);
    return __builtin_convertvector((Lanes)_mm_srai_epi32(both, 16), Vector);
#else
    Vector y;
    for (int i = 0; i < kLanes; i++) y[i] = x[i + kHalf * kLanes];
    return y;
#endif
}

template <int kHalf> FC_INLINE Pairs numbers(const Both<Shorts>& x) {
    return {numbers<kHalf>(x.even), numbers<kHalf>(x.odd)};
}

// float16 numbers below 2**16 as integers, and back.
#if defined(__AVX512F__)
FC_INLINE Vector widened_half(Words x) { return (Vector)_mm512_maskz_cvtph_ps(0xFFFF, lower_halves(x)); }
FC_INLINE Words narrowed_half(Vector x) {
    return words_of(_mm512_maskz_cvtps_ph(0xFFFF, (__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__F16C__)
FC_INLINE Vector widened_half(Words x) { return (Vector)_mm256_cvtph_ps(lower_halves(x)); }
FC_INLINE Words narrowed_half(Vector x) { return words_of(_mm256_cvtps_ph((__m256)x, _MM_FROUND_TO_NEAREST_INT)); }
#else
FC_INLINE Vector widened_half(Words word) {
    const Words infinite = (Words)((word & Float16::kInfinity) == Float16::kInfinity) & Float32::kInfinity;
    const Words finite = (Words)((Lanes)(word << 16) >> 3) & 0x8FFFE000;
    return (Vector)((Words)((Vector)finite * 0x1p112f) | infinite);
}

FC_INLINE Words narrowed_half(Vector x) {
    const Words bits = (Words)x, magnitude = bits & 0x7FFFFFFF;
    const Words normal = (magnitude - (112u << 23) + 0xFFF + ((magnitude >> 13) & 1)) >> 13;
    const Words denormal = (Words)((Vector)magnitude + 0.5f) - 0x3F000000;
    const Words small = (Lanes)magnitude < (113 << 23) ? denormal : normal;
    return (bits >> 16 & 0x8000) | ((Lanes)magnitude < 0x477FF000 ? small : Words{} + Float16::kInfinity);
}
#endif

FC_INLINE Words rounded_bfloat(Vector x) { return (Words)x + 0x7FFF + ((Words)x >> 16 & 1); }

// The 2 * kLanes values at x; NaN and Inf stay what they are.
template <class T> FC_INLINE Pairs load_pairs(const typename T::Word* x) {
    if constexpr (sizeof(typename T::Word) == 4) {
        const Vector first = load<Vector>(x), second = load<Vector>(x + kLanes);
        return {shuffled(first, second, [](int i) { return 2 * i; }),
                shuffled(first, second, [](int i) { return 2 * i + 1; })};
    } else {
        const Words words = load<Words>(x);
        if constexpr (T::kInfinity == Float16::kInfinity)
            return {widened_half(words & 0xFFFF), widened_half(words >> 16)};
        else
            return {(Vector)(words << 16), (Vector)(words & 0xFFFF0000)};
    }
}

// Stores 2 * kLanes finite values, each rounded once.
template <class T> FC_INLINE void store_pairs(Pairs x, typename T::Word* out) {
    if constexpr (sizeof(typename T::Word) == 4) {
        store(shuffled(x.even, x.odd, [](int i) { return i / 2 + (i & 1 ? kLanes : 0); }), out);
        store(shuffled(x.even, x.odd, [](int i) { return (i + kLanes) / 2 + (i & 1 ? kLanes : 0); }), out + kLanes);
    } else if constexpr (T::kInfinity == Float16::kInfinity) {
        store(narrowed_half(x.even) | narrowed_half(x.odd) << 16, out);
    } else {
        store(rounded_bfloat(x.even) >> 16 | (rounded_bfloat(x.odd) & 0xFFFF0000), out);
    }
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
