// Bit planes on the CPU: eight codes, a byte each, to and from `width` bytes, for whole vectors at a time.
//
// A lane of 8 / kWidth codes becomes one byte of the plane: groups of bits, as far apart as a full lane lets them, move
// next to their lower neighbours, twice as many at each step; the way back moves the upper half of every group up.
#pragma once

#include <stdint.h>

namespace flashcomm::FLASHCOMM_ISA {
namespace {

// Words of the wire and of the tensor seen at other widths, wherever they lie.
typedef uint16_t __attribute__((may_alias, aligned(1))) Word16;
typedef uint32_t __attribute__((may_alias, aligned(1))) Word32;
typedef uint64_t __attribute__((may_alias, aligned(1))) Word64;

template <class Lane, int kWidth>
void pack_lanes(const uint8_t* __restrict codes, int values, int shift, uint8_t* __restrict plane) {
    constexpr Lane kMask = (Lane)(0x0101010101010101 * ((1 << kWidth) - 1));
    for (int i = 0; i < values * kWidth / 8; i++) {
        Lane lane = (Lane)(((const Lane*)codes)[i] >> shift & kMask);
#pragma GCC unroll 3
        for (int group = kWidth; group <= 4; group *= 2) lane |= (Lane)(lane >> group * ((int)sizeof(Lane) - 1));
        plane[i] = (uint8_t)lane;
    }
}

template <class Lane, int kWidth, bool kFirst>
void unpack_lanes(const uint8_t* __restrict plane, int values, int shift, uint8_t* __restrict codes) {
    for (int i = 0; i < values * kWidth / 8; i++) {
        Lane lane = plane[i];
#pragma GCC unroll 3
        for (int group = 4; group >= kWidth; group /= 2) {
            const int spacing = group * (int)sizeof(Lane);
            const Lane keep = (Lane)((uint64_t)(Lane)~0ull / (((uint64_t)1 << spacing) - 1) * ((1u << group) - 1));
            lane = (Lane)(lane | (Lane)(lane << (spacing - group))) & keep;
        }
        lane = (Lane)(lane << shift);
        ((Lane*)codes)[i] = kFirst ? lane : (Lane)(((Lane*)codes)[i] | lane);
    }
}

// The bits shift .. shift + width - 1 of `values` codes to one plane of width 4, 2 or 1; `values` is a multiple of 8.
inline void pack_plane(int width, const uint8_t* codes, int values, int shift, uint8_t* plane) {
    if (width == 4) pack_lanes<Word16, 4>(codes, values, shift, plane);
    if (width == 2) pack_lanes<Word32, 2>(codes, values, shift, plane);
    if (width == 1) pack_lanes<Word64, 1>(codes, values, shift, plane);
}

// The way back: the plane at shift 0 starts the codes, the others add their bits.
inline void unpack_plane(int width, const uint8_t* plane, int values, int shift, uint8_t* codes) {
    if (width == 4) unpack_lanes<Word16, 4, true>(plane, values, 0, codes);  // always the first
    if (width == 2 && shift) unpack_lanes<Word32, 2, false>(plane, values, shift, codes);
    if (width == 2 && !shift) unpack_lanes<Word32, 2, true>(plane, values, 0, codes);
    if (width == 1 && shift) unpack_lanes<Word64, 1, false>(plane, values, shift, codes);
    if (width == 1 && !shift) unpack_lanes<Word64, 1, true>(plane, values, 0, codes);
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
