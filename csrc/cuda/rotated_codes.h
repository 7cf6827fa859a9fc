// The codes of rotated blocks (rotated.h) as threads hold them, eight at a time, and where a payload has them.
//
// At whole widths an octet is w bytes of every plane, as in tile.h. At half widths two codes are one word, so an octet
// is a quad of words and half as many bytes: in planes of one bit two lanes share a byte.
#pragma once

#include "format/rotated_search.h"
#include "cuda/tile.h"

namespace flashcomm::FLASHCOMM_ISA {

struct RotatedCodes {
    // Where the sections of a tile begin in a payload of `groups` eights of words: its own, or a whole tensor's.
    template <class Offset> struct Place {
        Offset groups, octet, scales, tops;  // octet: the tile's first
    };

    int levels, zero, word_bits, octet_shift;  // 1 << octet_shift octets are a block
    uint32_t inverse, shift;  // number * inverse >> shift is number / levels
    bool is_paired;

    FC_INLINE explicit RotatedCodes(Setting with)
        : levels(RotatedLayout::levels_of(with.bits)), zero(levels / 2),
          word_bits(with.bits & 1 ? with.bits : with.bits / 2), octet_shift(1), shift(16), is_paired(with.bits & 1) {
        while (8 << octet_shift < with.block) octet_shift++;
        while (levels > 2 << (shift - 16)) shift++;
        inverse = ((1u << shift) + levels - 1) / levels;
    }

    FC_INLINE int block() const { return 8 << octet_shift; }
    FC_INLINE int unit() const { return kFamily * block(); }
    template <class Offset> FC_INLINE Offset blocks(Offset values) const {
        return (values + block() - 1) >> (octet_shift + 3);
    }
    FC_INLINE int64_t residual_numel(int64_t values) const { return memory_numel(blocks(values), block()); }
    template <class Offset> FC_INLINE Offset octets(Offset values) const { return blocks(values) << octet_shift; }
    // The payload of `values` values alone, and in it the tile that starts at an octet.
    template <class Offset> FC_INLINE Place<Offset> own(Offset values) const {
        const Offset groups = octets(values) >> (int)is_paired, scales = plane_bytes(word_bits, groups);
        return {groups, 0, scales, scales + padded16(blocks(values))};
    }
    FC_INLINE Place<int64_t> part(const Place<int64_t>& whole, int64_t octet) const {
        const int64_t block = octet >> octet_shift;
        return {whole.groups, octet, whole.scales + block, whole.tops + block / kFamily * 2};
    }
    FC_INLINE int bytes(int values) const {
        return values > 0 ? own(values).tops + padded16(2 * ((blocks(values) + kFamily - 1) / kFamily)) : 0;
    }

    template <class Offset>
    FC_DEVICE void zero_gaps(const Place<Offset>& place, Offset values, uint8_t* payload) const {
        const Offset blocks = this->blocks(values);
        each_plane(word_bits, place.groups, [&](auto width, int, Offset start) {
            zero_gap<Offset>(payload + start, place.groups * width.value);
        });
        zero_gap<Offset>(payload + place.scales, blocks);
        zero_gap<Offset>(payload + place.tops, 2 * ((blocks + kFamily - 1) / kFamily));
    }

    // ---- constants: their bits are spread over the first codes of a block --------------------------------------------

    FC_INLINE int constant_bits() const { return octet_shift == 1 ? 2 : 1; }
    FC_INLINE int constant_octets() const { return octet_shift == 1 ? 2 : 4; }
    FC_DEVICE uint32_t constant_part(const uint32_t (&codes)[2], int octet) const {
        uint32_t bits = 0;
        FC_UNROLL for (int i = 0; i < 8; i++)
            bits |= (byte_of(codes, i) & ((1u << constant_bits()) - 1)) << i * constant_bits();
        return bits << 8 * constant_bits() * octet;
    }

    // ---- planes --------------------------------------------------------------------------------------------------

    // All lanes of a warp, though nothing is stored of those that are not there.
    template <class Offset>
    FC_DEVICE void store_codes(const uint32_t (&code)[8], Offset octet, bool is_there, uint8_t* payload,
                               Offset groups) const {
        if (!is_paired) {
            if (is_there)
                store_octet<Offset>(word_bits, groups, octet, four_bytes(code), four_bytes(code + 4), payload);
            return;
        }
        uint32_t lower[4], upper[4];
        FC_UNROLL for (int i = 0; i < 4; i++) {
            const uint32_t word = code[2 * i] + code[2 * i + 1] * (uint32_t)levels;
            lower[i] = word & 0xFF, upper[i] = word >> 8;
        }
        store_quad(four_bytes(lower), four_bytes(upper), octet, is_there, payload, groups);
    }

    // The planes of four words, whose lower and upper bytes these are.
    template <class Offset>
    FC_DEVICE void store_quad(uint32_t lower, uint32_t upper, Offset octet, bool is_there, uint8_t* planes,
                              Offset groups) const {
        each_plane(word_bits, groups, [&](auto width, int shift, Offset start) {
            constexpr uint32_t kMask = 0x01010101u * ((1u << width.value) - 1);
            const uint32_t bits = pack4<width.value>((shift < 8 ? lower : upper) >> (shift & 7) & kMask);
            uint8_t* at = planes + start + octet * width.value / 2;
            if constexpr (width.value == 1) {
                const uint32_t next = exchange(bits, 1);
                if (is_there && !(octet & 1)) *at = (uint8_t)(bits | next << 4);
            } else if (is_there) {
                if constexpr (width.value == 8) *(uint32_t*)at = bits;
                if constexpr (width.value == 4) *(uint16_t*)at = (uint16_t)bits;
                if constexpr (width.value == 2) *at = (uint8_t)bits;
            }
        });
    }

    template <class Offset>
    FC_DEVICE void load_codes(const uint8_t* payload, const Place<Offset>& place, Offset octet,
                              uint32_t (&codes)[2]) const {
        if (!is_paired) return load_octet<Offset>(word_bits, place.groups, octet, payload, codes);
        uint32_t lower = 0, upper = 0, code[8];
        each_plane(word_bits, place.groups, [&](auto width, int shift, Offset start) {
            const uint8_t* at = payload + start + octet * width.value / 2;
            uint32_t bits = 0;
            if constexpr (width.value == 8) bits = *(const uint32_t*)at;
            if constexpr (width.value == 4) bits = *(const uint16_t*)at;
            if constexpr (width.value == 2) bits = *at;
            if constexpr (width.value == 1) bits = *at >> (octet & 1 ? 4 : 0) & 0xF;
            bits = unpack4<width.value>(bits) << (shift & 7);
            (shift < 8 ? lower : upper) |= bits;
        });
        FC_UNROLL for (int i = 0; i < 4; i++) {
            const uint32_t number = (lower >> 8 * i & 0xFF) | (upper >> 8 * i & 0xFF) << 8;
            code[2 * i + 1] = number * inverse >> shift;
            code[2 * i] = number - code[2 * i + 1] * (uint32_t)levels;
        }
        codes[0] = four_bytes(code), codes[1] = four_bytes(code + 4);
    }
};

}  // namespace flashcomm::FLASHCOMM_ISA
