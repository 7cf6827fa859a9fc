// The codes of rotated blocks (rotated.h) as threads hold them, and where a payload has them.
//
// Codes lie in bit planes (planes.h) as eights: at whole widths an octet is one, at half widths, where two codes are one
// word, two octets are. A thread has two octets or four, so always whole eights.
#pragma once

#include "format/rotated_search.h"
#include "cuda/tile.h"

namespace flashcomm::FLASHCOMM_ISA {

struct RotatedCodes {
    static constexpr bool kRotates = true;
    static constexpr int kMostAhead = 1;

    // Where the sections of a tile begin in a payload of `groups` eights of words: its own, or a whole tensor's.
    template <class Offset> struct Place {
        Offset groups, octet, scales, tops;  // octet: the tile's first
    };

    int levels, zero, word_bits, octet_shift;  // 1 << octet_shift octets are a block
    uint32_t inverse, minus_levels;            // 2**24 / levels, rounded up; -levels << 8
    int pair_shift;                            // 1 where two codes are a word, else 0

    FC_INLINE explicit RotatedCodes(Setting with)
        : levels(RotatedLayout::levels_of(with.bits)), zero(levels / 2),
          word_bits(with.bits & 1 ? with.bits : with.bits / 2), octet_shift(1), pair_shift(with.bits & 1) {
        while (8 << octet_shift < with.block) octet_shift++;
        inverse = ((1u << 24) + levels - 1) / levels, minus_levels = 0u - ((uint32_t)levels << 8);
    }

    FC_INLINE int block() const { return 8 << octet_shift; }
    FC_INLINE int unit() const { return kSuperBlock * block(); }
    template <class Offset> FC_INLINE Offset blocks(Offset values) const {
        return (values + block() - 1) >> (octet_shift + 3);
    }
    FC_INLINE int64_t residual_numel(int64_t values) const { return residual_of_blocks(blocks(values), block()); }
    template <class Offset> FC_INLINE Offset octets(Offset values) const { return blocks(values) << octet_shift; }
    // The payload of `values` values alone, and in it the tile that starts at an octet.
    template <class Offset> FC_INLINE Place<Offset> own(Offset values) const {
        const Offset groups = octets(values) >> pair_shift, scales = plane_bytes(word_bits, groups);
        return {groups, 0, scales, scales + padded16(blocks(values))};
    }
    FC_INLINE Place<int64_t> part(const Place<int64_t>& whole, int64_t octet, int64_t block) const {
        return {whole.groups, octet, whole.scales + block, whole.tops + (block >> 4)};  // of whole super-blocks
    }
    FC_INLINE int bytes(int values) const {
        return values > 0 ? own(values).tops + padded16(2 * ((blocks(values) + kSuperBlock - 1) / kSuperBlock)) : 0;
    }

    template <class Offset>
    FC_DEVICE void zero_gaps(const Place<Offset>& place, Offset values, uint8_t* payload) const {
        const Offset blocks = this->blocks(values);
        zero_gaps(place, blocks, (blocks + kSuperBlock - 1) / kSuperBlock, payload);
    }
    template <class Offset>
    FC_DEVICE void zero_gaps(const Place<Offset>& place, Offset blocks, Offset super_blocks, uint8_t* payload) const {
        each_plane(word_bits, place.groups, [&](auto width, int, Offset start) {
            zero_gap<Offset>(payload + start, place.groups * width.value);
        });
        zero_gap<Offset>(payload + place.scales, blocks);
        zero_gap<Offset>(payload + place.tops, 2 * super_blocks);
    }

    // ---- numbers of threads ----------------------------------------------------------------------------------------

    // Codes as kMagic + (code << 8): the bits of the float32 kBias + code.
    static constexpr uint32_t kMagic = 0x47000000;
    static constexpr int kBias = 32768;

    // Stores the codes of kOctets octets from `octet` on, or of the first two of them where not all are there.
    template <int kOctets, class Offset>
    FC_DEVICE void store_codes(const uint32_t (&code)[8 * kOctets], Offset octet, bool all, uint8_t* payload,
                               Offset groups) const {
        if (pair_shift) {
            Eight lower[kOctets / 2], upper[kOctets / 2];
            FC_UNROLL for (int k = 0; k < kOctets / 2; k++) {
                uint32_t number[8];
                FC_UNROLL for (int i = 0; i < 8; i++) number[i] =
                    code[16 * k + 2 * i] + code[16 * k + 2 * i + 1] * (uint32_t)levels;
                lower[k] = eight_of(number), upper[k] = upper_eight_of(number);
            }
            store_some<kOctets / 2>(lower, upper, octet / 2, all, payload, groups);
        } else {
            Eight eights[kOctets];
            FC_UNROLL for (int k = 0; k < kOctets; k++) eights[k] = eight_of(code + 8 * k);
            store_some<kOctets>(eights, eights, octet, all, payload, groups);
        }
    }

    // The words of kOctets octets from `octet` on: an eight for each; paired, of each two first the lower bytes' eight.
    template <int kOctets, class Offset>
    FC_DEVICE void load_codes(const uint8_t* payload, Offset octet, Offset groups, Eight (&words)[kOctets]) const {
        FC_UNROLL for (int k = 0; k < kOctets; k++) words[k] = {0, 0};
        if (!pair_shift) return load_planes<kOctets, Offset>(word_bits, groups, octet, payload, words, words);
        Eight lower[kOctets / 2] = {}, upper[kOctets / 2] = {};
        load_planes<kOctets / 2, Offset>(word_bits, groups, octet / 2, payload, lower, upper);
        FC_UNROLL for (int k = 0; k < kOctets; k++) words[k] = k & 1 ? upper[k / 2] : lower[k / 2];
    }

    // The sixteen codes of two octets.
    FC_DEVICE void numbers_of(Eight first, Eight second, uint32_t (&number)[16]) const {
        if (pair_shift) return unpair(first, second, number);
        FC_UNROLL for (int i = 0; i < 16; i++) {
            const Eight from = i < 8 ? first : second;
            number[i] = byte_perm(i & 1 ? from.odd : from.even, kMagic, 0x7404 | i % 8 / 2 << 4);
        }
    }

    // ---- constants: their bits are spread over the first 16 or 32 codes of a block -----------------------------------

    FC_INLINE int constant_bits() const { return octet_shift == 1 ? 2 : 1; }
    template <class Offset>
    FC_DEVICE uint32_t constant_of(const uint8_t* payload, Offset first, Offset groups) const {
        uint32_t bits = 0;
        for (int half = 0; half < 2 / constant_bits(); half++) {
            Eight words[2];
            uint32_t number[16];
            load_codes<2, Offset>(payload, first + 2 * half, groups, words);
            numbers_of(words[0], words[1], number);
            FC_UNROLL for (int i = 0; i < 16; i++) bits |= (number[i] >> 8 & ((1u << constant_bits()) - 1))
                                                           << (16 * half + i * constant_bits());
        }
        return bits;
    }

private:
    // Eight words of lower and upper bytes as sixteen codes. The quotient is that of number * inverse >> shift, with 24
    // bits: numbers have at most 15, so its error is below 2**-9 and less than 1 / levels.
    FC_DEVICE void unpair(Eight lower, Eight upper, uint32_t (&number)[16]) const {
        FC_UNROLL for (int i = 0; i < 8; i++) {
            const uint32_t low = i & 1 ? lower.odd : lower.even, high = i & 1 ? upper.odd : upper.even;
            // A zero, the two bytes, a zero: the sign of an upper byte, which has at most seven bits.
            const uint32_t scaled = byte_perm_signed(low, high, 0xC40C + (uint32_t)(i / 2) * 0x0110);
            const uint32_t second = multiply_high(scaled, inverse);
            number[2 * i + 1] = byte_perm(second, kMagic, 0x7404);
            number[2 * i] = second * minus_levels + (kMagic + scaled);
        }
    }

    // All eights, or where not all are there the first half of them.
    template <int kCount, class Offset>
    FC_DEVICE void store_some(const Eight (&lower)[kCount], const Eight (&upper)[kCount], Offset eight, bool all,
                              uint8_t* payload, Offset groups) const {
        if (all) return store_planes<kCount, Offset>(word_bits, groups, eight, lower, upper, payload);
        if constexpr (kCount > 1) {
            Eight some[2][kCount / 2];
            FC_UNROLL for (int k = 0; k < kCount / 2; k++) some[0][k] = lower[k], some[1][k] = upper[k];
            store_planes<kCount / 2, Offset>(word_bits, groups, eight, some[0], some[1], payload);
        }
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA
