// Bit planes in registers: eight numbers below 256 as bytes of two words, packed to and from whole words of a plane.
//
// Even and odd numbers have words of their own: even = number 0 | 2 << 8 | 4 << 16 | 6 << 24, odd the others. So two of
// them are one shift and one or, and planes of 4, 2 and 1 bits take three or four instructions for eight numbers. A
// thread's eights are neighbours, so their packed bits are moved by one access of up to 16 bytes.
#pragma once

#include "cuda/device.h"

namespace flashcomm::FLASHCOMM_ISA {

struct Eight {
    uint32_t even, odd;
};

FC_DEVICE Eight eight_of(const uint32_t* number) {  // below 256
    return {byte_perm(byte_perm(number[0], number[2], 0x0040), byte_perm(number[4], number[6], 0x0040), 0x5410),
            byte_perm(byte_perm(number[1], number[3], 0x0040), byte_perm(number[5], number[7], 0x0040), 0x5410)};
}
FC_DEVICE Eight upper_eight_of(const uint32_t* number) {  // of bits 8 to 15
    return {byte_perm(byte_perm(number[0], number[2], 0x0051), byte_perm(number[4], number[6], 0x0051), 0x5410),
            byte_perm(byte_perm(number[1], number[3], 0x0051), byte_perm(number[5], number[7], 0x0051), 0x5410)};
}
FC_DEVICE uint32_t number_of(Eight x, int i) { return (i & 1 ? x.odd : x.even) >> (i / 2 * 8) & 0xFF; }
FC_DEVICE Eight shifted(Eight x, int shift) { return {x.even >> shift, x.odd >> shift}; }

// The lowest kWidth bits of each: of 8 bits two words, else one with 8 * kWidth bits.
template <int kWidth> FC_DEVICE uint32_t packed(Eight x) {
    constexpr uint32_t kMask = 0x01010101u * ((1u << kWidth) - 1);
    const uint32_t pairs = (x.even & kMask) | (x.odd & kMask) << kWidth;  // of 2 * kWidth bits, a byte each
    if constexpr (kWidth == 4) return pairs;
    // What a product brings below bit 24 does not carry into it.
    if constexpr (kWidth == 2) return byte_perm((pairs | pairs >> 4) & 0x00FF00FF, 0, 0x4420);
    if constexpr (kWidth == 1) return pairs * 0x01041040u >> 24;
}
template <int kWidth> FC_DEVICE Eight unpacked(uint32_t bits) {
    constexpr uint32_t kMask = 0x01010101u * ((1u << kWidth) - 1);
    uint32_t pairs = bits;
    if constexpr (kWidth == 2) pairs = (pairs | pairs << 8) & 0x00FF00FF, pairs = (pairs | pairs << 4) & 0x0F0F0F0F;
    if constexpr (kWidth == 1) pairs = (pairs | pairs << 12) & 0x000F000F, pairs = (pairs | pairs << 6) & 0x03030303;
    return {pairs & kMask, pairs >> kWidth & kMask};
}

// kBytes, a power of two up to 32, at an address that is a multiple of it (of 32: of 16).
struct alignas(8) Vec8 {
    uint32_t w[2];
};
template <int kBytes> FC_DEVICE void store_bytes(uint8_t* at, const uint32_t* w) {
    if constexpr (kBytes >= 16) {
        FC_UNROLL for (int v = 0; v < kBytes / 16;
                       v++)((Vec16*)at)[v] = {{w[4 * v], w[4 * v + 1], w[4 * v + 2], w[4 * v + 3]}};
    }
    if constexpr (kBytes == 8) *(Vec8*)at = {{w[0], w[1]}};
    if constexpr (kBytes == 4) *(uint32_t*)at = w[0];
    if constexpr (kBytes == 2) *(uint16_t*)at = (uint16_t)w[0];
    if constexpr (kBytes == 1) *at = (uint8_t)w[0];
}
template <int kBytes> FC_DEVICE void load_bytes(const uint8_t* at, uint32_t* w) {
    if constexpr (kBytes >= 16) {
        FC_UNROLL for (int v = 0; v < kBytes / 16; v++) {
            const Vec16 four = ((const Vec16*)at)[v];
            FC_UNROLL for (int i = 0; i < 4; i++) w[4 * v + i] = four.w[i];
        }
    }
    if constexpr (kBytes == 8) {
        const Vec8 two = *(const Vec8*)at;
        w[0] = two.w[0], w[1] = two.w[1];
    }
    if constexpr (kBytes == 4) w[0] = *(const uint32_t*)at;
    if constexpr (kBytes == 2) w[0] = *(const uint16_t*)at;
    if constexpr (kBytes == 1) w[0] = *at;
}

// kCount eights in a plane of kWidth bits: kCount * kWidth bytes.
template <int kWidth, int kCount> FC_DEVICE void store_eights(uint8_t* at, const Eight (&x)[kCount]) {
    constexpr int kBytes = kCount * kWidth;
    uint32_t w[kBytes < 4 ? 1 : kBytes / 4] = {};
    FC_UNROLL for (int k = 0; k < kCount; k++) {
        if constexpr (kWidth == 8) {
            w[2 * k] = byte_perm(x[k].even, x[k].odd, 0x5140);
            w[2 * k + 1] = byte_perm(x[k].even, x[k].odd, 0x7362);
        } else {
            w[k * kWidth / 4] |= packed<kWidth>(x[k]) << (8 * kWidth * k & 31);
        }
    }
    store_bytes<kBytes>(at, w);
}

// visit(k, eight) for each.
template <int kWidth, int kCount, class Visit> FC_DEVICE void load_eights(const uint8_t* at, Visit visit) {
    constexpr int kBytes = kCount * kWidth;
    uint32_t w[kBytes < 4 ? 1 : kBytes / 4];
    load_bytes<kBytes>(at, w);
    FC_UNROLL for (int k = 0; k < kCount; k++) {
        if constexpr (kWidth == 8) {
            visit(k, Eight{byte_perm(w[2 * k], w[2 * k + 1], 0x6420), byte_perm(w[2 * k], w[2 * k + 1], 0x7531)});
        } else {
            constexpr uint32_t kMask = kWidth == 4 ? ~0u : (1u << (8 * kWidth & 31)) - 1;
            visit(k, unpacked<kWidth>(w[k * kWidth / 4] >> (8 * kWidth * k & 31) & kMask));
        }
    }
}

// ---- planes of a section ---------------------------------------------------------------------------------------

template <class Size> FC_INLINE Size padded16(Size size) { return (size + 15) & ~(Size)15; }

template <int kWidth> struct Width {
    static constexpr int value = kWidth;
};

// visit(width, shift, start): as Layout::each_plane, with the width in a type. Returns where the planes end.
template <class Size, class Visit> FC_DEVICE Size each_plane(int bits, Size octets, Visit visit) {
    Size start = 0;
    int shift = 0;
    auto plane = [&](auto width) {
        if (!(bits & width.value)) return;
        visit(width, shift, start);
        start += padded16<Size>(octets * width.value);
        shift += width.value;
    };
    plane(Width<8>{});
    plane(Width<4>{});
    plane(Width<2>{});
    plane(Width<1>{});
    return start;
}

template <class Size> FC_INLINE Size plane_bytes(int bits, Size octets) {
    Size bytes = 0;
    FC_UNROLL for (int width = 8; width; width >>= 1) bytes += bits & width ? padded16<Size>(octets * width) : 0;
    return bytes;
}

// kCount eights from number `eight` on, to and from all planes of `bits` bits of a section of `eights`. Beyond a byte
// their bits are in `upper`; up to a byte that is not looked at. Loading adds bits to what is there.
template <int kCount, class Size>
FC_DEVICE void store_planes(int bits, Size eights, Size eight, const Eight (&lower)[kCount],
                            const Eight (&upper)[kCount], uint8_t* section) {
    each_plane(bits, eights, [&](auto width, int shift, Size start) {
        Eight x[kCount];
        FC_UNROLL for (int k = 0; k < kCount; k++) x[k] = shifted(shift < 8 ? lower[k] : upper[k], shift & 7);
        store_eights<width.value, kCount>(section + start + eight * width.value, x);
    });
}
template <int kCount, class Size>
FC_DEVICE void load_planes(int bits, Size eights, Size eight, const uint8_t* section, Eight (&lower)[kCount],
                           Eight (&upper)[kCount]) {
    each_plane(bits, eights, [&](auto width, int shift, Size start) {
        load_eights<width.value, kCount>(section + start + eight * width.value, [&](int k, Eight x) {
            const Eight at = {x.even << (shift & 7), x.odd << (shift & 7)};
            if (shift < 8) lower[k].even |= at.even, lower[k].odd |= at.odd;
            else upper[k].even |= at.even, upper[k].odd |= at.odd;
        });
    });
}

}  // namespace flashcomm::FLASHCOMM_ISA
