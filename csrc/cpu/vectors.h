// Vectors of one instruction set, and tracks: the 128 bits of a vector that work on a block of their own.
//
// What is done to a block is written for vectors of one track; wider ones do two or four blocks at once. Nothing
// crosses from one track into another but loads and stores (tracks.h).
#pragma once

#include <stdint.h>
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "format/codec.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kTracks = kLanes / 4;
typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t Lanes __attribute__((vector_size(4 * kLanes)));
typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
typedef uint16_t HalfWords __attribute__((vector_size(4 * kLanes)));
typedef int16_t Shorts __attribute__((vector_size(4 * kLanes)));
typedef uint8_t Octets __attribute__((vector_size(4 * kLanes)));
typedef int8_t SignedOctets __attribute__((vector_size(4 * kLanes)));
template <class V> constexpr int kLanesOf = sizeof(V) / sizeof(V{}[0]);
template <class V> constexpr int kPerTrack = kLanesOf<V> / kTracks;

template <class V> struct Both {
    V first, second;
};

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

// The same in every track: its lane i is lane at(i) of x's track, then of y's.
template <class V, class At> FC_INLINE V shuffled_tracks(V x, V y, At at) {
    constexpr int kEach = kPerTrack<V>;
    return shuffled(x, y, [at](int i) {
        const int from = at(i % kEach);
        return i / kEach * kEach + from % kEach + from / kEach * kLanesOf<V>;
    });
}

// Of both, in every track: lanes 0, 2, .. and lanes 1, 3, ..
template <class V> FC_INLINE Both<V> unzipped(Both<V> x) {
    return {shuffled_tracks(x.first, x.second, [](int i) { return 2 * i; }),
            shuffled_tracks(x.first, x.second, [](int i) { return 2 * i + 1; })};
}

// The way back: lanes of both in turn.
template <class V> FC_INLINE Both<V> zipped(Both<V> x) {
    constexpr int kEach = kPerTrack<V>;
    return {shuffled_tracks(x.first, x.second, [](int i) { return i / 2 + i % 2 * kEach; }),
            shuffled_tracks(x.first, x.second, [](int i) { return (i + kEach) / 2 + i % 2 * kEach; })};
}

// Every lane's partner, kStride away.
template <int kStride, class V> FC_INLINE V partners(V x) {
    if constexpr (sizeof(x[0]) == 2 && kStride > 1) return (V)partners<kStride / 2>((Words)x);
    else return shuffled(x, x, [](int i) { return i ^ kStride; });
}

template <class V> FC_INLINE V larger(V x, V y) { return x > y ? x : y; }
template <class V> FC_INLINE V smaller(V x, V y) { return x < y ? x : y; }

// Track t holds each[t] four times.
FC_INLINE Vector spread(const float* each) {
#if defined(__AVX512F__)
    const __m512i at = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return (Vector)_mm512_maskz_permutexvar_ps(0xFFFF, at, _mm512_maskz_broadcast_f32x4(0xFFFF, _mm_loadu_ps(each)));
#elif defined(__AVX2__)
    return (Vector)_mm256_set_m128(_mm_set1_ps(each[1]), _mm_set1_ps(each[0]));
#else
    Vector x;
    for (int i = 0; i < kLanes; i++) x[i] = each[i / 4];
    return x;
#endif
}

// The first word of every track is all ones, the others are zero.
FC_INLINE Words first_words() {
    Words x;
    for (int i = 0; i < kLanes; i++) x[i] = i % 4 ? 0 : ~0u;
    return x;
}

// A bit for every lane: whether it differs from zero.
FC_INLINE uint32_t nonzero(Words x) {
#if defined(__AVX512F__)
    return _mm512_test_epi32_mask((__m512i)x, (__m512i)x);
#elif defined(__AVX2__)
    return 0xFF ^ _mm256_movemask_ps((__m256)_mm256_cmpeq_epi32((__m256i)x, _mm256_setzero_si256()));
#elif defined(__SSE2__)
    return 0xF ^ _mm_movemask_ps((__m128)_mm_cmpeq_epi32((__m128i)x, _mm_setzero_si128()));
#else
    uint32_t bits = 0;
    for (int i = 0; i < kLanes; i++) bits |= (uint32_t)(x[i] != 0) << i;
    return bits;
#endif
}

// ---- narrow and wide lanes ---------------------------------------------------------------------------------------

// To the nearest integer, to the even one of two; for numbers below 2**22.
FC_INLINE Lanes nearest(Vector x) {
#if defined(__AVX512F__)
    return (Lanes)_mm512_maskz_cvtps_epi32(0xFFFF, (__m512)x);
#elif defined(__AVX2__)
    return (Lanes)_mm256_cvtps_epi32((__m256)x);
#elif defined(__SSE2__)
    return (Lanes)_mm_cvtps_epi32((__m128)x);
#else
    return (Lanes)(x + 0x1.8p23f) - 0x4B400000;
#endif
}

// In every track the numbers of x.first, then those of x.second, which fit.
FC_INLINE Shorts joined(Both<Lanes> x) {
#if defined(__AVX512F__)
    return (Shorts)_mm512_packs_epi32((__m512i)x.first, (__m512i)x.second);
#elif defined(__AVX2__)
    return (Shorts)_mm256_packs_epi32((__m256i)x.first, (__m256i)x.second);
#elif defined(__SSE2__)
    return (Shorts)_mm_packs_epi32((__m128i)x.first, (__m128i)x.second);
#else
    return unzipped(Both<Shorts>{(Shorts)x.first, (Shorts)x.second}).first;
#endif
}

// The same of shorts, limited to the nearest byte.
FC_INLINE SignedOctets joined(Both<Shorts> x) {
#if defined(__AVX512F__)
    return (SignedOctets)_mm512_packs_epi16((__m512i)x.first, (__m512i)x.second);
#elif defined(__AVX2__)
    return (SignedOctets)_mm256_packs_epi16((__m256i)x.first, (__m256i)x.second);
#elif defined(__SSE2__)
    return (SignedOctets)_mm_packs_epi16((__m128i)x.first, (__m128i)x.second);
#else
    const auto limited = [](Shorts y) { return (SignedOctets)smaller(larger(y, Shorts{} - 128), Shorts{} + 127); };
    return unzipped(Both<SignedOctets>{limited(x.first), limited(x.second)}).first;
#endif
}

FC_INLINE Octets joined(Both<HalfWords> x) {
#if defined(__AVX512F__)
    return (Octets)_mm512_packus_epi16((__m512i)x.first, (__m512i)x.second);
#elif defined(__AVX2__)
    return (Octets)_mm256_packus_epi16((__m256i)x.first, (__m256i)x.second);
#elif defined(__SSE2__)
    return (Octets)_mm_packus_epi16((__m128i)x.first, (__m128i)x.second);
#else
    return unzipped(Both<Octets>{(Octets)x.first, (Octets)x.second}).first;
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

// x[2i] + x[2i + 1] * radix.
FC_INLINE Shorts digits(SignedOctets x, int radix) {
#if defined(__AVX512F__)
    return (Shorts)_mm512_maddubs_epi16(_mm512_set1_epi16((short)(1 | radix << 8)), (__m512i)x);
#elif defined(__AVX2__)
    return (Shorts)_mm256_maddubs_epi16(_mm256_set1_epi16((short)(1 | radix << 8)), (__m256i)x);
#else
    return ((Shorts)x << 8 >> 8) + ((Shorts)x >> 8) * (int16_t)radix;
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

// The upper halves of two vectors: one behind the other where vectors have four tracks, else in every track.
FC_INLINE Words upper_halves(Words first, Words second) {
#if defined(__AVX512F__)
    return (Words)shuffled((HalfWords)first, (HalfWords)second, [](int i) { return 2 * i + 1; });
#elif defined(__SSE2__)
    return (Words)joined(Both<Lanes>{(Lanes)first >> 16, (Lanes)second >> 16});
#else
    return (Words)unzipped(Both<HalfWords>{(HalfWords)first, (HalfWords)second}).second;
#endif
}

// Two vectors of finite numbers rounded to a 16-bit type, arranged as upper_halves. No number is denormal in bfloat16,
// which the processor's own rounding would make zero: see kLeastKey.
template <class T> FC_INLINE Words narrowed(Vector first, Vector second) {
    constexpr bool kHalf = T::kInfinity == Float16::kInfinity;
#if defined(__AVX512F__)
    if constexpr (kHalf) {
        constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        const __m256i low = _mm512_maskz_cvtps_ph(0xFFFF, (__m512)first, kNearest);
        const __m256i high = _mm512_maskz_cvtps_ph(0xFFFF, (__m512)second, kNearest);
        return (Words)_mm512_maskz_inserti64x4(0xFF, _mm512_castsi256_si512(low), high, 1);
    }
#endif
#if defined(__AVX512BF16__)
    return (Words)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
#else
    if constexpr (kHalf) return upper_halves(narrowed_half(first) << 16, narrowed_half(second) << 16);
    return upper_halves(rounded_bfloat(first), rounded_bfloat(second));
#endif
}

// ---- numbers of a residual (rotated.h), as vectors hold them -----------------------------------------------------------

// Two neighbouring vectors.
template <class T> FC_INLINE Both<Vector> load_numbers(const typename T::Word* from) {
    if constexpr (sizeof(typename T::Word) == 4) return {load<Vector>(from), load<Vector>(from + 16)};
#if defined(__AVX512F__)
    if constexpr (T::kInfinity == BFloat16::kInfinity) {
        const __m512i both = (__m512i)load<Words>(from);
        const auto upper = [both](int first) {
            HalfWords at;
            for (int i = 0; i < 32; i++) at[i] = (uint16_t)(first + i / 2);
            return (Vector)_mm512_maskz_permutexvar_epi16(0xAAAAAAAA, (__m512i)at, both);
        };
        return {upper(0), upper(16)};
    }
#endif
    const auto row = [](const typename T::Word* words) {
        typedef uint16_t Row __attribute__((vector_size(2 * kLanes)));
        const Words wide = __builtin_convertvector(load<Row>(words), Words);
        return T::kInfinity == Float16::kInfinity ? widened_half(wide) : (Vector)(wide << 16);
    };
    return {row(from), row(from + 16)};
}

// Finite losses, cut or limited and rounded as kept_number() has it.
template <class T> FC_INLINE void store_numbers(Vector first, Vector second, typename T::Word* to) {
    if constexpr (sizeof(typename T::Word) == 4) return store(first, to), store(second, to + 16);
    Words both = upper_halves((Words)first, (Words)second);
    if constexpr (T::kInfinity == Float16::kInfinity) {
        const auto limited = [](Vector x) { return smaller(larger(x, Vector{} - T::kMax), Vector{} + T::kMax); };
        both = narrowed<T>(limited(first), limited(second));
    }
    if constexpr (kTracks == 4) return store(both, to);
    typedef uint64_t Quads __attribute__((vector_size(4 * kLanes)));  // of which every track has one of either vector
    const Quads rows = shuffled((Quads)both, (Quads)both, [](int i) { return i / kTracks + i % kTracks * 2; });
    __builtin_memcpy(to, &rows, sizeof(rows) / 2);
    __builtin_memcpy(to + 16, (const char*)&rows + sizeof(rows) / 2, sizeof(rows) / 2);
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
