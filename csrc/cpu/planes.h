// Bit planes on the CPU: eight codes, a byte each, to and from `width` bytes, for whole vectors at a time.
//
// A lane of 8 / kWidth codes becomes one byte of the plane: groups of bits, spread over the whole lane, move next to
// their lower neighbours, twice as many at each step; the way back moves the upper half of every group up.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "format/codec.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

// Words of the wire and of the tensor seen at other widths, wherever they lie.
typedef uint16_t __attribute__((may_alias, aligned(1))) Word16;
typedef uint32_t __attribute__((may_alias, aligned(1))) Word32;
typedef uint64_t __attribute__((may_alias, aligned(1))) Word64;

// Recursion, not loops: a loop is unrolled too late for what surrounds it to become vectors.
template <class Lane, int kGroup> FC_INLINE Lane gather(Lane lane) {
    if constexpr (kGroup == 8) return lane;
    else return gather<Lane, 2 * kGroup>((Lane)(lane | lane >> kGroup * ((int)sizeof(Lane) - 1)));
}

template <class Lane, int kWidth, int kGroup = 4> FC_INLINE Lane scatter(Lane lane) {
    if constexpr (kGroup < kWidth) return lane;
    else {
        constexpr int kSpacing = kGroup * (int)sizeof(Lane);
        constexpr Lane kGroups = (Lane)((Lane) ~(Lane)0 / (((uint64_t)1 << kSpacing) - 1) * ((1u << kGroup) - 1));
        return scatter<Lane, kWidth, kGroup / 2>((Lane)((lane | lane << (kSpacing - kGroup)) & kGroups));
    }
}

template <class Lane, int kWidth>
void pack_lanes(const uint8_t* __restrict codes, int values, int shift, uint8_t* __restrict plane) {
    constexpr Lane kCodes = (Lane)(0x0101010101010101 * ((1 << kWidth) - 1));
    for (int i = 0; i < values * kWidth / 8; i++)
        plane[i] = (uint8_t)gather<Lane, kWidth>((Lane)(((const Lane*)codes)[i] >> shift & kCodes));
}

template <class Lane, int kWidth, bool kFirst>
void unpack_lanes(const uint8_t* __restrict plane, int values, int shift, uint8_t* __restrict codes) {
    for (int i = 0; i < values * kWidth / 8; i++) {
        const Lane lane = (Lane)(scatter<Lane, kWidth>(plane[i]) << shift);
        ((Lane*)codes)[i] = kFirst ? lane : (Lane)(((Lane*)codes)[i] | lane);
    }
}

// Planes of one bit: x86 gathers and scatters the bits of a vector's bytes in an instruction or a few.
inline void pack_bits(const uint8_t* __restrict codes, int values, int shift, uint8_t* __restrict plane) {
    int i = 0;
#if defined(__AVX512BW__)
    for (const __m512i bit = _mm512_set1_epi8((char)(1 << shift)); i + 64 <= values; i += 64)
        *(Word64*)(plane + i / 8) = _mm512_test_epi8_mask(_mm512_loadu_si512(codes + i), bit);
#elif defined(__AVX2__)
    for (; i + 32 <= values; i += 32)
        *(Word32*)(plane + i / 8) = (uint32_t)_mm256_movemask_epi8(
            _mm256_slli_epi16(_mm256_loadu_si256((const __m256i*)(codes + i)), 7 - shift));
#elif defined(__SSE2__)
    for (; i + 16 <= values; i += 16)
        *(Word16*)(plane + i / 8) =
            (uint16_t)_mm_movemask_epi8(_mm_slli_epi16(_mm_loadu_si128((const __m128i*)(codes + i)), 7 - shift));
#endif
    pack_lanes<Word64, 1>(codes + i, values - i, shift, plane + i / 8);
}

template <bool kFirst>
void unpack_bits(const uint8_t* __restrict plane, int values, int shift, uint8_t* __restrict codes) {
    int i = 0;
#if defined(__AVX512BW__)
    for (const __m512i bit = _mm512_set1_epi8((char)(1 << shift)); i + 64 <= values; i += 64) {
        const __m512i before = kFirst ? _mm512_setzero_si512() : _mm512_loadu_si512(codes + i);
        const __m512i bits = _mm512_maskz_mov_epi8(*(const Word64*)(plane + i / 8), bit);
        _mm512_storeu_si512(codes + i, _mm512_or_si512(before, bits));
    }
#elif defined(__AVX2__)
    const __m256i byte = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);
    const __m256i place = _mm256_set1_epi64x((long long)0x8040201008040201), bit = _mm256_set1_epi8((char)(1 << shift));
    for (; i + 32 <= values; i += 32) {
        const __m256i bits = _mm256_shuffle_epi8(_mm256_set1_epi32((int)*(const Word32*)(plane + i / 8)), byte);
        const __m256i set = _mm256_and_si256(_mm256_cmpeq_epi8(_mm256_and_si256(bits, place), place), bit);
        __m256i* out = (__m256i*)(codes + i);
        _mm256_storeu_si256(out, kFirst ? set : _mm256_or_si256(_mm256_loadu_si256(out), set));
    }
#endif
    unpack_lanes<Word64, 1, kFirst>(plane + i / 8, values - i, shift, codes + i);
}

// The bits shift .. shift + width - 1 of `values` codes to one plane of width 4, 2 or 1; `values` is a multiple of 8.
inline void pack_plane(int width, const uint8_t* codes, int values, int shift, uint8_t* plane) {
    if (width == 4) pack_lanes<Word16, 4>(codes, values, 0, plane);  // always the first
    if (width == 2) pack_lanes<Word32, 2>(codes, values, shift, plane);
    if (width == 1) pack_bits(codes, values, shift, plane);
}

// The way back: the plane at shift 0 starts the codes, the others add their bits.
inline void unpack_plane(int width, const uint8_t* plane, int values, int shift, uint8_t* codes) {
    if (width == 4) unpack_lanes<Word16, 4, true>(plane, values, 0, codes);
    if (width == 2 && shift) unpack_lanes<Word32, 2, false>(plane, values, shift, codes);
    if (width == 2 && !shift) unpack_lanes<Word32, 2, true>(plane, values, 0, codes);
    if (width == 1 && shift) unpack_bits<false>(plane, values, shift, codes);
    if (width == 1 && !shift) unpack_bits<true>(plane, values, 0, codes);
}

// `values` codes, from octet `first` on, to the planes of `bits` bits that lie one behind the other in `section`, and back.
inline void pack_planes(int bits, int64_t octets, int64_t first, int values, const uint8_t* codes, uint8_t* section) {
    Layout::each_plane(bits, octets, [=](int width, int shift, int64_t start) {
        uint8_t* plane = section + start + first * width;
        if (width == 8 && plane != codes) __builtin_memcpy(plane, codes, values);
        pack_plane(width, codes, values, shift, plane);
    });
}

inline void unpack_planes(int bits, int64_t octets, int64_t first, int values, const uint8_t* section, uint8_t* codes) {
    Layout::each_plane(bits, octets, [=](int width, int shift, int64_t start) {
        const uint8_t* plane = section + start + first * width;
        if (width == 8) __builtin_memcpy(codes, plane, values);
        unpack_plane(width, plane, values, shift, codes);
    });
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
