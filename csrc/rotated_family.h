// One family of rotated blocks on the CPU: what is known of it while it is coded, and its codes as planes.
#pragma once

#include "planes.h"
#include "rotated.h"

namespace flashcomm::FLASHCOMM_ISA {
namespace {

constexpr int kMostValues = kFamily * 1024;  // of a family of the largest blocks

// What is known of one family while it is coded; the arrays hold its blocks one after the other.
struct alignas(64) Family {
    float coefficients[kMostValues], carried[kMostValues];
    uint8_t codes[kMostValues], parts[kMostValues / 2];
    uint16_t words[kMostValues / 2];
    float largest[kFamily], shrinks[kFamily], inverses[kFamily], sizes[kFamily];
    uint32_t scales[kFamily], constants[kFamily], keys[kFamily], top;
};

inline bool is_escape(uint32_t scale) { return (scale & 0x7F) > kLast; }

inline int count_of(const RotatedLayout& at, int64_t block) {
    const int64_t left = at.numel - block * at.block;
    return (int)(left < at.block ? left : at.block);
}

inline int blocks_of(const RotatedLayout& at, int64_t family) {
    const int64_t left = at.blocks - family * kFamily;
    return (int)(left < kFamily ? left : kFamily);
}

inline uint32_t top_of(const uint8_t* payload, const RotatedLayout& at, int64_t family) {
    uint16_t top;
    __builtin_memcpy(&top, payload + at.tops + 2 * family, 2);
    return top;
}

inline void pack(Family& f, const RotatedLayout& at, int64_t first, int blocks, uint8_t* payload) {
    const int words = (int)(blocks * at.block / at.together);
    const int64_t octet = first * at.block / at.together / 8;
    const uint8_t* low = f.codes;
    if (at.together == 2) {
        const Word16* pairs = (const Word16*)f.codes;
        const uint16_t levels = (uint16_t)at.levels;
        for (int i = 0; i < words; i++) f.words[i] = (uint16_t)((pairs[i] & 0xFF) * levels + (pairs[i] >> 8));
        for (int i = 0; i < words; i++) f.parts[i] = (uint8_t)f.words[i];
        low = f.parts;
    }
    bool is_low = true;
    at.each_plane([&](int width, int shift, int64_t start) {
        uint8_t* plane = payload + start + octet * width;
        if (shift >= 8 && is_low) {
            for (int i = 0; i < words; i++) f.parts[i] = (uint8_t)(f.words[i] >> 8);
            is_low = false;
        }
        if (width == 8) __builtin_memcpy(plane, low, words);
        else pack_plane(width, low, words, shift & 7, plane);
    });
}

inline void unpack(const uint8_t* payload, const RotatedLayout& at, int64_t first, int blocks, Family& f) {
    const int words = (int)(blocks * at.block / at.together);
    const int64_t octet = first * at.block / at.together / 8;
    uint8_t* low = at.together == 2 ? f.parts : f.codes;
    for (int i = 0; at.together == 2 && i < words; i++) f.words[i] = 0;
    bool is_low = true;
    at.each_plane([&](int width, int shift, int64_t start) {
        const uint8_t* plane = payload + start + octet * width;
        if (shift == 8 && is_low) {
            for (int i = 0; i < words; i++) f.words[i] = f.parts[i];
            is_low = false;
        }
        if (width == 8) __builtin_memcpy(low, plane, words);
        else unpack_plane(width, plane, words, shift & 7, low);
    });
    if (at.together == 1) return;
    const int shift = is_low ? 0 : 8;
    Word16* pairs = (Word16*)f.codes;
    if (at.levels < 40) {  // 16-bit products are exact while levels cubed is below 2 ** 16
        const uint16_t levels = (uint16_t)at.levels, inverse = (uint16_t)((1u << 16) / levels + 1);
        for (int i = 0; i < words; i++) {
            const uint16_t word = (uint16_t)(f.words[i] | f.parts[i] << shift);
            const uint16_t upper = (uint16_t)((uint32_t)word * inverse >> 16);
            pairs[i] = (Word16)(upper | (uint16_t)(word - upper * levels) << 8);
        }
        return;
    }
    const uint32_t levels = (uint32_t)at.levels, inverse = (1u << 24) / levels + 1;  // exact below 181 * 181
    for (int i = 0; i < words; i++) {
        const uint32_t word = f.words[i] | (uint32_t)f.parts[i] << shift, upper = word * inverse >> 24;
        pairs[i] = (Word16)(upper | (word - upper * levels) << 8);
    }
}

inline void zero_gaps(const RotatedLayout& at, uint8_t* payload) {
    const auto zero = [payload](int64_t start, int64_t size) {
        for (int64_t i = size; i < Layout::padded(size); i++) payload[start + i] = 0;
    };
    at.each_plane([&](int width, int, int64_t start) { zero(start, at.words / 8 * width); });
    zero(at.scales, at.blocks);
    zero(at.tops, 2 * at.families);
}

}  // namespace
}  // namespace flashcomm::FLASHCOMM_ISA
