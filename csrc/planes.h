// Bit planes on the CPU: eight codes, a byte each, to and from `width` bytes, for whole vectors at a time.
//
// A lane of 8 / kWidth codes becomes one byte of the plane: groups of bits, as far apart as a full lane lets them, move
// next to their lower neighbours, twice as many at each step; the way back moves the upper half of every group up.
#pragma once

#include "codec.h"

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
        constexpr Lane kGroups = (Lane)((Lane)~(Lane)0 / (((uint64_t)1 << kSpacing) - 1) * ((1u << kGroup) - 1));
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

// The bits shift .. shift + width - 1 of `values` codes to one plane of width 4, 2 or 1; `values` is a multiple of 8.
inline void pack_plane(int width, const uint8_t* codes, int values, int shift, uint8_t* plane) {
    if (width == 4) pack_lanes<Word16, 4>(codes, values, 0, plane);  // always the first
    if (width == 2) pack_lanes<Word32, 2>(codes, values, shift, plane);
    if (width == 1) pack_lanes<Word64, 1>(codes, values, shift, plane);
}

// The way back: the plane at shift 0 starts the codes, the others add their bits.
inline void unpack_plane(int width, const uint8_t* plane, int values, int shift, uint8_t* codes) {
    if (width == 4) unpack_lanes<Word16, 4, true>(plane, values, 0, codes);
    if (width == 2 && shift) unpack_lanes<Word32, 2, false>(plane, values, shift, codes);
    if (width == 2 && !shift) unpack_lanes<Word32, 2, true>(plane, values, 0, codes);
    if (width == 1 && shift) unpack_lanes<Word64, 1, false>(plane, values, shift, codes);
    if (width == 1 && !shift) unpack_lanes<Word64, 1, true>(plane, values, 0, codes);
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
